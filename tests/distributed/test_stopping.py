"""Several ranks that stop together, or refuse to go on; and resampled ones, which always do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from spawned import run_ranks
from uneven import BATCH, STRIDE, WINDOW, delivered, ids_of, losses_of, outcome_of, own_rank, shard

import flowstream as fs
from flowstream.randomness import uniform

Case = tuple[list[int], dict[str, Any]]


def walked(cases: list[Case]) -> list[Any]:
    """What one rank's streams deliver over its shard, one stream after the other; or the error's name and text."""
    return [
        outcome_of(lambda case=case: delivered(shard(own_rank(), case[0][own_rank()]), **case[1])) for case in cases
    ]


def found_by_case(world_size: int, cases: list[Case]) -> list[list[Any]]:
    outcomes = run_ranks(walked, world_size, cases)
    assert [str(outcome.error) for outcome in outcomes if outcome.error] == []
    return list(zip(*(outcome.result for outcome in outcomes), strict=True))


def num_batches(num: int) -> int:
    return -(-num // BATCH)


def check_stopped(sizes: list[int], found: list[dict[str, Any]], expected: int, epoch: int = 0) -> None:
    """In weight mode: the first `expected` batches of every rank, and a warning where samples are left."""
    for rank, one in enumerate(found):
        batches = one["epochs"][epoch]
        assert len(batches) == expected
        assert [i for batch in batches for i in batch["ids"]] == ids_of(rank, sizes[rank])[: expected * BATCH]
        assert [batch["tau"] for batch in batches] == [batch["tau"] for batch in found[0]["epochs"][epoch]]


@pytest.mark.parametrize(
    ("sizes", "accumulate", "expected"),
    [
        ([300, 41, 130, 64], 1, 6),
        ([300, 41, 130, 64], 2, 6),
        ([300, 24, 130, 64], 2, 2),  # of three batches the last makes no step
        ([20, 24, 19, 17], 2, 3),  # all have three: the last step is short on all
        ([300, 7, 130, 64], 2, 0),
        ([300, 0, 130, 64], 1, 0),
    ],
)
def test_weighted_ranks_stop_together_at_the_shortest(sizes, accumulate, expected):
    settings = {
        "on_uneven": "stop",
        "include": ("tau", "denominator"),
        "accumulate": accumulate,
        "num_epochs": 2,
        "temperature": fs.RunningMedian(warmup_samples=64),
    }
    (found,) = found_by_case(4, [(sizes, settings)])
    for epoch in range(2):
        check_stopped(sizes, found, expected, epoch)
    for rank, one in enumerate(found):
        if num_batches(sizes[rank]) > num_batches(min(sizes)):
            assert any("have no more batches" in text for text in one["told"])
        assert one["metrics"]["flow/padded_batches"] == 0


def test_a_warning_says_how_many_samples_were_left():
    """The first window, which is to warm τ, has taken all."""
    (found,) = found_by_case(2, [([50, 24], {"on_uneven": "stop"})])
    assert [len(one["epochs"][0]) for one in found] == [3, 3]
    (text,) = found[0]["told"]
    assert "epoch 0 ends on all ranks, since ranks [1] have no more batches" in text
    assert "26 samples that rank 0 has read are left out" in text
    assert found[1]["told"] == []


@pytest.mark.parametrize("mode", ["weight", "resample"])
def test_uneven_ranks_are_refused_on_all_where_that_is_asked_for(mode):
    settings = {"on_uneven": "raise", "mode": mode, "include": ("tau",)}
    even = {"weight": [64, 64, 64], "resample": []}[mode]
    cases = [([300, 41, 130], settings), ([300, 0, 130], settings), *([(even, settings)] if even else [])]
    found = found_by_case(3, cases)
    for case in found[:2]:
        assert [one[0] for one in case] == ["UnevenError"] * 3
        assert len({one[1] for one in case}) == 1
    if even:
        assert [len(one["epochs"][0]) for one in found[2]] == [8, 8, 8]


# Resampled.

RESAMPLED = {"mode": "resample", "include": ("tau", "weight", "index")}


def expected_draws(one: dict[str, Any], rank: int, num: int, *, seed: int = 0) -> list[int]:
    """Ids that `Thin` keeps of the windows known to have delivered something, by its formula, in plain numpy."""
    kept: list[int] = []
    windows = {batch["window"]: batch for batch in one["epochs"][0] if batch["window"] is not None}
    for number, batch in windows.items():
        start, end = (BATCH * at for at in (batch["first_ordinal"], batch["first_ordinal"] + batch["num_taken"]))
        losses = losses_of(rank, num)[start:end].double().numpy()
        weights = np.exp(-losses / float.fromhex(batch["tau"]))
        running = np.concatenate([[0.0], np.cumsum(weights)]) + uniform((seed, 0, number, rank))
        copies = np.diff(np.floor(running))
        kept += (np.flatnonzero(copies) + start + STRIDE * rank).tolist()
    return kept


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_resampled_ranks_stop_together_and_deliver_what_thin_keeps_of_each_ones_shard(world_size):
    sizes = [[700, 420, 300, 530, 600, 1200, 350, 900][i] for i in range(world_size)]
    cases = [
        (sizes, RESAMPLED | {"temperature": fs.RunningMedian(warmup_samples=64)}),
        (sizes, RESAMPLED | {"temperature": fs.RunningMedian(warmup_samples=64), "accumulate": 2}),
        (sizes, RESAMPLED | {"temperature": fs.RunningMedian(warmup_samples=64), "seed": 1}),
        (sizes, RESAMPLED | {"temperature": fs.FixedTemperature(1.0)}),
    ]
    results = found_by_case(world_size, cases)
    for (_, settings), found in zip(cases, results, strict=True):
        num = len(found[0]["epochs"][0])
        assert num > WINDOW
        for rank, one in enumerate(found):
            batches = one["epochs"][0]
            assert len(batches) == num
            if "accumulate" in settings:
                assert num % 2 == 0
            assert [batch["tau"] for batch in batches] == [batch["tau"] for batch in found[0]["epochs"][0]]
            ids = [i for batch in batches for i in batch["ids"]]
            expected = expected_draws(one, rank, sizes[rank], seed=settings.get("seed", 0))
            assert len(expected) >= (num - 1) * BATCH
            assert all(ours == theirs for ours, theirs in zip(ids, expected, strict=False))
            assert len(set(ids)) == len(ids)
            assert all(len(batch["ids"]) == BATCH for batch in batches[:-1])
        check_taus(sizes, settings["temperature"], found)
    assert [one["epochs"] for one in results[0]] != [one["epochs"] for one in results[2]]


def check_taus(sizes: list[int], spec: Any, found: list[dict[str, Any]]) -> None:
    """Each window's τ against all candidates of all ranks before it; the first window's: those of its first chunk."""
    if isinstance(spec, fs.FixedTemperature):
        return
    for number, batch in enumerate(found[0]["epochs"][0][:-1]):
        if batch["window"] == 0:  # at a mean weight of .4 a window's rows need so many candidates
            ends = [math.ceil(WINDOW / 0.4)] * len(sizes)
        else:
            ends = [one["epochs"][0][number]["first_ordinal"] for one in found]
        union = [losses_of(rank, num)[: BATCH * end] for rank, (num, end) in enumerate(zip(sizes, ends, strict=True))]
        assert float.fromhex(batch["tau"]) == pytest.approx(np.median(np.concatenate(union)), rel=0.002)


def walked_alike(num: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Every rank has the same losses, under ids of its own."""
    return delivered(shard(own_rank(), num, losses=losses_of(0, num)), **settings)


