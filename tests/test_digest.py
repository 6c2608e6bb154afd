"""The digest against numpy, the `tdigest` package and closed forms."""

from __future__ import annotations

import io
import itertools
import random
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowstream.centroids import compressed
from flowstream.digest import Digest
from flowstream.digest_message import MAX_PAIRS, MAX_VALUES

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)
SHARES = st.floats(0, 1)


def digest_of(values, max_centroids=500, batch=64, weights=None):
    digest = Digest(max_centroids)
    for start in range(0, len(values), batch):
        part = slice(start, start + batch)
        digest.add(values[part], None if weights is None else weights[part])
    return digest


def draw(name, size, seed=0):
    rng = np.random.default_rng(seed)
    if name == "lognormal":
        return rng.lognormal(size=size)
    if name == "gamma":
        return rng.gamma(2.0, size=size)
    if name == "pareto":
        return 1 + rng.pareto(1.5, size=size)
    low = rng.random(size) < 0.6
    return np.where(low, rng.normal(1, 0.1, size), rng.normal(10, 0.1, size))


def weighted_median(values, weights):
    order = np.argsort(values)
    middles = np.cumsum(weights[order]) - 0.5 * weights[order]
    return np.interp(0.5 * weights.sum(), middles, values[order])


LAWS = ["lognormal", "gamma", "pareto", "bimodal"]


# -- accuracy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
def test_median_of_a_million_is_within_a_thousandth(law):
    values = draw(law, 10**6)
    assert digest_of(values).quantile(0.5) == pytest.approx(np.median(values), rel=1e-3)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("q", [0.05, 0.25, 0.75, 0.95])
def test_other_quantiles_have_small_rank_error(law, q):
    values = draw(law, 200_000)
    rank = np.mean(values <= digest_of(values, batch=4096).quantile(q))
    assert rank == pytest.approx(q, abs=1e-3)


@pytest.mark.parametrize("law", LAWS)
def test_median_of_64_merged_digests_is_within_two_thousandths(law):
    values = draw(law, 640_000)
    merged = Digest.merged([Digest.from_bytes(digest_of(part).to_bytes()) for part in np.split(values, 64)])
    assert merged.quantile(0.5) == pytest.approx(np.median(values), rel=2e-3)
    assert merged.num_values == values.size
    assert merged.total_weight == pytest.approx(values.size)


@pytest.mark.parametrize("order", ["ascending", "descending", "drifting"])
def test_order_of_the_stream_does_not_hurt(order):
    values = np.sort(draw("lognormal", 200_000))
    if order == "descending":
        values = values[::-1]
    if order == "drifting":
        values = np.linspace(0.5, 2, values.size) * np.random.default_rng(0).permutation(values)
    assert digest_of(values).quantile(0.5) == pytest.approx(np.median(values), rel=2e-3)


def test_median_is_no_worse_than_the_tdigest_package():
    tdigest = pytest.importorskip("tdigest")
    errors = {"package": [], 500: [], 2000: []}
    state = random.getstate()
    random.seed(0)
    for law in LAWS:
        values = draw(law, 20_000)
        package = tdigest.TDigest()
        package.batch_update(values)
        errors["package"].append(abs(package.percentile(50) / np.median(values) - 1))
        for size in (500, 2000):
            errors[size].append(abs(digest_of(values, size).quantile(0.5) / np.median(values) - 1))
    random.setstate(state)
    # The package keeps about 980 centroids here. A running temperature keeps 2000.
    assert np.mean(errors[2000]) <= np.mean(errors["package"])
    assert np.mean(errors[500]) <= 1.5 * np.mean(errors["package"])


def test_half_life_gives_the_exactly_decayed_median():
    values = np.linspace(1, 3, 100_000) * draw("lognormal", 100_000)
    half_life, window = 10_000, 250
    digest = Digest()
    ages_within = np.arange(window)[::-1]
    for start in range(0, values.size, window):
        digest.scale(2.0 ** (-window / half_life))
        digest.add(values[start : start + window], 2.0 ** (-ages_within / half_life))
    weights = 2.0 ** (-np.arange(values.size)[::-1] / half_life)
    assert digest.quantile(0.5) == pytest.approx(weighted_median(values, weights), rel=2e-3)
    assert digest.total_weight == pytest.approx(weights.sum())
    assert digest.effective_size == pytest.approx(weights.sum() ** 2 / (weights**2).sum())


