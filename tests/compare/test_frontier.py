"""Frontier statistics against closed forms, and against SciPy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import PchipInterpolator
from scipy.spatial import ConvexHull

from flowstream.compare.frontier import Frontier, best_sum, envelope, mean_gain


def line(target: float) -> float:
    return 5.0 - 0.5 * target


@pytest.fixture
def frontier() -> Frontier:
    target = [3.0, 1.0, 2.5, 1.5]
    return Frontier.through(target, [line(x) for x in target])


@pytest.mark.parametrize("target", [1.0, 1.2, 2.0, 2.9, 3.0])
def test_points_of_a_line_give_the_line(frontier: Frontier, target: float) -> None:
    assert frontier.retained_at(target) == pytest.approx(line(target))


@pytest.mark.parametrize("target", [0.999, 3.001, math.nan])
def test_outside_its_points_a_frontier_is_nan_not_extrapolated(frontier: Frontier, target: float) -> None:
    assert math.isnan(frontier.retained_at(target))
    assert math.isnan(frontier.gain(target, 1.0))


def test_gain_is_the_vertical_distance_and_positive_where_a_point_forgot_less(frontier: Frontier) -> None:
    assert frontier.gain(2.0, line(2.0) - 0.25) == pytest.approx(0.25)
    assert frontier.gain(2.0, line(2.0) + 0.25) == pytest.approx(-0.25)


def test_a_point_of_the_frontier_gains_nothing() -> None:
    frontier = Frontier.through([1.0, 1.3, 2.0, 4.0], [3.0, 2.0, 1.5, 1.4])
    for target, retained in zip(frontier.target, frontier.retained, strict=True):
        assert frontier.gain(target, retained) == pytest.approx(0.0, abs=1e-12)


def test_between_sparse_points_of_a_hyperbola_the_curve_is_nearer_than_straight_lines() -> None:
    target = np.array([0.9, 1.02, 1.19, 1.43, 1.73])
    curve = Frontier.through(target, 3.4 + 0.1 / (target - 0.75))
    inner = np.linspace(1.02, 1.43, 50)
    exact = 3.4 + 0.1 / (inner - 0.75)
    error = np.abs([curve.retained_at(x) for x in inner] - exact).max()
    assert error < 0.4 * np.abs(np.interp(inner, curve.target, curve.retained) - exact).max()
    assert error < 0.01


@given(
    st.lists(
        # In millionths of a nat: slopes of 1e-307 overflow in scipy, too.
        st.tuples(st.integers(0, 60), st.integers(-5_000_000, 5_000_000).map(lambda micronats: micronats / 1e6)),
        min_size=2,
        max_size=9,
        unique_by=lambda p: p[0],
    )
)
def test_the_curve_is_scipys_monotone_cubic(points: list[tuple[int, float]]) -> None:
    x, y = map(np.array, zip(*sorted(points), strict=True))
    frontier = Frontier.through(x, y)
    for target in np.linspace(x[0], x[-1], 23):
        assert frontier.retained_at(target) == pytest.approx(float(PchipInterpolator(x, y)(target)), abs=1e-6)


def test_equal_targets_are_averaged_and_one_point_is_a_curve() -> None:
    assert Frontier.through([1.0, 1.0, 2.0], [4.0, 6.0, 1.0]).retained.tolist() == [5.0, 1.0]
    assert Frontier.through([1.0], [4.0]).retained_at(1.0) == 4.0


@pytest.mark.parametrize("target", [[], [math.nan, 1.0], [1.0, 2.0, 3.0]])
def test_a_frontier_through_what_is_no_curve_is_refused(target: list[float]) -> None:
    with pytest.raises(ValueError, match="finite points"):
        Frontier.through(target, [1.0, 2.0])


def test_the_envelope_is_the_lower_left_of_the_convex_hull() -> None:
    for seed in range(20):
        x, y = np.random.default_rng(seed).random((2, 40))
        hull = {int(k) for k in ConvexHull(np.stack([x, y], axis=1)).vertices}
        corners = envelope(x, y)
        assert set(corners) <= hull
        assert corners[0] == x.argmin()
        assert corners[-1] == y.argmin()
        assert (np.diff(x[corners]) > 0).all()
        assert (np.diff(y[corners]) < 0).all()
        between = (x >= x[corners[0]]) & (x <= x[corners[-1]])
        assert (y[between] >= np.interp(x[between], x[corners], y[corners]) - 1e-12).all()


def test_an_unfinished_run_between_two_finished_ones_is_no_corner() -> None:
    assert envelope([0.9, 1.0, 1.01, 1.2], [4.06, 4.00, 3.90, 3.78]) == [0, 2, 3]


def test_mean_gain_of_a_shifted_line_is_its_shift_over_the_shared_range() -> None:
    baseline = Frontier.through([0.0, 4.0], [line(0.0), line(4.0)])
    shifted = [2.0, 3.0, 6.0]
    assert mean_gain(baseline, shifted, [line(x) - 0.1 for x in shifted]) == pytest.approx(0.1)
    assert math.isnan(mean_gain(baseline, [5.0, 6.0], [1.0, 0.9]))


def test_best_sum_trades_the_two_losses_one_for_one() -> None:
    assert best_sum([1.0, 2.0, 3.0], [5.0, 3.5, 3.0]) == 1
