"""One seed's verdict: points chosen on validation, measured on the test split, held against standard's curve."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from flowstream.demo.evaluation import Measures
from flowstream.demo.feeds import BASELINE, METHODS, SCORING
from flowstream.demo.frontier import Frontier, best_sum, envelope, mean_gain
from flowstream.demo.results import BUDGETS, Choice, Curve, PointResult, RunResult


class Place(NamedTuple):
    """One point of one run."""

    budget: str
    method: str
    learning_rate: float
    step: int


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What one seed says of every method."""

    curve: Curve
    choices: dict[str, dict[str, Choice | None]]
    """Budget → method → its point; None where no step fits the budget."""
    curve_gain: dict[str, float]
    """Method → mean gain of its envelope on validation."""

    def gain(self, budget: str, method: str) -> float:
        """A method's gain; NaN where it has none."""
        choice = self.choices[budget][method]
        return choice.gain if choice is not None else math.nan


def judge(
    runs: Sequence[RunResult],
    test_measures: Callable[[Place], Measures],
    answer_accuracy: Callable[[Place], float],
) -> Judged:
    """Judge the runs of one seed. The test split is measured only where validation has chosen a point.

    The curve: the corners of the envelope of all of standard's points on validation. A method's point: the lowest
    target loss plus retained loss on validation. Both are then valued on the test split, so no choice profits from its
    own luck. Where every step costs the same as standard's, equal FLOPs are equal steps.
    """
    test_measures, answer_accuracy = cache(test_measures), cache(answer_accuracy)
    (seed,) = {run.seed for run in runs}
    points = {method: _points(runs, "equal_steps", method) for method in METHODS}
    corners = _corners(points[BASELINE])
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
        candidates = _points(runs, budget if method in SCORING else "equal_steps", method)
        if method == BASELINE:  # its own choice lies on its curve
            candidates = {place: candidates[place] for place in corners}
        if not candidates:  # scoring alone costs more than standard's whole run
            return None
        place = _best(candidates)
        measures = test_measures(place)
        return Choice(
            seed=seed,
            learning_rate=place.learning_rate,
            step=place.step,
            target_loss=measures.target_loss,
            exact_match=measures.exact_match,
            answer_accuracy=answer_accuracy(place),
            retained_loss=measures.retained_loss,
            gain=frontier.gain(measures.target_loss, measures.retained_loss),
        )

    on_validation = Frontier.through(*_losses({place: points[BASELINE][place] for place in corners}))
    return Judged(
        curve=curve,
        choices={budget: {method: choose(budget, method) for method in METHODS} for budget in BUDGETS},
        curve_gain={method: mean_gain(on_validation, *_losses(points[method])) for method in METHODS},
    )


def best_point(runs: Sequence[RunResult]) -> Place:
    """The point of one method's runs that validation chooses."""
    (method,) = {run.method for run in runs}
    return _best(_points(runs, "equal_steps", method))


def _points(runs: Sequence[RunResult], budget: str, method: str) -> dict[Place, PointResult]:
    own = [run for run in runs if (run.budget, run.method) == (budget, method)]
    return {Place(budget, method, run.learning_rate, point.step): point for run in own for point in run.points}


def _losses(points: dict[Place, PointResult]) -> tuple[list[float], list[float]]:
    return [point.target_loss for point in points.values()], [point.retained_loss for point in points.values()]


def _corners(points: dict[Place, PointResult]) -> list[Place]:
    places = list(points)
    return [places[index] for index in envelope(*_losses(points))]


def _best(points: dict[Place, PointResult]) -> Place:
    return list(points)[best_sum(*_losses(points))]
