"""Samplers: exact laws of a draw, and, over many seeds, what windows deliver from a stream sorted by difficulty."""

import doctest
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from flowstream import samplers
from flowstream.randomness import uniform
from flowstream.samplers import Systematic, Thin, chunk_size

no_deadline = settings(deadline=None)
BELOW_ONE = math.nextafter(1.0, 0.0)
unit = npst.arrays(np.float64, st.integers(0, 60), elements=st.floats(0, 1))
heavy = npst.arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 1e6))
us = st.one_of(st.floats(0, 1, exclude_max=True), st.just(BELOW_ONE))


def test_docstring_examples_run():
    assert doctest.testmod(samplers).failed == 0


# Thin: a draw


@no_deadline
@given(unit, us, st.floats(0.01, 1.0))
def test_thin_delivers_a_sample_at_most_once_for_scales_up_to_one(weights, u, scale):
    copies, _ = Thin(scale).draw(weights, 0.0, u)
    assert copies.dtype == np.int64
    assert set(copies.tolist()) <= {0, 1}


def test_thin_repeats_nothing_where_plain_float_sums_would():
    weights = np.ones(5)
    naive = np.diff(np.floor(np.concatenate([[0.0], np.cumsum(weights)]) + BELOW_ONE))
    assert naive.max() == 2
    copies, end = Thin().draw(weights, 0.0, BELOW_ONE)
    assert copies.tolist() == [1, 1, 1, 1, 1]
    assert end == 5.0


@no_deadline
@given(heavy, us, st.floats(0.01, 3.0), st.data())
def test_thin_draws_the_same_however_candidates_are_chunked(weights, u, scale, data):
    whole, end = Thin(scale).draw(weights, 0.0, u)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(weights)), max_size=6)))
    parts, running = [], 0.0
    for chunk in np.split(weights, cuts):
        copies, running = Thin(scale).draw(chunk, running, u)
        parts.append(copies)
    assert np.concatenate(parts).tolist() == whole.tolist()
    assert running == end


@no_deadline
@given(unit, us, st.floats(0.01, 5.0))
def test_thin_keeps_floor_or_ceiling_of_the_mass_of_any_run_of_candidates(weights, u, scale):
    copies, end = Thin(scale).draw(weights, 0.0, u)
    assert end == pytest.approx(scale * weights.sum(), abs=1e-8)
    assert abs(copies.sum() - end) < 1
    assert (np.abs(np.cumsum(copies) - np.cumsum(scale * weights)) < 1 + 1e-8).all()


@no_deadline
@given(unit, st.floats(0.1, 3.0))
def test_thin_gives_each_candidate_its_weight_in_expectation(weights, scale):
    """The mean over u of an even grid: exact up to the grid, whatever the candidate."""
    num = 512
    mean = sum(Thin(scale).draw(weights, 0.0, k / num)[0] for k in range(num)) / num
    np.testing.assert_allclose(mean, scale * weights, atol=1.01 / num)


@no_deadline
@given(unit, us, st.integers(0, 30))
def test_thin_that_says_enough_has_enough_whatever_u(weights, u, wanted):
    copies, end = Thin().draw(weights, 0.0, u)
    if Thin().enough(end, wanted):
        assert copies.sum() >= wanted
    assert Thin().enough(end, wanted) == (math.floor(end) >= wanted)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_thin_refuses_a_scale_that_is_not_above_zero(scale):
    with pytest.raises(ValueError, match="finite number above 0"):
        Thin(scale)


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_draws_refuse_weights_that_are_no_weights(bad):
    for draw in (lambda w: Thin().draw(w, 0.0, 0.5), lambda w: Systematic().draw(w, 1, 0.5)):
        with pytest.raises(ValueError, match=rf"weight {bad} of sample 1 of the chunk"):
            draw([0.5, bad])
        with pytest.raises(ValueError, match=r"shape \[2, 1\]; resampling is by sample"):
            draw([[0.5], [0.5]])


