"""Whatever the batches, windows and stops: nothing is lost, repeated or out of order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from batches import gathered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from resuming import through_a_file
from torch import Tensor

import flowstream as fs
from flowstream.scoring.base import Cost, Scores

WEIGHED_ZERO = (float("nan"), float("inf"), -1.0)
"""Losses that are not finite; -1 stands for a sample without a label."""


class ByKey:
    """Losses and labels from the batch. A `Scorer`."""

    levels = frozenset({"sample"})

    def begin(self, batches: Any, **_: Any) -> Any:
        return _Job(batches)

    def check(self) -> None: ...

    def fingerprint(self) -> str:
        return "by key"

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Job:
    cost = Cost()

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.num_steps = len(batches)

    def step(self) -> None:
        self.num_steps = max(self.num_steps - 1, 0)

    def finish(self) -> list[Scores]:
        self.num_steps = 0
        return [
            Scores(torch.where(batch["labels"], batch["loss"], 0.0), batch["labels"].long()) for batch in self.batches
        ]


@dataclass(frozen=True)
class Data:
    """Two epochs of these batches, in windows of this size."""

    losses: tuple[tuple[float, ...], ...]
    window: int
    accumulate: int
    warmup_samples: int

    @property
    def batches(self) -> list[dict[str, Tensor]]:
        out, num = [], 0
        for losses in self.losses:
            loss = torch.tensor(losses, dtype=torch.float32)
            out.append({"loss": loss.abs(), "labels": loss != -1, "id": torch.arange(num, num + len(losses))})
            num += len(losses)
        return out

    def stream(self, mode: Any) -> fs.FlowStream:
        return fs.FlowStream(
            self.batches,
            ByKey(),
            mode=mode,
            window=self.window * self.accumulate,
            accumulate=self.accumulate,
            temperature=fs.RunningMedian(warmup_samples=self.warmup_samples),
            include=("tau", "index", "denominator"),
            max_bad_fraction=1.0,
            cache=None,
        )


def losses() -> st.SearchStrategy[float]:
    return st.one_of(
        st.floats(0.0, 8.0, width=32), st.floats(0.0, 0.5, width=32), st.sampled_from((*WEIGHED_ZERO, 300))
    )


@st.composite
def data(draw: st.DrawFn) -> Data:
    """Batches of one size but the last, or of any sizes."""
    if draw(st.booleans()):
        size, num = draw(st.integers(1, 6)), draw(st.integers(1, 90))
        sizes = [size] * (num // size) + [num % size] * (num % size > 0)
    else:
        sizes = draw(st.lists(st.integers(0, 7), min_size=1, max_size=16))
    drawn = [tuple(draw(st.lists(losses(), min_size=size, max_size=size))) for size in sizes]
    return Data(tuple(drawn), draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 40)))


STOPS = st.lists(st.integers(0, 9), max_size=6)
"""Batches that are taken between one resume and the next."""

LAWS = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


def interrupted(stated: Data, mode: Any, stops: list[int], num_epochs: int = 2) -> list[list[dict[str, Tensor]]]:
    """What each epoch delivers to one who resumes in a new stream after every stop."""
    epochs: list[list[dict[str, Tensor]]] = [[] for _ in range(num_epochs)]
    stream = stated.stream(mode)
    for stop in [*stops, 10**9]:
        left = stop
        while left and stream.state_dict()["epoch"] < num_epochs:
            for batch in stream:
                epochs[stream.epoch].append(batch)
                left -= 1
                if not left:
                    break
        resumed = stated.stream(mode)
        resumed.load_state_dict(through_a_file(stream.state_dict()))
        stream = resumed
    return epochs


def uninterrupted(stated: Data, mode: Any, num_epochs: int = 2) -> list[list[dict[str, Tensor]]]:
    stream = stated.stream(mode)
    return [list(stream) for _ in range(num_epochs)]


def assert_same(ours: list[list[dict[str, Tensor]]], expected: list[list[dict[str, Tensor]]]) -> None:
    for epoch, other in zip(ours, expected, strict=True):
        assert len(epoch) == len(other)
        for one, two in zip(epoch, other, strict=True):
            for key in one:
                # τ of a stream without a usable loss is NaN
                assert torch.equal(one[key].nan_to_num(-7), two[key].nan_to_num(-7)), key


@LAWS
@given(stated=data(), stops=STOPS)
def test_weighted_every_sample_comes_once_in_its_order_with_its_weight(stated: Data, stops: list[int]) -> None:
    epochs = interrupted(stated, "weight", stops)
    for epoch in epochs:
        assert len(epoch) == len(stated.batches)
        for ours, batch in zip(epoch, stated.batches, strict=True):
            assert torch.equal(ours["id"], batch["id"])
            usable = batch["labels"] & batch["loss"].isfinite()
            expected = torch.where(usable, torch.exp(-batch["loss"] / ours["flow_tau"]), 0.0)
            torch.testing.assert_close(ours["flow_weight"], expected, rtol=1e-5, atol=1e-7)
    assert_same(epochs, uninterrupted(stated, "weight"))


@LAWS
@given(stated=data(), stops=STOPS)
def test_thinned_the_accepted_are_those_of_an_uninterrupted_run(stated: Data, stops: list[int]) -> None:
    epochs = interrupted(stated, "resample", stops)
    every = torch.cat([batch["id"] for batch in stated.batches])
    usable = torch.cat([batch["labels"] & batch["loss"].isfinite() for batch in stated.batches])
    for epoch in epochs:
        ids = gathered(epoch, "id") if epoch else torch.empty(0, dtype=torch.int64)
        assert ids.diff().gt(0).all()  # in order, and none twice
        assert torch.isin(ids, every[usable]).all()
        sizes = [len(batch["id"]) for batch in epoch]
        assert len(set(sizes[:-1])) <= 1
    assert_same(epochs, uninterrupted(stated, "resample"))


@LAWS
@given(stated=data(), stops=STOPS)
def test_the_metrics_of_a_resumed_stream_count_every_sample_once(stated: Data, stops: list[int]) -> None:
    num = sum(map(len, stated.losses))
    for mode in ("weight", "resample"):
        stream = stated.stream(mode)
        for stop in stops:
            for _ in zip(range(stop), stream, strict=False):
                pass
            if stream.state_dict()["epoch"]:
                break
            resumed = stated.stream(mode)
            resumed.load_state_dict(through_a_file(stream.state_dict()))
            stream = resumed
        else:
            list(stream)
            assert stream.metrics()["flow/samples_seen"] == num
