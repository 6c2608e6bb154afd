"""Draws of prior samples: proportions of bins, turns within them, ranks apart."""

from __future__ import annotations

import numpy as np
import pytest

from flowstream.rehearsal.bins import partition
from flowstream.rehearsal.draws import Draws

LABELS = ["a"] * 60 + ["b"] * 30 + ["c"] * 10


def draws_of(rank: int = 0, world_size: int = 1, seed: int = 0) -> Draws:
    return Draws(partition(None, LABELS, 1, 100), seed=seed, rank=rank, world_size=world_size)


def test_bins_are_drawn_by_rate_times_size():
    rates = np.array([0.1, 0.2, 0.9])
    drawn = draws_of().bins(40_000, rates, (0, 3))
    expected = rates * [60, 30, 10] / (rates * [60, 30, 10]).sum()
    found = np.bincount(drawn) / len(drawn)
    assert found == pytest.approx(expected, abs=5 * np.sqrt(0.25 / len(drawn)))


def test_draws_follow_from_seed_window_and_rank_alone():
    rates = np.ones(3)
    drawn = draws_of().bins(64, rates, (1, 2))
    assert (draws_of().bins(32, rates, (1, 2)) == drawn[:32]).all()
    for other in (draws_of(seed=1).bins(64, rates, (1, 2)), draws_of().bins(64, rates, (1, 3))):
        assert (other != drawn).any()
    assert (draws_of(1, 2).bins(64, rates, (1, 2)) != drawn).any()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_go_through_a_bin_together_before_a_sample_comes_again(world_size):
    ranks = [draws_of(rank, world_size) for rank in range(world_size)]
    turns = [rank.sample(1, turn) for turn in range(60 // world_size) for rank in ranks]
    assert sorted(turns[:30]) == sorted(turns[30:60]) == list(range(60, 90))
    assert turns[:30] != turns[30:60]


def test_more_ranks_than_samples_take_turns_all_the_same():
    drawn = [draws_of(rank, 25).sample(2, 0) for rank in range(25)]
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(90, 100))
