"""Confidence intervals against SciPy."""

import math

import numpy as np
import pytest
from scipy import stats

from flowstream.compare.intervals import Interval, student


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 30, 99])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_students_t_is_scipys(confidence: float, freedom: int) -> None:
    assert student(confidence, freedom) == pytest.approx(stats.t.ppf((1 + confidence) / 2, freedom), rel=1e-9)


def test_an_interval_is_that_of_a_t_test() -> None:
    values = np.random.default_rng(0).normal(0.3, 0.2, 6)
    interval = Interval.of([*values, math.nan])
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (interval.mean - interval.half_width, interval.mean + interval.half_width) == pytest.approx((low, high))
    assert interval.num == 6


@pytest.mark.parametrize(("values", "side"), [([1.0, 1.1], 1), ([-1.0, -1.1], -1), ([-1.0, 1.0], 0), ([1.0], 0)])
def test_the_side_is_that_of_the_whole_interval(values: list[float], side: int) -> None:
    assert Interval.of(values).side == side


def test_one_value_has_no_width_and_none_no_mean() -> None:
    assert math.isnan(Interval.of([2.0]).half_width)
    assert math.isnan(Interval.of([math.nan]).mean)
