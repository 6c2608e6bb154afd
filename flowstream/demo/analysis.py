"""One seed's verdict: points chosen on validation, measured on the test split, held against standard's curve."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from flowstream.demo.evaluation import Measures
from flowstream.demo.feeds import BASELINE, METHODS
from flowstream.demo.frontier import Frontier, best_sum, mean_gain, pareto
from flowstream.demo.results import BUDGETS, Choice, Curve, PointResult, RunResult

Place = tuple[str, float, int]
"""(method, learning rate, step): one point of one run."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What one seed says of every method."""

    curve: Curve
    choices: dict[str, dict[str, Choice | None]]
    """Budget → method → its point; None where no point fits the budget."""
    curve_gain: dict[str, float]
    """Method → gain over the whole validation curve."""

    def gain(self, budget: str, method: str) -> float:
        """A method's gain; NaN where it has none."""
        choice = self.choices[budget][method]
        return choice.gain if choice is not None else math.nan


def judge(
    runs: list[RunResult],
    test_measures: Callable[[Place], Measures],
    answer_accuracy: Callable[[Place], float],
) -> Judged:
    """Judge the runs of one seed. The test split is measured only where validation has chosen a point.

    The curve: standard's points that none of its others beats on validation. A method's point: the lowest target loss
    plus retained loss on validation. Both are then valued on the test split, so no choice profits from its own luck.
    """
    test_measures, answer_accuracy = cache(test_measures), cache(answer_accuracy)
    (seed,) = {run.seed for run in runs}
    points = {
        method: {
            (method, run.learning_rate, point.step): point
            for run in runs
            if run.method == method
            for point in run.points
        }
        for method in METHODS
    }
    curve_places = _pareto_places(points[BASELINE])
    on_test = {place: test_measures(place) for place in curve_places}
    curve_places.sort(key=lambda place: on_test[place].target_loss)
    curve = Curve(
        seed=seed,
        learning_rate=tuple(place[1] for place in curve_places),
        step=tuple(place[2] for place in curve_places),
        target_loss=tuple(on_test[place].target_loss for place in curve_places),
        retained_loss=tuple(on_test[place].retained_loss for place in curve_places),
    )
    frontier = Frontier.through(curve.target_loss, curve.retained_loss)
    allowance = max(point.flops for point in points[BASELINE].values())

    def choose(method: str, budget: str) -> Choice | None:
        allowed = {
            place: point
            for place, point in points[method].items()
            if budget == "equal_steps" or point.flops <= allowance
        }
        if method == BASELINE:  # its own choice lies on its curve
            allowed = {place: allowed[place] for place in curve_places}
        if not allowed:  # its scoring alone costs more than standard's first points
            return None
        places = list(allowed)
        best = best_sum([p.target_loss for p in allowed.values()], [p.retained_loss for p in allowed.values()])
        _, learning_rate, step = place = places[best]
        measures = test_measures(place)
        return Choice(
            seed=seed,
            learning_rate=learning_rate,
            step=step,
            target_loss=measures.target_loss,
            exact_match=measures.exact_match,
            answer_accuracy=answer_accuracy(place),
            retained_loss=measures.retained_loss,
            gain=frontier.gain(measures.target_loss, measures.retained_loss),
        )

    on_validation = {method: _validation_curve(points[method]) for method in METHODS}
    return Judged(
        curve=curve,
        choices={budget: {method: choose(method, budget) for method in METHODS} for budget in BUDGETS},
        curve_gain={method: mean_gain(on_validation[method], on_validation[BASELINE]) for method in METHODS},
    )


def _pareto_places(points: Mapping[Place, PointResult]) -> list[Place]:
    places = list(points)
    kept = pareto([p.target_loss for p in points.values()], [p.retained_loss for p in points.values()])
    return [places[index] for index in kept]


def _validation_curve(points: Mapping[Place, PointResult]) -> Frontier:
    kept = [points[place] for place in _pareto_places(points)]
    return Frontier.through([p.target_loss for p in kept], [p.retained_loss for p in kept])