def test_median_is_exact_in_the_upper_and_lower_mode_of_a_distribution_with_a_gap():
    rng = np.random.default_rng(0)
    for share in (0.45, 0.55):
        low = rng.random(200_000) < share
        values = np.where(low, rng.uniform(0.9, 1.1, low.size), rng.uniform(99.9, 100.1, low.size))
        assert digest_of(values).quantile(0.5) == pytest.approx(np.median(values), rel=1e-3)


@pytest.mark.parametrize(("share", "expected"), [(0.6, 0.0), (0.3, None)])
def test_atom_of_equal_values_stays_an_atom(share, expected):
    rng = np.random.default_rng(0)
    values = np.where(rng.random(200_000) < share, 0.0, 1 + rng.random(200_000))
    digest = digest_of(values)
    exact = np.median(values) if expected is None else expected
    assert digest.quantile(0.5) == pytest.approx(exact, rel=1e-3)
    assert digest.cdf(0.0) == pytest.approx(share, abs=5e-3)
    assert digest.quantile(share / 2) == 0.0


def test_all_values_equal():
    digest = digest_of(np.full(50_000, 0.1))
    assert [digest.quantile(q) for q in (0, 0.3, 0.5, 1)] == [0.1] * 4
    assert digest.standard_error(0.5) == 0


# -- laws ------------------------------------------------------------------------------------------


@given(VALUES, SHARES)
@settings(deadline=None)
def test_few_values_give_numpys_quantiles(values, q):
    digest = digest_of(values, batch=7)
    assert digest.quantile(q) == pytest.approx(np.quantile(values, q), rel=1e-9, abs=1e-6)
    assert digest.quantile(0.5) == pytest.approx(np.median(values), rel=1e-12, abs=1e-9)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 499, 500])
def test_median_is_numpys_until_there_are_more_values_than_centroids(size):
    values = draw("lognormal", size).astype(np.float32).astype(np.float64)
    assert digest_of(values).quantile(0.5) == pytest.approx(np.median(values), rel=1e-12)
    assert Digest.from_bytes(digest_of(values).to_bytes()).quantile(0.5) == pytest.approx(np.median(values), rel=1e-12)


@given(st.lists(VALUES, min_size=1, max_size=12), st.lists(SHARES, min_size=2, max_size=8))
@settings(deadline=None)
def test_quantiles_are_monotone_and_within_the_values(parts, shares):
    digest = Digest(8)
    for part in parts:
        digest.add(part)
    quantiles = [digest.quantile(q) for q in sorted([*shares, 0.0, 1.0])]
    assert quantiles == sorted(quantiles)
    assert quantiles[0] == digest.minimum == min(min(part) for part in parts)
    assert quantiles[-1] == digest.maximum == max(max(part) for part in parts)
    assert (np.diff(digest.means) >= 0).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 3000), st.floats(0.01, 0.99))
@settings(deadline=None)
def test_cdf_is_the_inverse_of_quantile(seed, size, q):
    digest = digest_of(draw("gamma", size, seed))
    if size > 1:
        assert digest.cdf(digest.quantile(q)) == pytest.approx(q, abs=1e-9)
    assert digest.cdf(digest.minimum - 1) == 0
    assert digest.cdf(digest.maximum) == 1


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 9000), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_weight_is_conserved_and_centroids_are_bounded(seed, sizes):
    rng = np.random.default_rng(seed)
    digest, total = Digest(100), 0.0
    for size in sizes:
        weights = rng.random(size)
        digest.add(rng.lognormal(size=size), weights)
        total += weights.sum()
    assert digest.total_weight == pytest.approx(total)
    assert digest.means.size <= 100
    assert digest.num_values == sum(sizes)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 4000), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_how_values_are_cut_into_calls_does_not_matter(seed, sizes):
    values = draw("lognormal", sum(sizes), seed)
    at_once, cut = Digest(), Digest()
    at_once.add(values)
    for part in np.split(values, np.cumsum(sizes)[:-1]):
        cut.add(part)
    assert cut.to_bytes() == at_once.to_bytes()


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 3000), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_merging_in_one_order_gives_one_result(seed, sizes):
    digests = [digest_of(draw("gamma", size, seed + k)) for k, size in enumerate(sizes)]
    messages = [digest.to_bytes() for digest in digests]
    merged = Digest.merged(digests)
    on_one, on_another = (Digest.merged([Digest.from_bytes(message) for message in messages]) for _ in range(2))
    assert on_one.to_bytes() == on_another.to_bytes()
    assert on_one.quantile(0.5) == pytest.approx(merged.quantile(0.5), rel=1e-6, nan_ok=True)
    assert [digest.to_bytes() for digest in digests] == messages
    one_by_one = Digest()
    for digest in digests:
        one_by_one.merge(digest)
    assert one_by_one.num_values == merged.num_values == sum(sizes)
    assert one_by_one.total_weight == pytest.approx(merged.total_weight)
    if sum(sizes) > 2000:
        assert one_by_one.cdf(merged.quantile(0.5)) == pytest.approx(0.5, abs=5e-3)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 3000), max_size=6), st.sampled_from([8, 2000]), SHARES)
