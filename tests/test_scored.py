"""What is refused of a window's losses, and which samples the error names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import batches_of, gamma_losses

import flowstream as fs
from flowstream.scoring.base import Cost, Scores


class Given:
    """A scorer whose scores stand in the batch. A `Scorer`."""

    levels = frozenset({"sample", "token"})

    def begin(self, batches: Any, **_: Any) -> Any:
        return GivenJob([batch["scores"] for batch in batches])

    def check(self) -> None: ...

    def fingerprint(self) -> str:
        return "given"

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class GivenJob:
    num_steps = 0
    cost = Cost()

    def __init__(self, scores: list[Scores]) -> None:
        self.scores = scores

    def step(self) -> None: ...

    def finish(self) -> list[Scores]:
        return self.scores


def named_batches(bad: dict[int, float]) -> list[dict[str, Any]]:
    losses = gamma_losses(64)
    for at, value in bad.items():
        losses[at] = value
    return [batch | {"__key__": batch.pop("name")} for batch in batches_of(losses)]


@pytest.mark.parametrize("mode", ["weight", "resample"])
def test_negative_losses_are_refused_and_named(mode: Any) -> None:
    batches = named_batches({17: -0.5, 18: -2.0, 50: -1.0})
    stream = fs.FlowStream(batches, fs.Prescored("loss"), mode=mode)
    told = (
        r"a loss of -0.5 nats .*3 of 64 are negative, in window 0 of epoch 0: batch 1: row 1 \(sample 17\), row 2 "
        r"\(sample 18\); batch 3: row 2 \(sample 50\).*FLOW needs a non-negative loss"
    )
    with pytest.raises(ValueError, match=told):
        next(iter(stream))


def test_few_of_many_bad_samples_are_named() -> None:
    batches = named_batches(dict.fromkeys(range(64), float("nan")))
    with pytest.raises(ValueError, match=r"64 of 64 .*batch 0: row 0 \(sample 0\), .*row 3 \(sample 3\), …; batch 1: "):
        next(iter(fs.FlowStream(batches, fs.Prescored("loss"))))


def test_rows_are_named_by_the_key_of_the_cache_or_by_their_number_alone() -> None:
    batches = [batch | {"path": batch["__key__"]} for batch in named_batches({20: -1.0})]
    for batch in batches:
        del batch["__key__"]
    with pytest.raises(ValueError, match=r"batch 1: row 4 \(sample 20\)\)"):
        next(iter(fs.FlowStream(batches, fs.Prescored("loss"), cache_key="path")))
    with pytest.raises(ValueError, match=r"batch 1: row 4\)"):
        next(iter(fs.FlowStream(batches, fs.Prescored("loss"))))


@pytest.mark.parametrize("value", [-1.0, float("nan")])
@pytest.mark.parametrize("level", ["sample", "token"])
def test_documents_of_packed_rows_and_tokens_are_named_by_their_row(level: Any, value: float) -> None:
    segment = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 3]])
    loss = torch.tensor([1.0, 1.0, 1.0, value])
    scores = Scores(loss, torch.ones(4, dtype=torch.int64), segment, loss[segment].half(), segment >= 0)
    batch = {"labels": segment, "scores": scores, "__key__": ["left", "right"]}
    with pytest.raises(ValueError, match=r"batch 0: row 1 \(right\)"):
        next(iter(fs.FlowStream([batch], Given(), level=level, temperature=fs.FixedTemperature(1.0))))
