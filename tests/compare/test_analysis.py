"""Choosing on validation and judging on test, with runs whose losses are known in closed form."""

import math
from dataclasses import replace

import pytest

from flowstream.compare.analysis import Place, judge
from flowstream.compare.evaluation import Measures
from flowstream.compare.results import Figure, PointResult, RunResult

STEPS = (25, 50, 75, 100)
RATES = (5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3)


def target(rate: float, step: int) -> float:
    return 1.0 + math.exp(-rate * step * 12)


def retained(loss: float, gain: float = 0.0) -> float:
    return 3.0 + 1 / loss - gain


def run_of(method: str, gain: float, scored: float, rate: float, steps: tuple[int, ...], budget: str) -> RunResult:
    """A run `gain` nats below the standard curve, that spends `scored` FLOPs on scoring for one on training."""
    return RunResult(
        seed=4,
        budget=budget,
        method=method,
        learning_rate=rate,
        points=tuple(
            PointResult(
                step=step,
                target_loss=target(rate, step),
                exact_match=0.0,
                retained_loss=retained(target(rate, step), gain),
                train_tokens=step,
                score_tokens=0,
                flops=step * (1 + scored),
            )
            for step in steps
        ),
        num_samples=100,
        seconds=1.0,
        score_seconds=0.0,
        acceptance=1.0,
    )


GAINS = {"standard": 0.0, "exact": 0.2, "weighted": 0.1, "resampled": -0.1, "permuted": 0.0, "subsampled": 0.05}
RERUN = ("exact", "weighted", "resampled", "permuted")
SHIFT = 0.5
"""The test split is harder than validation, on both losses."""


@pytest.fixture
def runs() -> list[RunResult]:
    """All methods at equal steps; at equal FLOPs, what two of them can afford."""
    scored = {"exact": 20.0, "weighted": 1 / 3, "resampled": 1.0}
    whole = [
        run_of(method, GAINS[method], scored.get(method, 0.0), rate, STEPS, "equal_steps")
        for method in GAINS
        for rate in RATES
    ]
    shorter = [
        run_of(method, GAINS[method], scored[method], 1e-3, (steps,), "equal_flops")
        for method, steps in (("weighted", 75), ("resampled", 50))
    ]
    return whole + shorter


class TestSplit:
    """The test split, which counts what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[Place] = []

    def measure(self, place: Place) -> Measures:
        self.asked.append(place)
        loss = target(place.learning_rate, place.step)
        return Measures(loss + SHIFT, 0.25, retained(loss, GAINS[place.method]) + SHIFT)

    __test__ = False


def test_a_gain_is_the_known_distance_to_the_curve_at_equal_target(runs: list[RunResult]) -> None:
    judged = judge(runs, TestSplit().measure, lambda place: 0.5, methods=GAINS, rerun=RERUN)
    for method, gain in GAINS.items():
        choice = judged.choices["equal_steps"][method]
        assert choice is not None
        assert choice.gain == pytest.approx(gain, abs=2e-3)
        assert choice.answer_accuracy == 0.5
        assert judged.gain("equal_steps", method) == choice.gain
        assert judged.curve_gain[method] == pytest.approx(gain, abs=2e-3)


def test_the_test_split_is_measured_for_the_curve_and_the_chosen_points_only_and_once(runs: list[RunResult]) -> None:
    split = TestSplit()
    judged = judge(runs, split.measure, lambda place: 0.0, methods=GAINS, rerun=RERUN)
    assert len(split.asked) == len(set(split.asked))
    chosen = {
        Place("equal_steps", method, choice.learning_rate, choice.step)
        for method, choice in judged.choices["equal_steps"].items()
        if choice is not None
    }
    shorter = {Place("equal_flops", "weighted", 1e-3, 75), Place("equal_flops", "resampled", 1e-3, 50)}
    pairs = zip(judged.curve.learning_rate, judged.curve.step, strict=True)
    assert set(split.asked) == chosen | shorter | {Place("equal_steps", "standard", rate, step) for rate, step in pairs}


def test_at_equal_flops_a_scoring_method_is_judged_by_its_shorter_runs_and_the_others_as_before(
    runs: list[RunResult],
) -> None:
    judged = judge(runs, TestSplit().measure, lambda place: 0.0, methods=GAINS, rerun=RERUN)
    at_flops, at_steps = judged.choices["equal_flops"], judged.choices["equal_steps"]
    weighted, resampled = at_flops["weighted"], at_flops["resampled"]
    assert weighted is not None
    assert resampled is not None
    assert (weighted.step, resampled.step) == (75, 50)
    assert at_flops["exact"] is None
    assert math.isnan(judged.gain("equal_flops", "exact"))
    assert at_flops["standard"] == at_steps["standard"]
    assert at_flops["subsampled"] == at_steps["subsampled"]


def test_a_target_beyond_the_curve_is_outside_and_not_extrapolated(runs: list[RunResult]) -> None:
    better = [
        replace(run, points=tuple(replace(p, target_loss=p.target_loss - 5) for p in run.points))
        if run.method == "weighted"
        else run
        for run in runs
    ]

    def measure(place: Place) -> Measures:
        measures = TestSplit().measure(place)
        return replace(measures, target_loss=measures.target_loss - 5) if place.method == "weighted" else measures

    judged = judge(better, measure, lambda place: 0.0, methods=GAINS, rerun=RERUN)
    choice = judged.choices["equal_steps"]["weighted"]
    assert choice is not None
    assert math.isnan(choice.gain)
    assert math.isnan(judged.curve_gain["weighted"])
    figure = Figure.of([choice, replace(choice, gain=0.5), None])
    assert (figure.mean, figure.num_outside, figure.num_over_budget) == (0.5, 1, 1)
    assert math.isnan(figure.spread)