@settings(max_examples=50, deadline=None)
def test_merging_is_a_stable_sort_and_one_compression(seed, sizes, max_centroids, share_of_atoms):
    rng = np.random.default_rng(seed)
    digests = [Digest(8)]
    for size in sizes:
        # Ties within and between ranks, both zeros, negative values, and weights that tell their order.
        values = rng.normal(size=size) * 10 ** rng.uniform(-3, 3)
        atoms = rng.choice([-1.0, -0.0, 0.0, 2.0], size)
        values = np.where(rng.random(size) < share_of_atoms, atoms, values)
        digests.append(digest_of(values, weights=rng.random(size)))
    merged = Digest.merged(digests, max_centroids)
    means, weights = (np.concatenate([getattr(one, name) for one in digests]) for name in ("means", "weights"))
    expected = compressed(means, weights, max_centroids)
    assert np.array_equal(merged.means, expected[0])
    assert np.array_equal(merged.weights, expected[1])


def received(values, max_centroids=MAX_VALUES):
    return Digest.from_bytes(digest_of(values, max_centroids).to_bytes())


@pytest.mark.parametrize("world_size", [2, 8, 64])
def test_median_over_unlike_ranks_is_within_two_thousandths(world_size):
    rng = np.random.default_rng(0)
    shards = [10 ** rng.uniform(-1, 1) * rng.lognormal(size=rng.integers(0, 4096)) for _ in range(world_size)]
    merged = Digest.merged([received(shard) for shard in shards])
    assert merged.quantile(0.5) == pytest.approx(np.median(np.concatenate(shards)), rel=2e-3)


@pytest.mark.parametrize("size", [1, 240, 1999, 2000])
def test_ranks_of_up_to_2000_float32_values_merge_to_the_exact_median(size):
    shards = [draw("bimodal", size, seed).astype(np.float32) for seed in range(8)]
    merged = Digest.merged([received(shard) for shard in shards], 16_000)
    assert merged.quantile(0.5) == np.median(np.concatenate(shards).astype(np.float64))
    assert np.array_equal(merged.means, np.sort(np.concatenate(shards)))


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 3000), min_size=2, max_size=6))
@settings(max_examples=30, deadline=None)
def test_reading_and_reloading_in_between_change_nothing_later(seed, sizes):
    undisturbed, disturbed = Digest(), Digest()
    for k, size in enumerate(sizes):
        values = draw("lognormal", size, seed + k)
        undisturbed.add(values)
        disturbed.add(values)
        undisturbed.scale(0.9)
        disturbed.quantile(0.5)
        disturbed.to_bytes()
        disturbed.standard_error(0.5)
        disturbed = disturbed.copy()
        disturbed.scale(0.9)
        disturbed = Digest.from_state_dict(disturbed.state_dict())
    assert disturbed.to_bytes() == undisturbed.to_bytes()
    assert disturbed.quantile(0.5) == undisturbed.quantile(0.5) or not sum(sizes)


