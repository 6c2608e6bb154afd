"""One seed's verdict: points chosen on validation, measured on the test split, held against standard's curve."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from flowstream.compare.evaluation import Measures
from flowstream.compare.frontier import Frontier, best_sum, envelope, mean_gain
from flowstream.compare.results import BUDGETS, Choice, Curve, PointResult, RunResult

BASELINE = "standard"
"""The method whose curve all others are held against."""

CONTROL = "permuted"
"""The same weights on other samples: what it gains as well is not owed to which samples are weighted."""


class Place(NamedTuple):
    """One point of one run."""

    budget: str
    method: str
    learning_rate: float
    step: int
    strength: float | None = None
    alpha: float | None = None


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What one seed says of every method."""

    curve: Curve
    choices: dict[str, dict[str, Choice | None]]
    """Budget → method → its point; None where no step fits the budget, or every run diverged."""
    curve_gain: dict[str, float]
    """Method → mean gain of its envelope on validation."""

    def gain(self, budget: str, method: str) -> float:
        """A method's gain; NaN where it has none."""
        choice = self.choices[budget][method]
        return choice.gain if choice is not None else math.nan


def judge(
    runs: Sequence[RunResult],
    test_measures: Callable[[Place], Measures],
    answer_accuracy: Callable[[Place], float] | None = None,
    *,
    methods: Collection[str],
    rerun: Collection[str],
    budgets: Sequence[str] = BUDGETS,
) -> Judged:
    """Judge the runs of one seed. The test split is measured only where validation has chosen a point.

    The curve: the corners of the envelope of all of standard's points on validation. A method's point: the lowest
    target loss plus retained loss on validation. Both are then valued on the test split, so no choice profits from its
    own luck. Where every step costs the same as standard's, equal FLOPs are equal steps; methods in `rerun` have runs
    of their own there.

    Raises:
        ValueError: every run of standard fine-tuning diverged.
    """
    test_measures = cache(test_measures)
    answers = cache(answer_accuracy) if answer_accuracy is not None else None
    (seed,) = {run.seed for run in runs}
    points = {method: points_of(runs, "equal_steps", method) for method in methods}
    corners = corners_of(points[BASELINE])
    if not corners:
        raise ValueError("every run of standard fine-tuning diverged: there is no curve. Take smaller learning rates")
    corners.sort(key=lambda place: test_measures(place).target_loss)
    curve = Curve(
        seed=seed,
        learning_rate=tuple(place.learning_rate for place in corners),
        step=tuple(place.step for place in corners),
        target_loss=tuple(test_measures(place).target_loss for place in corners),
        retained_loss=tuple(test_measures(place).retained_loss for place in corners),
    )
    frontier = Frontier.through(curve.target_loss, curve.retained_loss)

    def choose(budget: str, method: str) -> Choice | None:
        candidates = points_of(runs, budget, method) if method in rerun else points[method]
        if method == BASELINE:  # its own choice lies on its curve
            candidates = {place: candidates[place] for place in corners}
        if not candidates:  # scoring alone costs more than standard's whole run, or every run diverged
            return None
        place = best_of(candidates)
        measures, point = test_measures(place), candidates[place]
        return Choice(
            seed=seed,
            learning_rate=place.learning_rate,
            step=place.step,
            strength=place.strength,
            alpha=place.alpha,
            target_loss=measures.target_loss,
            exact_match=measures.exact_match,
            answer_accuracy=answers(place) if answers is not None else None,
            retained_loss=measures.retained_loss,
            gain=frontier.gain(measures.target_loss, measures.retained_loss),
            flops=point.flops,
            distance=point.distance,
            clip_rate=point.clip_rate,
        )

    on_validation = Frontier.through(*_losses({place: points[BASELINE][place] for place in corners}))
    return Judged(
        curve=curve,
        choices={budget: {method: choose(budget, method) for method in methods} for budget in budgets},
        curve_gain={
            method: mean_gain(on_validation, *_losses(found)) if found else math.nan for method, found in points.items()
        },
    )


def best_point(runs: Sequence[RunResult]) -> Place | None:
    """The point of one method's runs at equal steps that validation chooses; None where all diverged."""
    (method,) = {run.method for run in runs}
    found = points_of(runs, "equal_steps", method)
    return best_of(found) if found else None


def points_of(runs: Sequence[RunResult], budget: str, method: str) -> dict[Place, PointResult]:
    """All points of a method that did not diverge."""
    return {
        Place(budget, method, run.learning_rate, point.step, run.strength, point.alpha): point
        for run in runs
        if (run.budget, run.method) == (budget, method)
        for point in run.points
        if point.is_finite
    }


def corners_of(points: dict[Place, PointResult]) -> list[Place]:
    """Those on the lower left envelope. A point that is none can become none by further points."""
    places = list(points)
    return [places[index] for index in envelope(*_losses(points))]


def best_of(points: dict[Place, PointResult]) -> Place:
    """That with the lowest target plus retained loss."""
    return list(points)[best_sum(*_losses(points))]


def _losses(points: dict[Place, PointResult]) -> tuple[list[float], list[float]]:
    return [point.target_loss for point in points.values()], [point.retained_loss for point in points.values()]
