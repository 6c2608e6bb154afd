"""Ranks that take their states at the same batch, and resume from them: the rest is what it would have been."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from resuming import through_a_file
from spawned import run_ranks
from uneven import by_key, outcome_of, own_rank, plain, shard

import flowstream as fs

WINDOW = 4
SIZES = [8 * 11 + 3, 0, 8 * 3 + 2]
"""The second never has a batch; the third runs dry at a window's boundary, nearly."""

CASES: dict[str, tuple[list[int], dict[str, Any]]] = {
    "padded": (SIZES, {}),
    "padded, steps of two": (SIZES, {"accumulate": 2, "normalize": True}),
    "padded, dry at a boundary": ([8 * 11, 8 * 4, 8 * 8], {"temperature": fs.WindowMedian()}),
    "half-life": (SIZES, {"temperature": fs.RunningMedian(warmup_samples=32, half_life_samples=100)}),
    "permuted": (SIZES, {"policy": fs.Permuted(fs.Flow())}),
    "uniform": (SIZES, {"policy": fs.Uniform(), "include": ("denominator",)}),
    "stopped": ([8 * 11 + 3, 8 * 10 + 1, 8 * 9], {"on_uneven": "stop"}),
    "stopped in a window": ([8 * 14 + 3, 8 * 10 + 1, 8 * 14], {"on_uneven": "stop", "accumulate": 2}),
    "resampled": ([8 * 40, 8 * 31 + 3, 8 * 60], {"mode": "resample"}),
    "resampled, steps of two": ([8 * 40, 8 * 31 + 3, 8 * 60], {"mode": "resample", "accumulate": 2, "seed": 5}),
    "systematic": ([8 * 40, 8 * 31 + 3, 8 * 60], {"mode": fs.Systematic(2.0)}),
}


def stream_of(sizes: list[int], settings: dict[str, Any]) -> fs.FlowStream:
    usual = {"window": WINDOW, "cache": None, "timeout": 20.0, "include": ("tau", "denominator")}
    usual |= {"temperature": fs.RunningMedian(warmup_samples=32)}
    return fs.FlowStream(shard(own_rank(), sizes[own_rank()]), by_key, **(usual | settings))


