"""Rehearsal over real ranks: one posterior to the bit, samples of their own, one set of steps, an exact resume."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rehearsals import Known, always, evenly, is_rehearsed
from resuming import through_a_file
from spawned import run_ranks
from uneven import own_rank, shard

import flowstream as fs
from flowstream.rehearsal import Rehearsal

NUM = 90
CASES: dict[str, tuple[list[int], dict[str, Any]]] = {
    "padded": ([8 * 11 + 3, 8 * 3 + 2], {}),
    "a rank without data, steps of two": ([8 * 11 + 3, 0], {"accumulate": 2}),
    "resampled": ([8 * 30, 8 * 24 + 3], {"mode": "resample"}),
}


class Shared(Known):
    """Prior samples with the fields of the ranks' batches, which count who scores them."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "loss": super().__getitem__(index)["loss"],
            "id": -1 - index,
            "labels": index % 5 if index % 9 else -100,
        }


def stream_of(name: str) -> fs.FlowStream:
    sizes, settings = CASES[name]

    def loss_of(batch: Any) -> Any:
        scored.extend(-1 - i for i in batch["id"].tolist() if i < 0)
        return batch["loss"]

    scored: list[int] = []
    scorer = fs.FunctionScorer(loss_of, name="by key")
    prior = Shared(torch.arange(NUM, dtype=torch.float32))
    rehearsal = Rehearsal(prior, scorer, bins=3, ratio=0.4, was_correct=always, half_life=100.0)
    usual: dict[str, Any] = {"window": 4, "cache": None, "timeout": 20.0, "include": ("denominator",)}
    usual |= {"temperature": fs.RunningMedian(warmup_samples=32), "rehearsal": rehearsal}
    stream = fs.FlowStream(shard(own_rank(), sizes[own_rank()]), scorer, **(usual | settings))
    stream.scored = scored  # type: ignore[attr-defined]
    return stream


