"""Ranks that are built alike and walk alike, and those that are not: told on all of them, with the cause.

Streams stay open until all ranks are done: nobody is told of an error by the end of a process.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawned import run_ranks
from torch import nn
from uneven import Told, attempts, by_key, length_of, outcome_of, own_rank, shard

import flowstream as fs

WINDOW = 4
NUM = 8 * 24
WHO = 1
"""The rank that is different."""

TIMEOUT = 12.0
"""What is told at once takes no time; what takes as long was not told."""


# Ranks that were not built alike.


def built(here: dict[str, Any], there: dict[str, Any]) -> tuple[str, str]:
    settings = here if own_rank() == WHO else there
    scorer: Any = by_key
    if "reference" in settings:
        torch.manual_seed(settings["reference"])
        scorer = fs.ClassifierScorer(nn.Linear(2, 3))
        settings = {}
    stream = fs.FlowStream(shard(own_rank(), NUM), scorer, cache=None, timeout=TIMEOUT, **settings)
    found = attempts(stream, 2)
    dist.barrier()
    assert [one["num"] for one in found] == [0, 0]
    assert found[0]["text"] == found[1]["text"]
    return found[0]["error"], found[0]["text"]


def all_built(cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[Any]:
    return [outcome_of(lambda case=case: built(*case)) for case in cases]


def test_ranks_that_are_configured_differently_are_told_the_field():
    cases = {
        "temperature": ({"temperature": fs.FixedTemperature(1.0)}, {"temperature": fs.FixedTemperature(2.0)}),
        "mode": ({"mode": "resample"}, {}),
        "policy": ({"policy": fs.Probability()}, {}),
        "include": ({"include": ("tau",)}, {}),
        "window": ({"window": 4}, {"window": 8}),
        "seed": ({"seed": 1}, {}),
        "on_uneven": ({"on_uneven": "stop"}, {}),
        "reference": ({"reference": 1}, {"reference": 0}),
        "include, with denominators,": ({"include": ("denominator",)}, {}),
    }
    outcomes = run_ranks(all_built, 3, list(cases.values()))
    assert [str(outcome.error) for outcome in outcomes if outcome.error] == []
    for number, name in enumerate(cases):
        for error, text in (outcome.result[number] for outcome in outcomes):
            assert error == "ValueError"
            assert f"differ in {name.split(',')[0]}: " in text
            assert "on rank 1" in text


# Ranks that do not walk alike.


def broken_off(at: list[int], settings: dict[str, Any]) -> dict[str, Any]:
    """Break out of the loop, and begin anew."""
    stream = fs.FlowStream(
        shard(own_rank(), NUM), by_key, window=WINDOW, cache=None, timeout=TIMEOUT, include=("tau",), **settings
    )
    (found,) = attempts(itertools.islice(stream, at[own_rank()]), 1)
    if not found["error"]:
        (found,) = attempts(stream, 1)
    dist.barrier()
    stream.close()
    return found


SMALL = {"temperature": fs.RunningMedian(warmup_samples=32)}


@pytest.mark.parametrize("at", [3, 4, 7, 13])
def test_ranks_that_break_out_of_a_loop_at_the_same_batch_begin_the_next_epoch(at):
    for outcome in run_ranks(broken_off, 2, [at, at], SMALL):
        assert outcome.error is None
        assert (outcome.result["error"], outcome.result["num"]) == ("", NUM // 8)


# Needs meeting.py, agreement.py and epoch.py. Where only τ tells, the error's text is about states; [1, 3] and [7, 6]:
# one rank finds out at once, but the other has a meeting more and waits until `timeout`, since a rank that raises
# RankError for another's header does not give the agreement up; NORMALIZED: nobody finds out.
NORMALIZED = {"temperature": fs.FixedTemperature(1.0), "normalize": True}


@pytest.mark.parametrize(
    ("at", "settings"),
    [
        ([3, 6], SMALL),  # as many meetings
        ([6, 3], SMALL),
        ([4, 9], SMALL),
        ([12, 1], SMALL),
        ([0, 5], SMALL),
        ([1, 3], SMALL),  # in one window, after and before the meeting is called
        ([1, 2], SMALL),  # before it on both: nothing differs but what was delivered
        ([7, 6], SMALL),
        ([3, 6], NORMALIZED),  # τ is the same, the mean weight is not
    ],
)
def test_ranks_that_break_out_of_a_loop_at_different_batches_are_told_on_all(at, settings):
    outcomes = run_ranks(broken_off, 2, at, settings)
    assert [str(outcome.error) for outcome in outcomes if outcome.error] == []
    for outcome in outcomes:
        assert outcome.result["error"] == "RankError"
        assert outcome.result["seconds"] < TIMEOUT / 3
        # One that is a meeting ahead learns that another has left for this reason, and not from a message.
        text = outcome.result["text"]
        assert "take the same number of batches" in text or "has closed its stream" in text


# Several streams, and the data they are given.


def two_streams() -> list[list[int]]:
    """Interleaved: one weights, one resamples."""
    first = fs.FlowStream(shard(own_rank(), [200, 90][own_rank()]), by_key, window=WINDOW, cache=None)
    second = fs.FlowStream(shard(own_rank(), 600), by_key, window=WINDOW, cache=None, mode="resample", seed=3)
    found: list[list[int]] = [[], []]
    with first, second:
        for one, other in itertools.zip_longest(first, second):
            for ids, batch in zip(found, (one, other), strict=True):
                if batch is not None:
                    has_samples = "flow_weight" not in batch or batch["flow_weight"].any()
                    ids.append(len(batch["id"]) if has_samples else 0)
    return found


def test_two_streams_at_once_keep_apart():
    found = [outcome.result for outcome in run_ranks(two_streams, 2)]
    assert [len(one[0]) for one in found] == [25, 25]
    assert [sum(one[0]) for one in found] == [200, 90]
    assert len(found[0][1]) == len(found[1][1]) > 2 * WINDOW


def told_of_same_data(different: bool) -> list[list[str]]:
    texts = []
    for settings in ({}, {"mode": "resample"}):
        with (
            Told() as told,
            fs.FlowStream(shard(own_rank() if different else 0, NUM), by_key, cache=None, **settings) as stream,
        ):
            for _ in range(2):
                for _ in stream:
                    pass
        texts.append([text for text in told.messages if "deliver the same samples in the same order" in text])
    return texts


# Needs epoch.py: `_has_compared` is an epoch's, so it is told again in each.
@pytest.mark.parametrize("different", [False, True])
def test_ranks_that_deliver_the_same_data_are_told_once(different):
    for outcome in run_ranks(told_of_same_data, 3, different):
        for texts in outcome.result:
            assert len(texts) == (0 if different else 1)
            assert all(text.startswith("ranks [0, 1, 2] deliver the same samples") for text in texts)


class Unsized:
    def __iter__(self) -> Any:
        return iter(shard(own_rank(), 40))


def lengths() -> list[int | None]:
    found = []
    for settings in ({}, {"on_uneven": "stop"}, {"on_uneven": "raise"}, {"mode": "resample"}):
        with fs.FlowStream(shard(own_rank(), [40, 0, 100][own_rank()]), by_key, **settings) as stream:
            found.append(length_of(stream))
    with fs.FlowStream(Unsized() if own_rank() == 2 else shard(own_rank(), 40), by_key) as stream:
        found.append(length_of(stream))
    return found


def test_the_length_is_what_all_ranks_agree_on():
    for outcome in run_ranks(lengths, 3):
        assert outcome.result == [13, 0, 13, None, None]
