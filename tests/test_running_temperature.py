"""τ against exact medians, decayed medians and closed forms, over both backends."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from temperatures import LAWS, run

from flowstream.digest import Digest
from flowstream.distributed.message import MERGED_CENTROIDS
from flowstream.running_temperature import RunningTemperature
from flowstream.temperature import BatchMedian, FixedTemperature, RunningMedian, TargetESS, WindowMedian


@pytest.fixture(params=["numpy", "tdigest"])
def backend(request):
    if request.param == "tdigest":
        pytest.importorskip("tdigest")
    return request.param


def ess(losses, tau):
    weights = np.exp(-losses / tau)
    return weights.sum() ** 2 / (weights**2).sum() / len(losses)


def decayed_median(losses, half_life):
    weights = 2.0 ** (-np.arange(len(losses))[::-1] / half_life)
    order = np.argsort(losses)
    middles = np.cumsum(weights[order]) - 0.5 * weights[order]
    return np.interp(0.5 * weights.sum(), middles, losses[order])


# -- τ ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.25, 0.5, 0.8])
def test_running_median_is_the_quantile_of_all_losses_so_far(backend, q):
    losses = np.random.default_rng(0).lognormal(size=20_000)
    temperature = run(RunningTemperature(RunningMedian(quantile=q, backend=backend), "sample"), losses, window=640)
    assert temperature.tau() == pytest.approx(np.quantile(losses, q), rel=1e-3 if backend == "numpy" else 1e-2)
    assert temperature.num_samples == 20_000


def test_first_window_takes_its_own_median_and_later_windows_the_past_one(backend):
    temperature = RunningTemperature(RunningMedian(backend=backend), "sample")
    first, second = np.arange(1.0, 12.0), np.full(9, 50.0)
    own = temperature.window_digest(first)
    assert temperature.tau(own) == 6.0
    temperature.update(own, 11)
    assert temperature.tau(temperature.window_digest(second)) == pytest.approx(6.0)


def test_half_life_gives_the_exactly_decayed_median(backend):
    losses = np.linspace(1, 3, 40_000) * np.random.default_rng(0).gamma(3.0, size=40_000)
    spec = RunningMedian(half_life_samples=5000, backend=backend)
    temperature = run(RunningTemperature(spec, "sample"), losses, window=640)
    expected = decayed_median(losses, 5000)
    assert temperature.tau() == pytest.approx(expected, rel=2e-3 if backend == "numpy" else 1e-2)
    assert abs(np.median(losses) / expected - 1) > 0.1


def test_half_life_counts_samples_over_all_ranks():
    losses = np.linspace(1, 3, 40_000) * np.random.default_rng(0).gamma(3.0, size=40_000)
    spec = RunningMedian(half_life_samples=5000)
    temperature = run(RunningTemperature(spec, "sample"), losses, window=512, ranks=4)
    assert temperature.tau() == pytest.approx(decayed_median(losses, 5000), rel=2e-3)


def test_ages_within_a_window_are_counted_over_all_ranks():
    temperature = RunningTemperature(RunningMedian(half_life_samples=1), "sample")
    digest = temperature.window_digest([5.0, 3.0, 1.0], world_size=2)
    assert dict(zip(digest.means, digest.weights, strict=True)) == {5.0: 1 / 16, 3.0: 1 / 4, 1.0: 1.0}


def test_ages_of_tokens_are_those_of_their_samples():
    temperature = RunningTemperature(RunningMedian(half_life_samples=1), "token")
    digest = temperature.window_digest([5.0, 3.0, np.nan, 1.0], sample_index=[0, 0, 1, 2])
    assert dict(zip(digest.means, digest.weights, strict=True)) == {5.0: 0.25, 3.0: 0.25, 1.0: 1.0}


def test_frozen_temperature_stays(backend):
    spec = RunningMedian(freeze_after_samples=1000, half_life_samples=500, backend=backend)
    temperature = RunningTemperature(spec, "sample")
    run(temperature, np.random.default_rng(0).lognormal(size=1024))
    frozen = temperature.tau()
    run(temperature, np.full(2048, 77.0))
    assert temperature.tau() == frozen
    assert temperature.num_samples == 1024 + 2048


def test_window_median_is_its_own_windows():
    temperature = RunningTemperature(WindowMedian(), "sample")
    for values in ([1.0, 2.0, 3.0], [10.0, 20.0, 60.0]):
        own = temperature.window_digest(values)
        assert temperature.tau(own) == values[1]
        temperature.update(own, 3)
    assert temperature.tau() == 20.0


def test_batch_median_is_numpys_over_finite_losses():
    temperature = RunningTemperature(BatchMedian(), "sample")
    assert temperature.batch_tau([np.nan, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == 4.0
    assert temperature.batch_tau([np.nan] * 8) == 1e-6
    with pytest.raises(ValueError, match=r"at least 8 losses, got 7: .*RunningMedian"):
        temperature.batch_tau(np.ones(7))


def test_fixed_temperature_needs_nothing():
    temperature = RunningTemperature(FixedTemperature(0.3), "token")
    run(temperature, np.full(300, 8.0))
    assert temperature.tau() == 0.3
    assert temperature.tau_error() == 0
    assert not temperature.needs_scores


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
def test_target_ess_is_reached_on_the_raw_losses(backend, fraction):
    losses = np.random.default_rng(0).lognormal(size=20_000)
    temperature = run(RunningTemperature(TargetESS(fraction, backend=backend), "sample"), losses, window=640)
    assert ess(losses, temperature.tau()) == pytest.approx(fraction, abs=2e-3 if backend == "numpy" else 1e-2)


@pytest.mark.parametrize(
    ("spec", "scope", "warmup", "needs_scores"),
    [
        (RunningMedian(), "stream", 1024, True),
        (TargetESS(0.7, warmup_samples=64), "stream", 64, True),
        (FixedTemperature(2), "stream", 0, False),
        (WindowMedian(), "window", 0, True),
        (BatchMedian(), "batch", 0, True),
    ],
)
def test_stream_is_told_what_a_spec_needs(spec, scope, warmup, needs_scores):
    temperature = RunningTemperature(spec, "sample")
    assert (temperature.scope, temperature.warmup_samples, temperature.needs_scores) == (scope, warmup, needs_scores)


@pytest.mark.parametrize("spec", [RunningMedian(), WindowMedian(), BatchMedian(), TargetESS(0.5)])
@pytest.mark.parametrize(("level", "floor"), [("sample", 1e-6), ("token", 0.05)])
def test_temperature_never_falls_below_its_floor(spec, level, floor):
    temperature = RunningTemperature(spec, level)
    assert temperature.tau() == floor
    nothing = temperature.window_digest([np.nan, np.inf])
    assert temperature.tau(nothing) == floor
    temperature.update(nothing, 2)
    assert temperature.tau() == floor
    run(temperature, np.zeros(100))
    assert temperature.tau() == floor
    assert temperature.batch_tau(np.zeros(8)) == floor
    assert RunningTemperature(RunningMedian(floor=0.5), level).tau() == 0.5


@pytest.mark.parametrize("spec", [RunningMedian(), RunningMedian(half_life_samples=700), TargetESS(0.6)])
def test_ranks_that_merge_the_same_messages_hold_one_temperature(spec):
    rng = np.random.default_rng(0)
    ranks = [RunningTemperature(spec, "sample") for _ in range(3)]
    for _ in range(5):
        messages = [rank.window_digest(rng.gamma(2.0, size=700), world_size=3).to_bytes() for rank in ranks]
        for rank in ranks:
            rank.update(Digest.merged([Digest.from_bytes(message) for message in messages]), 2100)
    assert len({rank.tau() for rank in ranks}) == 1


def shards_of(law, num_ranks, seed, window):
    """Losses of each rank, float32 as the stream's: of 64 to 2,000 samples, alike or hundredfold unlike."""
    rng = np.random.default_rng((seed, window))
    size = [2000, 64, 700, 1300][seed % 4]
    scales = np.ones(num_ranks)
    if law == "unlike":
        scales, law = 10 ** np.random.default_rng(seed).uniform(-1, 1, num_ranks), "lognormal"
    if law == "pareto of infinite mean":
        shards = [1 + rng.pareto(0.5, size) for _ in scales]
    elif law == "bimodal":
        shards = [np.where(rng.random(size) < 0.6, rng.normal(1, 0.1, size), rng.normal(10, 0.1, size)) for _ in scales]
    else:
        shards = [scale * LAWS[law][0](rng, size) for scale in scales]
    return [shard.astype(np.float32) for shard in shards]