@pytest.mark.parametrize("u", [1.0, -0.1, math.nan])
def test_draws_refuse_u_outside_its_range(u):
    with pytest.raises(ValueError, match=r"a number in \[0, 1\)"):
        Thin().draw([0.5], 0.0, u)
    with pytest.raises(ValueError, match=r"a number in \[0, 1\)"):
        Systematic().draw([0.5], 1, u)


# Systematic: a draw


@no_deadline
@given(heavy, us, st.integers(0, 40))
def test_systematic_draws_exactly_the_number_within_one_of_its_expectation(weights, u, num):
    if not weights.any():
        weights = weights + 1.0
    copies = Systematic().draw(weights, num, u)
    assert copies.sum() == num
    assert (copies >= 0).all()
    assert (copies[weights == 0] == 0).all()
    assert (np.abs(copies - num * weights / weights.sum()) < 1 + 1e-6).all()


def test_systematic_is_robust_to_scale_and_rounding():
    weights = np.exp(-np.linspace(0, 30, 1000))
    reference = Systematic().draw(weights, 300, 0.25)
    for factor in (1e-300, 1e300, 2.0**-1022):
        copies = Systematic().draw(weights * factor, 300, 0.25)
        assert copies.sum() == 300
        assert abs(copies - reference).sum() <= 2
    assert Systematic().draw([5e-324, 0.0], 3, BELOW_ONE).tolist() == [3, 0]


def test_systematic_refuses_a_window_without_weight():
    with pytest.raises(ValueError, match="all 3 weights of the window are 0, so 2 samples cannot be drawn"):
        Systematic().draw(np.zeros(3), 2, 0.5)
    assert Systematic().draw(np.zeros(3), 0, 0.5).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="num is -1"):
        Systematic().draw(np.ones(3), -1, 0.5)


def test_systematic_counts_its_candidates():
    assert Systematic(2.5).num_candidates(3) == 8
    for oversample in (0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="finite number of 1 or above"):
            Systematic(oversample)


# Chunks


@no_deadline
@given(st.floats(0, 1e9), st.floats(1e-9, 10), st.integers(1, 512), st.floats(0.5, 3), st.integers(1, 1000))
def test_chunk_is_the_least_that_brings_the_missing_mass(missing, mean, batch_size, margin, limit):
    num = chunk_size(missing, mean, batch_size, margin=margin, limit=limit)
    assert 1 <= num <= limit
    if num < limit:
        assert num * batch_size * mean >= margin * missing * (1 - 1e-9)
    if num > 1:
        assert (num - 1) * batch_size * mean <= margin * missing * (1 + 1e-9)


def test_chunk_without_a_mean_is_the_limit_and_never_nothing():
    for mean in (0.0, math.nan, -1.0, 1e-320):
        assert chunk_size(5.0, mean, 8, margin=1.0, limit=7) == 7
    assert chunk_size(0.0, 0.0, 8, margin=1.0, limit=7) == 1
    assert chunk_size(-3.0, 0.4, 8, margin=1.0, limit=7) == 1
    assert chunk_size(5.0, math.inf, 8, margin=1.0, limit=7) == 1
    with pytest.raises(ValueError, match="batch_size 0 and limit 7"):
        chunk_size(5.0, 0.4, 0, margin=1.0, limit=7)


# Windows over a stream sorted by difficulty


def sorted_losses(num):
    """Half-normal losses in rising order: FLOW then gives the hard half 22 % of the mass."""
    normal = np.random.default_rng(0).standard_normal(num)
    return np.sort(np.abs(normal))