def test_ranks_with_equal_losses_draw_differently():
    outcomes = run_ranks(walked_alike, 4, 600, RESAMPLED | {"num_epochs": 2})
    drawn = []
    for rank, outcome in enumerate(outcomes):
        for epoch in outcome.result["epochs"]:
            drawn.append([i - STRIDE * rank for batch in epoch for i in batch["ids"]])
    assert all(drawn)
    assert len({tuple(one) for one in drawn}) == 8


def test_a_fixed_number_of_samples_is_drawn_on_every_rank():
    sizes = [700, 420, 300, 530]
    settings = RESAMPLED | {"mode": fs.Systematic(2.0), "num_epochs": 2}
    window = settings | {"temperature": fs.WindowMedian()}
    for found in found_by_case(4, [(sizes, settings), (sizes, window)]):
        for epoch in range(2):
            taus = [[batch["tau"] for batch in one["epochs"][epoch]] for one in found]
            assert all(own == taus[0] for own in taus)
            assert len(taus[0]) > WINDOW
            for rank, one in enumerate(found):
                ids = [i for batch in one["epochs"][epoch] for i in batch["ids"]]
                assert set(ids) <= set(ids_of(rank, sizes[rank]))


def test_with_an_empty_shard_resampled_ranks_have_an_epoch_of_no_batches():
    (found,) = found_by_case(4, [([300, 0, 200, 100], RESAMPLED | {"num_epochs": 2})])
    for rank, one in enumerate(found):
        assert one["epochs"] == [[], []]
        assert any("ranks [1] have no more batches" in text for text in one["told"]) == (rank != 1)