def walk(stream: fs.FlowStream, num: int, *, keeps: bool = True) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The next `num` batches over epochs as plain values, and the state after each. Feedback follows from both."""
    batches: list[dict[str, Any]] = []
    states: list[dict[str, Any]] = []
    while len(batches) < num:
        for batch in stream:
            assert stream.rehearsal is not None
            batches.append({key: value.tolist() for key, value in batch.items()} | {"epoch": stream.epoch})
            batches[-1]["rates"] = [rate.hex() for rate in stream.rehearsal.rates().tolist()]
            if is_rehearsed(batch):
                seen = int(stream.rehearsal.counts().sum())
                stream.feedback(batch, (batch["flow_rehearsed"] * 7 + seen + own_rank()) % 3 > 0)
            states.append(through_a_file(stream.state_dict()) if keeps else {})
            if len(batches) == num:
                break
    return batches, states


def walked(name: str) -> dict[str, Any]:
    logging.getLogger("flowstream").setLevel(logging.ERROR)
    with stream_of(name) as stream:
        expected, states = walk(stream, 30)
        scored = sorted(stream.scored)  # type: ignore[attr-defined]
        rate = stream.metrics()["flow/damage_rate"]
    wrong = []
    for number in (6, 7, 16):
        with stream_of(name) as again:
            again.load_state_dict(states[number])
            found, _ = walk(again, len(expected) - number - 1, keeps=False)
            wrong += [
                (number, at, ours, theirs)
                for at, (ours, theirs) in enumerate(zip(found, expected[number + 1 :], strict=True))
                if strip(ours) != strip(theirs)
            ][:1]
    delivered = states[-1]["rehearsal"][0]["delivered"]
    return {"batches": expected, "scored": scored, "wrong": wrong, "damage_rate": rate, "delivered": delivered}


def is_padded(batch: dict[str, Any]) -> bool:
    return not any(batch.get("flow_weight", [1])) and set(batch["labels"]) == {-100}


def strip(batch: dict[str, Any]) -> dict[str, Any]:
    """Without what padded batches, which hold nothing, are made of."""
    told = ("rates", "epoch", "flow_denominator")
    return {key: value for key, value in batch.items() if key in told or not is_padded(batch)}


def all_walked() -> dict[str, Any]:
    return {name: walked(name) for name in CASES}


def test_ranks_rehearse_together():
    outcomes = run_ranks(all_walked, 2)
    assert [str(outcome.error) for outcome in outcomes if outcome.error] == []
    for name, (_, settings) in CASES.items():
        check(*(outcome.result[name] for outcome in outcomes), accumulate=settings.get("accumulate", 1))


def check(one: dict[str, Any], other: dict[str, Any], *, accumulate: int) -> None:
    for rank, found in enumerate((one, other)):
        assert found["wrong"] == []
        assert found["scored"] == list(range(rank, NUM, 2))  # its share, once
        assert found["damage_rate"] == one["damage_rate"]
    pairs = list(zip(one["batches"], other["batches"], strict=True))
    assert all(ours["rates"] == theirs["rates"] for ours, theirs in pairs)
    assert len({tuple(batch["rates"]) for batch in one["batches"]}) > 3
    rehearsed: list[list[int]] = [[], []]
    for pair in pairs:
        kinds = [max(batch["flow_rehearsed"]) >= 0 for batch in pair]
        assert kinds[0] == kinds[1]  # at the same step on both
        for rank, batch in enumerate(pair if kinds[0] else ()):
            rehearsed[rank] += batch["flow_rehearsed"]
            assert batch["id"] == [-1 - i for i in batch["flow_rehearsed"]]
    # Until a bin is through, ranks draw different samples.
    assert not set(rehearsed[0][:16]) & set(rehearsed[1][:16])
    first_epoch = [pair for pair in pairs if pair[0]["epoch"] == 0]
    for first in range(0, len(first_epoch) - accumulate + 1, accumulate):
        step = [batch for pair in first_epoch[first : first + accumulate] for batch in pair]
        labelled = sum(len(batch["id"]) for batch in step if not is_padded(batch))  # a function's samples all are
        assert {batch["flow_denominator"] for batch in step} == {labelled / 2}
    new, old = (one["delivered"][kind] + other["delivered"][kind] for kind in (0, 1))
    assert old / (new + old) == pytest.approx(0.4, abs=0.08)


# -- what is neither lost nor counted twice --------------------------------------------------------


def plain_stream(num: int, group: Any = None, **settings: Any) -> fs.FlowStream:
    """This rank's stream of `num` samples; one bin and one rate, so that draws go through the prior data in turn."""
    scorer = fs.FunctionScorer(lambda batch: batch["loss"], name="by key")
    prior = Shared(torch.arange(NUM, dtype=torch.float32))
    rehearsal = Rehearsal(prior, scorer, bins=1, ratio=0.5, was_correct=always, half_life=None)
    usual: dict[str, Any] = {"window": 4, "cache": None, "timeout": 20.0, "rehearsal": rehearsal}
    usual |= {"temperature": fs.RunningMedian(warmup_samples=32), "process_group": group}
    rank = 0 if group is not None else own_rank()
    return fs.FlowStream(shard(rank, num), scorer, **(usual | settings))


def rehearsed_in(stream: fs.FlowStream, num: int | None = None) -> list[int]:
    """The prior samples of the next `num` deliveries of a new epoch, with feedback on each."""
    found: list[int] = []
    for batch in itertools.islice(stream, num):
        if is_rehearsed(batch):
            found += batch["flow_rehearsed"].tolist()
            stream.feedback(batch, torch.ones(len(batch["id"])))
    return found


def abandoned() -> tuple[int, float]:
    """Epochs that are left after a window's meeting was called: what was told there, and what was counted."""
    with plain_stream(8 * 24) as stream:
        told = sum(len(rehearsed_in(stream, num)) for num in (3, 7, 11, 15))
        next(iter(stream))
        assert stream.rehearsal is not None
        return told, float(stream.rehearsal.counts().sum())


def stopped() -> list[int]:
    """Cost of what a rank delivered, where the other has batches that are never delivered."""
    with plain_stream([64, 8][own_rank()], window=8, on_uneven="stop") as stream:
        for _ in range(30):
            rehearsed_in(stream)
        assert stream.rehearsal is not None
        return stream.rehearsal.ledger.delivered