def from_rank(temperature, losses, num_ranks):
    return Digest.from_bytes(temperature.window_digest(losses, world_size=num_ranks).to_bytes())


@pytest.mark.parametrize("law", [*LAWS, "pareto of infinite mean", "bimodal", "unlike"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_running_median_over_ranks_is_within_15_ten_thousandths_and_exact_up_to_2000_losses(law, num_ranks):
    for seed in range(4):
        temperature = RunningTemperature(RunningMedian(), "sample")
        losses = np.empty(0, dtype=np.float32)
        for window in range(6):
            shards = shards_of(law, num_ranks, seed, window)
            merged = Digest.merged([from_rank(temperature, shard, num_ranks) for shard in shards], MERGED_CENTROIDS)
            losses = np.concatenate([losses, *shards])
            exact = np.median(losses.astype(np.float64))
            if window == 0:  # its own losses give its τ
                assert temperature.tau(merged) == exact
            temperature.update(merged, sum(map(len, shards)))
            rel = 0 if losses.size <= 2000 else 1.5e-3
            assert temperature.tau() == pytest.approx(exact, rel=rel, abs=0)


def test_window_median_over_ranks_is_exact_in_every_window():
    temperature = RunningTemperature(WindowMedian(), "sample")
    for window in range(3):
        shards = shards_of("lognormal", 8, 0, window)
        merged = Digest.merged([from_rank(temperature, shard, 8) for shard in shards], MERGED_CENTROIDS)
        assert temperature.tau(merged) == np.median(np.concatenate(shards).astype(np.float64))
        temperature.update(merged, 16_000)


# -- error -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("size", [256, 1024, 5000])
def test_tau_error_covers_the_true_median_in_nine_of_ten_runs(law, size):
    sample, truth = LAWS[law]
    covered = 0
    for seed in range(200):
        temperature = run(RunningTemperature(RunningMedian(), "sample"), sample(np.random.default_rng(seed), size))
        covered += abs(temperature.tau() - truth) <= 1.96 * temperature.tau_error()
    assert covered >= 0.9 * 200


def test_tau_error_covers_under_decay_and_over_both_backends(backend):
    covered = 0
    spec = RunningMedian(half_life_samples=1000, backend=backend)
    num_runs = 200 if backend == "numpy" else 40
    for seed in range(num_runs):
        losses = np.random.default_rng(seed).exponential(size=2048)
        temperature = run(RunningTemperature(spec, "sample"), losses, window=512)
        covered += abs(temperature.tau() - np.log(2)) <= 1.96 * temperature.tau_error()
    assert covered >= 0.9 * num_runs


def test_error_of_target_ess_is_nan_where_every_loss_is_zero():
    temperature = run(RunningTemperature(TargetESS(0.5), "sample"), np.zeros(300))
    assert temperature.tau() == temperature.floor
    assert np.isnan(temperature.tau_error())


@pytest.mark.parametrize("spec", [RunningMedian(), TargetESS(0.5), BatchMedian(), WindowMedian()])
def test_error_is_nan_while_nothing_was_seen(spec):
    assert np.isnan(RunningTemperature(spec, "sample").tau_error())


# -- advice ----------------------------------------------------------------------------------------


def names(temperature):
    return [name for name, _ in temperature.advice(temperature.tau())]


def test_floor_gap_and_uniform_weights_are_told(backend):
    rng = np.random.default_rng(0)
    spec = RunningMedian(backend=backend)
    halves = np.where(rng.random(4096) < 0.5, rng.normal(1, 0.05, 4096), rng.normal(10, 0.05, 4096))
    assert names(run(RunningTemperature(spec, "sample"), np.zeros(1000))) == ["tau_at_floor", "weights_nearly_uniform"]
    assert names(run(RunningTemperature(spec, "sample"), halves)) == ["tau_in_gap"]
    assert names(run(RunningTemperature(spec, "sample"), rng.normal(6.4, 0.4, 2000))) == ["weights_nearly_uniform"]


def test_fixed_temperature_is_told_that_its_weights_are_uniform():
    temperature = run(RunningTemperature(FixedTemperature(50), "sample"), np.random.default_rng(0).random(500))
    assert names(temperature) == ["weights_nearly_uniform"]


def test_nothing_is_told_before_anything_was_merged():
    assert RunningTemperature(RunningMedian(), "sample").advice(1.0) == []


# -- state -----------------------------------------------------------------------------------------


SPECS = [
    RunningMedian(),
    RunningMedian(half_life_samples=300, freeze_after_samples=2000),
    TargetESS(0.7),
    WindowMedian(),
    BatchMedian(),
    FixedTemperature(1.0),
    RunningMedian(backend="tdigest", half_life_samples=300),
    TargetESS(0.7, backend="tdigest"),
]


def skip_without_package(spec):
    if getattr(spec, "backend", "numpy") == "tdigest":
        pytest.importorskip("tdigest")


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_reloaded_temperature_equals_uninterrupted_temperature(spec):
    skip_without_package(spec)
    losses = np.random.default_rng(0).lognormal(size=3000)
    uninterrupted, resumed = RunningTemperature(spec, "sample"), RunningTemperature(spec, "sample")
    for part in np.split(losses, 10):
        run(uninterrupted, part)
        run(resumed, part)
        file = io.BytesIO()
        torch.save(resumed.state_dict(), file)
        file.seek(0)
        resumed = RunningTemperature(spec, "sample")
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert resumed.tau() == uninterrupted.tau()
        assert resumed.num_samples == uninterrupted.num_samples
        np.testing.assert_equal(resumed.tau_error(), uninterrupted.tau_error())


@pytest.mark.parametrize(
    ("spec", "num_windows"),
    [
        (RunningMedian(), 100),
        (RunningMedian(half_life_samples=5000), 100),
        (WindowMedian(), 3),
        (RunningMedian(half_life_samples=300, backend="tdigest"), 24),  # it keeps up to 2,500 centroids: window 22
    ],
    ids=repr,
)
def test_state_is_below_42_kilobytes_however_many_losses_were_seen(spec, num_windows):
    skip_without_package(spec)
    rng, temperature = np.random.default_rng(0), RunningTemperature(spec, "sample")
    for _ in range(num_windows):
        run(temperature, rng.lognormal(size=512), window=512)
        file = io.BytesIO()
        torch.save(temperature.state_dict(), file)
        assert file.tell() < 42_000


@given(st.lists(st.integers(0, 600), min_size=1, max_size=6), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_reading_changes_nothing_later(sizes, seed):
    rng = np.random.default_rng(seed)
    quiet, read = (RunningTemperature(RunningMedian(half_life_samples=500), "sample") for _ in range(2))
    for size in sizes:
        losses = rng.gamma(2.0, size=size)
        run(quiet, losses)
        run(read, losses)
        read.advice(read.tau())
        read.tau_error()
        read.state_dict()
    assert read.tau() == quiet.tau()


def test_state_of_another_configuration_is_refused_and_names_the_field():
    state = RunningTemperature(RunningMedian(), "sample").state_dict()
    for other, field in [
        (RunningTemperature(RunningMedian(), "token"), "level"),
        (RunningTemperature(WindowMedian(), "sample"), "spec"),
    ]:
        with pytest.raises(ValueError, match=field):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="version 99"):
        RunningTemperature(RunningMedian(), "sample").load_state_dict({**state, "version": 99})


# -- bad input -------------------------------------------------------------------------------------


def test_wrong_arguments_are_quoted():
    with pytest.raises(ValueError, match=r"level.*'word'"):
        RunningTemperature(RunningMedian(), "word")
    with pytest.raises(ValueError, match=r"num_samples.*-1"):
        RunningTemperature(RunningMedian(), "sample").update(Digest(), -1)


def test_sample_index_of_another_length_is_refused():
    temperature = RunningTemperature(RunningMedian(half_life_samples=5), "token")
    with pytest.raises(ValueError, match="got 1 for 2"):
        temperature.window_digest([1.0, 2.0], sample_index=[0])