def walk(stream: fs.FlowStream, num: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The next `num` batches, over epochs, and the state after each."""
    batches: list[dict[str, Any]] = []
    states: list[dict[str, Any]] = []
    while len(batches) < num:
        before = len(batches)
        for batch in stream:
            batches.append(plain(batch) | {"epoch": stream.epoch})
            states.append(through_a_file(stream.state_dict()))
            if len(batches) == num:
                break
        assert len(batches) > before
    return batches, states


def differences(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Which batches are not the same; and which of those have no samples, and differ in what these are made from."""
    wrong, other_padding = [], []
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours == theirs:
            continue
        both_padded = [any(batch["weight"] or [1]) or set(batch["labels"]) != {-100} for batch in (ours, theirs)]
        kept = ("epoch", "tau", "denominator")
        if any(both_padded) or any(ours[key] != theirs[key] for key in kept):
            wrong.append(number)
        else:
            other_padding.append(number)
    return wrong, other_padding


EVERY_STOP = ("padded, steps of two", "stopped", "resampled, steps of two")
"""The others are stopped at one batch in three."""

METRICS = ("flow/samples_seen", "flow/samples_emitted", "flow/padded_batches", "flow/mean_weight", "flow/tau")


def resumed_everywhere(name: str) -> dict[str, Any]:
    """Two epochs without an interruption; and from the state after each batch, now and then in a new stream."""
    logging.getLogger("flowstream").setLevel(logging.ERROR)
    sizes, settings = CASES[name]
    with stream_of(sizes, settings) as stream:
        length = len(list(stream))
    with stream_of(sizes, settings) as stream:
        expected, states = walk(stream, 2 * length + 1)  # into the third
        metrics = stream.metrics()
    wrong: dict[int, Any] = {}
    padding: dict[int, Any] = {}
    again = stream_of(sizes, settings)
    for number in range(0, len(states) - 1, 1 if name in EVERY_STOP else 3):
        if number % 9 == 6:
            again.close()
            again = stream_of(sizes, settings)
        again.load_state_dict(states[number])
        found, _ = walk(again, len(expected) - number - 1)
        others, padded = differences(found, expected[number + 1 :])
        if others:
            wrong[number] = (number + 1 + others[0], found[others[0]], expected[number + 1 + others[0]])
        if padded:
            padding[number] = [number + 1 + at for at in padded]
        for key in METRICS:
            if repr(again.metrics()[key]) != repr(metrics[key]):
                wrong.setdefault(number, (key, again.metrics()[key], metrics[key]))
    again.close()
    return {"length": length, "wrong": wrong, "padding": padding}


@pytest.mark.parametrize("name", CASES)
def test_resumed_ranks_deliver_what_uninterrupted_ones_would_have(name):
    outcomes = run_ranks(resumed_everywhere, 3, name)
    assert [str(outcome.error) for outcome in outcomes if outcome.error] == []
    lengths = {outcome.result["length"] for outcome in outcomes}
    assert len(lengths) == 1
    assert lengths.pop() > WINDOW
    for outcome in outcomes:
        assert outcome.result["wrong"] == {}
    # A rank that never had a batch makes its batches of weight 0 from what another one has, then and now.
    sizes, _ = CASES[name]
    for size, outcome in zip(sizes, outcomes, strict=True):
        assert outcome.result["padding"] == {} or not size


def begun(folder: str, num: int) -> None:
    """The first process of each rank: it leaves its state in a file, and ends."""
    with stream_of(*CASES["padded"]) as stream:
        walk(stream, num)
        torch.save(stream.state_dict(), f"{folder}/rank-{own_rank()}.pt")


def gone_on(folder: str, num: int, total: int) -> list[int]:
    with stream_of(*CASES["padded"]) as stream:
        expected, _ = walk(stream, total)
    with stream_of(*CASES["padded"]) as stream:
        stream.load_state_dict(torch.load(f"{folder}/rank-{own_rank()}.pt", weights_only=True))
        return differences(walk(stream, total - num)[0], expected[num:])[0]


@pytest.mark.parametrize("num", [6, 13])
def test_new_processes_resume_where_those_before_them_stopped(tmp_path, num):
    assert not [outcome.error for outcome in run_ranks(begun, 3, str(tmp_path), num) if outcome.error]
    assert [outcome.result for outcome in run_ranks(gone_on, 3, str(tmp_path), num, 20)] == [[]] * 3


# States that do not belong together.


def mixed(steps: list[int | None], settings: dict[str, Any], sizes: list[int]) -> tuple[str, str, float]:
    """Each rank resumes from its state after another number of batches; the first loop's are kept in step."""
    with stream_of(sizes, settings) as stream:
        _, states = walk(stream, 20)
    step = steps[own_rank()]
    stream = stream_of(sizes, settings)
    if step is not None:
        stream.load_state_dict(states[step])
    told = outcome_of(lambda: len([next(it) for it in [iter(stream)] for _ in range(3)]))
    dist.barrier()
    stream.close()
    return told


@pytest.mark.parametrize(
    ("steps", "places"),
    [
        ([2, 3, 2], ("batch 3 of window 0", "batch 4 of window 0")),
        ([2, 2, 9], ()),
        ([None, 5, 5], ()),
        ([5, 14, 14], ()),
    ],
)
@pytest.mark.parametrize("mode", ["weight", "resample"])
def test_states_of_different_steps_are_refused_on_all_ranks(steps, places, mode):
    sizes = [8 * 12, 8 * 12, 8 * 12] if mode == "weight" else [8 * 40, 8 * 31 + 3, 8 * 60]
    outcomes = run_ranks(mixed, 3, steps, {"mode": mode}, sizes)
    assert [str(outcome.error) for outcome in outcomes if outcome.error] == []
    for at, outcome in enumerate(outcomes):
        kind, text = outcome.result
        assert kind == "RankError"
        assert "resume from the same step" in text
        assert f"rank {at} meets the others at " in text
        assert ", but rank " in text


def exchanged(sizes: list[int]) -> None:
    """Every rank resumes from the state of the next one."""
    with stream_of(sizes, {}) as stream:
        _, states = walk(stream, 6)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, states[-1])
        stream.load_state_dict(everyone[(own_rank() + 1) % dist.get_world_size()])


def test_the_state_of_another_rank_is_refused():
    outcomes = run_ranks(exchanged, 3, [8 * 12] * 3)
    assert [outcome.error.text.split(":")[0] for outcome in outcomes if outcome.error] == [
        f"the state is that of rank {(rank + 1) % 3}, this is rank {rank}" for rank in range(3)
    ]
