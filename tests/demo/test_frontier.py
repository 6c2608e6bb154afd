"""Frontier statistics against closed forms."""

import math

import numpy as np
import pytest

from flowstream.demo.frontier import Frontier, best_sum, mean_gain, pareto


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


def test_a_point_of_the_frontier_gains_nothing(frontier: Frontier) -> None:
    for target, retained in zip(frontier.target, frontier.retained, strict=True):
        assert frontier.gain(target, retained) == 0.0


def test_equal_targets_are_averaged() -> None:
    assert Frontier.through([1.0, 1.0, 2.0], [4.0, 6.0, 1.0]).retained.tolist() == [5.0, 1.0]


@pytest.mark.parametrize("target", [[], [math.nan, 1.0], [1.0, 2.0, 3.0]])
def test_a_frontier_through_what_is_no_curve_is_refused(target: list[float]) -> None:
    with pytest.raises(ValueError, match="finite points"):
        Frontier.through(target, [1.0, 2.0])


def test_pareto_keeps_exactly_the_points_that_no_other_beats() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.random((2, 60))
    beaten = [any((x[j] <= x[i]) & (y[j] <= y[i]) for j in range(60) if j != i) for i in range(60)]
    kept = pareto(x, y)
    assert sorted(kept) == [i for i in range(60) if not beaten[i]]
    assert x[kept].tolist() == sorted(x[kept])


def test_mean_gain_of_a_shifted_line_is_its_shift_over_the_shared_range() -> None:
    baseline = Frontier.through([0.0, 4.0], [line(0.0), line(4.0)])
    shifted = Frontier.through([2.0, 6.0], [line(2.0) - 0.1, line(6.0) - 0.1])
    assert mean_gain(shifted, baseline) == pytest.approx(0.1)
    assert math.isnan(mean_gain(Frontier.through([5.0, 6.0], [1.0, 1.0]), baseline))


def test_best_sum_trades_the_two_losses_one_for_one() -> None:
    assert best_sum([1.0, 2.0, 3.0], [5.0, 3.5, 3.0]) == 1