@given(st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_scaling_changes_weights_only(factor):
    digest = digest_of(draw("gamma", 5000))
    scaled = digest.copy()
    scaled.scale(factor)
    assert scaled.total_weight == pytest.approx(factor * digest.total_weight)
    assert scaled.effective_size == pytest.approx(digest.effective_size)
    assert scaled.quantile(0.3) == pytest.approx(digest.quantile(0.3))


def test_past_that_decayed_to_nothing_is_gone():
    digest = digest_of(draw("gamma", 5000))
    for _ in range(3):
        digest.scale(1e-150)
    assert digest.total_weight == 0
    assert np.isnan(digest.quantile(0.5))
    digest.add([3.0])
    assert digest.quantile(0.5) == 3.0


@pytest.mark.parametrize("focus", [0.3, 0.5])
def test_digest_of_some_thousand_values_is_twice_as_exact_where_it_is_focused(focus):
    errors = {None: [], focus: []}
    for law, seed in itertools.product(LAWS, range(5)):
        values = draw(law, 6000, seed)
        for where, found in errors.items():
            digest = Digest(2000, where)
            for part in np.split(values, 12):
                digest.add(part)
                digest.compress()
            found.append(abs(digest.quantile(focus) / np.quantile(values, focus) - 1))
    assert np.mean(errors[focus]) < 0.5 * np.mean(errors[None])


@pytest.mark.parametrize("focus", [0.0, 0.02, 0.5, 1.0])
def test_focused_digest_is_as_small_and_reads_all_quantiles(focus):
    values = draw("gamma", 50_000)
    digest = Digest(500, focus)
    digest.add(values)
    assert digest.means.size <= 500
    assert digest.total_weight == pytest.approx(values.size)
    for q in (0.01, 0.25, 0.5, 0.75, 0.99):
        assert np.mean(values <= digest.quantile(q)) == pytest.approx(q, abs=1e-3)


# -- error -----------------------------------------------------------------------------------------


def test_density_and_standard_error_are_those_of_the_normal_law():
    size = 100_000
    digest = digest_of(np.random.default_rng(0).normal(size=size))
    for q in (0.25, 0.5, 0.9):
        density = NormalDist().pdf(NormalDist().inv_cdf(q))
        assert digest.density(q) == pytest.approx(density, rel=0.05)
        assert digest.standard_error(q) == pytest.approx(np.sqrt(q * (1 - q) / size) / density, rel=0.05)


# -- travel ----------------------------------------------------------------------------------------


def test_state_is_loadable_with_weights_only():
    digest = Digest(500, 0.3)
    digest.add(draw("gamma", 4321))
    file = io.BytesIO()
    torch.save(digest.state_dict(), file)
    file.seek(0)
    loaded = Digest.from_state_dict(torch.load(file, weights_only=True))
    assert loaded.to_bytes() == digest.to_bytes()
    assert loaded.focus == 0.3


def test_state_does_not_follow_the_digest_it_came_from():
    digest = digest_of(draw("gamma", 100))
    state, message = digest.state_dict(), digest.to_bytes()
    digest.add(draw("gamma", 5000))
    digest.scale(0.5)
    assert Digest.from_state_dict(state).to_bytes() == message


@pytest.mark.parametrize("max_centroids", [8, 500, 2000])
@pytest.mark.parametrize("size", [0, 1, 500, 1500, 2000, 2001, 50_000])
def test_message_is_of_one_length_and_reads_the_same(size, max_centroids):
    digest = digest_of(draw("pareto", size), max_centroids)
    message = digest.to_bytes()
    assert len(message) == Digest.num_bytes() <= 12_288
    read = Digest.from_bytes(message)
    assert read.to_bytes() == message
    assert read.max_centroids == max_centroids
    for name in ("num_values", "total_weight", "minimum", "maximum", "effective_size"):
        assert getattr(read, name) == pytest.approx(getattr(digest, name), nan_ok=True)
    if size:
        exact_message = size <= MAX_VALUES or max_centroids <= MAX_PAIRS
        assert read.quantile(0.5) == pytest.approx(digest.quantile(0.5), rel=1e-6 if exact_message else 2e-4)


def test_message_holds_2000_float32_values_to_the_bit():
    values = draw("pareto", 2000).astype(np.float32)
    digest = digest_of(values, 2000)
    digest.scale(0.9)
    read = Digest.from_bytes(digest.to_bytes())
    assert np.array_equal(read.means, np.sort(values))
    assert np.array_equal(read.weights, digest.weights)
    for name in ("num_values", "sum_squares", "minimum", "maximum"):
        assert getattr(read, name) == getattr(digest, name)


def test_message_holds_1000_weighted_values_and_integer_weights_to_the_bit():
    values = draw("gamma", 1000).astype(np.float32)
    weights = np.random.default_rng(1).integers(1, 2**24, 1000).astype(np.float64)
    digest = digest_of(values, 2000, weights=weights)
    read = Digest.from_bytes(digest.to_bytes())
    assert np.array_equal(read.means, np.sort(values))
    assert np.array_equal(read.weights, weights[np.argsort(values)])
    assert read.sum_squares == digest.sum_squares


@given(st.integers(0, 2**32 - 1), st.integers(8, 2000), st.integers(0, 5000), st.booleans())
@settings(max_examples=30, deadline=None)
def test_message_can_be_made_to_hold_fewer_values(seed, max_values, size, weighted):
    rng = np.random.default_rng(seed)
    values, weights = rng.lognormal(size=size), rng.random(size) + 0.5 if weighted else None
    digest = digest_of(values, 2000, weights=weights)
    message = digest.to_bytes(max_values)
    read = Digest.from_bytes(message)
    assert len(message) == Digest.num_bytes()
    assert read.to_bytes() == read.to_bytes(max_values) == message
    assert read.means.size <= max_values
    assert read.total_weight == pytest.approx(digest.total_weight)


@given(
    st.lists(st.tuples(st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 1e150)), max_size=40),
    st.sampled_from([1e-140, 1.0]),
)
@settings(max_examples=200, deadline=None)
def test_message_of_any_finite_values_keeps_their_order_and_their_range(pairs, factor):
    digest = Digest(2000)
    digest.add([value for value, _ in pairs], [factor * weight for _, weight in pairs])
    message = digest.to_bytes()
    read = Digest.from_bytes(message)
    assert read.to_bytes() == message
    assert (np.diff(read.means) >= 0).all()
    assert np.isfinite(read.means).all()
    assert (read.weights > 0).all()
    if read.means.size:
        assert read.minimum <= read.means[0] <= read.means[-1] <= read.maximum
        limit = float(np.finfo(np.float32).max)
        expected = np.clip([digest.minimum, digest.maximum], -limit, limit)
        assert [read.minimum, read.maximum] == pytest.approx(expected, rel=1e-6, abs=1e-45)
        assert read.total_weight == pytest.approx(digest.total_weight)


