"""Sums of weights against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowstream.metrics import WeightSums, ess_fraction

ROWS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 50)), max_size=40)


def sums_of(rows):
    return WeightSums.of([w for w, _ in rows], [n for _, n in rows])


def test_sums_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    weights, counts = rng.random(100), rng.integers(1, 30, 100)
    sums = WeightSums.of(torch.tensor(weights), torch.tensor(counts))
    assert sums.mean_weight == pytest.approx(np.mean(weights))
    assert sums.token_mean_weight == pytest.approx(np.average(weights, weights=counts))
    assert sums.ess == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / 100)
    assert (sums.num, sums.num_tokens) == (100, counts.sum())


def test_one_each_is_counted_where_no_counts_are_given():
    assert WeightSums.of([0.5, 1.0]) == WeightSums.of([0.5, 1.0], [1, 1])


@given(ROWS, ROWS, ROWS)
@settings(deadline=None)
def test_parts_add_up_to_the_whole(a, b, c):
    whole = sums_of([*a, *b, *c]).state_dict()
    parts = (sums_of(a) + sums_of(b) + sums_of(c)).state_dict()
    assert parts == pytest.approx(whole)


def test_ess_of_ranks_is_not_the_mean_of_their_fractions():
    ranks = [WeightSums.of([1.0] * 8), WeightSums.of([0.1] * 8)]
    assert [rank.ess for rank in ranks] == pytest.approx([1.0, 1.0])
    weights = np.repeat([1.0, 0.1], 8)
    assert (ranks[0] + ranks[1]).ess == pytest.approx(weights.sum() ** 2 / (16 * (weights**2).sum()))


@given(ROWS)
@settings(deadline=None)
def test_ess_lies_between_the_share_of_one_sample_and_one(rows):
    sums = sums_of(rows)
    assert np.isnan(sums.ess) or 1 / sums.num - 1e-9 <= sums.ess <= 1


def test_ess_of_equal_weights_is_one_and_of_a_single_one_its_share():
    assert ess_fraction(4 * 0.3, 4 * 0.09, 4) == pytest.approx(1)
    assert ess_fraction(1, 1, 10) == pytest.approx(0.1)


def test_samples_without_a_label_are_counted_apart():
    sums = WeightSums.of([0.5, float("nan"), 1.0], [3, 0, 1])
    assert sums == WeightSums(num=2, total=1.5, total_squares=1.25, num_tokens=4, token_total=2.5, empty=1)
    assert (sums + WeightSums(nonfinite=2)).nonfinite == 2


def test_nothing_seen_gives_nan():
    assert np.isnan([WeightSums().mean_weight, WeightSums().token_mean_weight, WeightSums().ess]).all()
    assert np.isnan(WeightSums.of([0.0, 0.0]).ess)
    assert WeightSums.of([0.0, 0.0]).mean_weight == 0


@given(ROWS)
@settings(deadline=None)
def test_state_round_trip_is_exact(rows):
    sums = sums_of(rows)
    assert all(type(value) is float for value in sums.state_dict().values())
    assert WeightSums.from_state_dict(sums.state_dict()) == sums


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="2 weights and 1 counts"):
        WeightSums.of([1.0, 1.0], [1])
    with pytest.raises(ValueError, match="got nan among 2"):
        WeightSums.of([1.0, float("nan")])
    with pytest.raises(ValueError, match=r"got -1\.0"):
        WeightSums.of([-1.0])
    with pytest.raises(ValueError, match="needs"):
        WeightSums.from_state_dict({"num": 1.0})
