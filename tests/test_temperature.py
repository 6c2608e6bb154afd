"""The specs of τ: what is refused."""

from __future__ import annotations

import pytest

from flowstream.temperature import BatchMedian, FixedTemperature, RunningMedian, TargetESS, WindowMedian


@pytest.mark.parametrize(
    ("make", "quoted"),
    [
        (lambda: RunningMedian(quantile=1.5), r"quantile.*1\.5"),
        (lambda: RunningMedian(warmup_samples=0), "warmup_samples.*0"),
        (lambda: RunningMedian(half_life_samples=-3), "half_life_samples.*-3"),
        (lambda: RunningMedian(floor=0), "floor.*0"),
        (lambda: RunningMedian(floor="low"), "floor.*'low'"),
        (lambda: RunningMedian(freeze_after_samples=0), "freeze_after_samples.*0"),
        (lambda: RunningMedian(backend="torch"), "backend.*'torch'"),
        (lambda: WindowMedian(floor=-1), r"WindowMedian\(floor\).*-1"),
        (lambda: BatchMedian(floor=float("nan")), r"BatchMedian\(floor\).*nan"),
        (lambda: FixedTemperature(0), r"FixedTemperature\(value\).*0"),
        (lambda: TargetESS(1.0), r"TargetESS\(fraction\).*1\.0"),
    ],
)
def test_wrong_arguments_are_quoted(make, quoted):
    with pytest.raises(ValueError, match=quoted):
        make()


def test_specs_are_frozen():
    with pytest.raises(AttributeError):
        RunningMedian().quantile = 0.3