def thinned(weights, seed, *, batch_size, wanted, stop_by_count=False):
    """How often each candidate was delivered: whole batches are pulled until a window is full, leftovers carried."""
    sampler, batches = Thin(), np.array_split(np.arange(len(weights)), len(weights) // batch_size)
    emitted, carry, window, position = [], [], 0, 0
    while position < len(batches):
        u, end = uniform((seed, 0, window, 0)), 0.0
        need, pool = wanted - len(carry), list(carry)
        mean = weights[: batches[position][0] + 1].mean()
        while position < len(batches):
            full = len(pool) >= wanted if stop_by_count else sampler.enough(end, need)
            if full:
                break
            num = 1 if stop_by_count else chunk_size(need - end, mean, batch_size, margin=1.0, limit=4)
            chunk = np.concatenate(batches[position : position + num])
            copies, end = sampler.draw(weights[chunk], end, u)
            pool.extend(np.repeat(chunk, copies).tolist())
            position += num
        emitted.extend(pool[:wanted])
        carry, window = pool[wanted:], window + 1
    return np.bincount(emitted + carry, minlength=len(weights))


def statistics(losses):
    """Several functions of a sample, [k, n]: what is summed over the samples delivered."""
    position = np.arange(len(losses))
    hard = losses >= np.median(losses)
    return np.stack([np.ones_like(losses), losses, losses**2, hard, position % 2, np.sin(position), losses > 2.0])


NUM_SEEDS = 1500


def test_thin_is_unbiased_for_every_statistic_over_a_stream_sorted_by_difficulty():
    losses = sorted_losses(400)
    weights, g = np.exp(-losses / np.median(losses)), statistics(losses)
    copies = np.stack([thinned(weights, seed, batch_size=4, wanted=8) for seed in range(NUM_SEEDS)])
    assert copies.max() == 1
    sums = copies @ g.T
    z = (sums.mean(0) - g @ weights) / (sums.std(0, ddof=1) / math.sqrt(NUM_SEEDS))
    assert abs(z).max() < 4.0, z
    per_sample = (copies.mean(0) - weights) / np.sqrt(weights * (1 - weights) / NUM_SEEDS)
    assert abs(per_sample).max() < 4.5, "the largest of 400"
    assert ((per_sample**2).mean() - 1) < 5 * math.sqrt(2 / 400)


@pytest.mark.soak
def test_stopping_by_the_realised_count_would_be_biased():
    losses = sorted_losses(400)
    weights, g = np.exp(-losses / np.median(losses)), statistics(losses)
    hard = 3
    excess = {}
    for by_count in (False, True):
        runs = [thinned(weights, s, batch_size=1, wanted=2, stop_by_count=by_count) for s in range(250)]
        sums = np.stack(runs) @ g[hard]
        error = sums.std(ddof=1) / math.sqrt(len(runs))
        excess[by_count] = (sums.mean() - g[hard] @ weights) / error, sums.mean() / (g[hard] @ weights)
    assert abs(excess[False][0]) < 4.0
    assert excess[True][0] > 10.0
    assert excess[True][1] > 1.1, "the hard half is over-represented by more than a tenth"


def test_systematic_gives_the_hard_half_of_a_sorted_stream_half_of_the_mass():
    """FACTS §2: 22 % by FLOW, and by Thin, where a fixed count a window gives 50 %."""
    losses = sorted_losses(8192)
    weights = np.exp(-losses / np.median(losses))
    hard = losses >= np.median(losses)
    assert weights[hard].sum() / weights.sum() == pytest.approx(0.22, abs=0.015)
    thin = thinned(weights, 0, batch_size=8, wanted=64)
    assert thin[hard].sum() / thin.sum() == pytest.approx(0.22, abs=0.02)
    sampler, num = Systematic(oversample=4.0), 64
    candidates = np.split(np.arange(len(weights)), len(weights) // (int(sampler.oversample) * num))
    copies = [sampler.draw(weights[c], num, uniform((0, 0, w, 0))) for w, c in enumerate(candidates)]
    assert np.concatenate(copies)[hard].sum() / np.concatenate(copies).sum() == pytest.approx(0.50, abs=0.001)


def test_what_thin_delivers_is_a_pure_function_of_losses_tau_and_seed():
    losses = sorted_losses(200)
    weights = np.exp(-losses / np.median(losses))
    once, again, other = (thinned(weights, seed, batch_size=4, wanted=8) for seed in (3, 3, 4))
    assert once.tolist() == again.tolist()
    assert once.tolist() != other.tolist()