def taken_over() -> tuple[list[int], list[int], float]:
    """An epoch of one rank, and what the ranks drew together after it; and what they counted of its feedback."""
    with plain_stream(8 * 8, dist.new_subgroups(1)[0]) as alone:
        before = rehearsed_in(alone)
        state = through_a_file(alone.state_dict())
        assert sum(state["rehearsal"][0]["pending"]) > 0
    with plain_stream(8 * 8) as stream:
        stream.load_state_dict(through_a_file(fs.merge_states([state])))
        next(iter(stream))
        assert stream.rehearsal is not None
        counted = float(stream.rehearsal.counts().sum())
        stream.load_state_dict(through_a_file(fs.merge_states([state])))
        return before, rehearsed_in(stream), counted


def all_kept() -> list[Any]:
    logging.getLogger("flowstream").setLevel(logging.ERROR)
    return [abandoned(), stopped(), taken_over()]


def test_nothing_is_lost_or_counted_twice():
    """Feedback of abandoned epochs, compute of batches that are never delivered, a state of another number of ranks."""
    outcomes = run_ranks(all_kept, 2)
    assert [str(outcome.error) for outcome in outcomes if outcome.error] == []
    left, delivered, taken = zip(*(outcome.result for outcome in outcomes), strict=True)
    assert left[0][1] == left[1][1] == left[0][0] + left[1][0] > 100
    new, old = (sum(column) for column in zip(*delivered, strict=True))
    assert old / (new + old) == pytest.approx(0.5, abs=0.05)
    (before, ours, counted), (_, theirs, others_counted) = taken
    assert counted == others_counted == len(before) > 30
    together = [*before, *(i for pair in zip(ours, theirs, strict=True) for i in pair)]
    assert len(together) > NUM
    assert sorted(together[:NUM]) == list(range(NUM))  # each once before one comes again


class Unreadable(Known):
    """Prior samples of which rank 1 cannot read all."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index and own_rank() == 1:
            raise OSError("no such file")
        return super().__getitem__(index)


def told_apart(case: str) -> str:
    """The second rank has prior data, or a question, of its own."""
    is_first = own_rank() == 0
    prior = evenly(90) if is_first or case == "fails" else Known(torch.arange(90.0).flip(0))
    scorer = fs.FunctionScorer(lambda batch: batch["loss"])
    right = right_on_first if case == "fails" else always
    rehearsal = Rehearsal(prior, scorer, bins=3, was_correct=right)
    if case == "unreadable":
        rehearsal = Rehearsal(Unreadable(torch.arange(90.0)), scorer, strategy="random")
    alone = fs.FlowStream(shard(0, 64), scorer, rehearsal=rehearsal, process_group=dist.new_subgroups(1)[0])
    if case == "known before":
        alone._running.rehearsing.prepare(alone._meetings)
    stream = fs.FlowStream(shard(0, 64), scorer, rehearsal=rehearsal, timeout=20.0)
    try:
        next(iter(stream))
    except (OSError, ValueError, fs.RankError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def right_on_first(_: object) -> bool:
    if own_rank() == 1:
        raise ValueError("no such sample")
    return True


def both_told_apart() -> list[str]:
    return [told_apart(case) for case in ("known before", "fails", "unreadable")]


def test_ranks_that_cannot_rehearse_together_say_so():
    outcomes = run_ranks(both_told_apart, 2)
    assert [str(outcome.error) for outcome in outcomes if outcome.error] == []
    (known, failed, unread), (others_known, own_failure, own_unread) = (outcome.result for outcome in outcomes)
    for told in (known, others_known):
        assert "the ranks' prior data differ" in told
    assert "rank 1 cannot prepare its share of the prior data: ValueError: no such sample" in failed
    assert own_failure.startswith("ValueError: no such sample")
    assert "rank 1 cannot prepare its share of the prior data: OSError: no such file" in unread
    assert own_unread.startswith("OSError: no such file")