# -- bad input -------------------------------------------------------------------------------------


def test_empty_digest_reads_nan():
    digest = Digest()
    readings = (digest.quantile(0.5), digest.cdf(1.0), digest.density(0.5), digest.standard_error(0.5), digest.minimum)
    assert np.isnan(readings).all()
    assert digest.total_weight == digest.effective_size == 0
    assert Digest.merged([]).num_values == 0
    nothing = Digest.merged([Digest.from_bytes(Digest().to_bytes())] * 3)
    assert np.isnan(nothing.quantile(0.5))
    nothing.add([2.0])
    assert nothing.minimum == nothing.maximum == 2.0
    assert Digest.merged([Digest(), digest_of([2.0])]).quantile(0.5) == 2.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_are_refused_and_change_nothing(bad):
    digest = digest_of([1.0, 2.0])
    with pytest.raises(ValueError, match="1 of 3"):
        digest.add([1.0, bad, 3.0])
    assert digest.num_values == 2


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, np.nan]])
def test_wrong_weights_are_refused_and_change_nothing(weights):
    digest = digest_of([1.0])
    with pytest.raises(ValueError, match="weight"):
        digest.add([1.0, 2.0], weights)
    assert digest.num_values == 1


def test_wrong_arguments_are_quoted():
    with pytest.raises(ValueError, match="got 3"):
        Digest(3)
    with pytest.raises(ValueError, match=r"got 1\.5"):
        Digest().quantile(1.5)
    with pytest.raises(ValueError, match="got nan"):
        Digest().scale(float("nan"))
    with pytest.raises(ValueError, match="version 99"):
        Digest.from_state_dict({**Digest().state_dict(), "version": 99})
    with pytest.raises(ValueError, match="not a digest"):
        Digest.from_bytes(b"nonsense")
    with pytest.raises(ValueError, match="got 100"):
        Digest.from_bytes(Digest().to_bytes()[:100])
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got 1\.5"):
        Digest(500, 1.5)
    with pytest.raises(ValueError, match="got 3"):
        Digest().to_bytes(3)
