"""What the terminal and the report both say: the table of figures, and one sentence drawn from the numbers alone."""

import math
import statistics
from collections.abc import Sequence

from flowstream.compare.analysis import BASELINE, CONTROL
from flowstream.compare.results import Figure
from flowstream.demo.feeds import METHODS
from flowstream.demo.results import Results

_UNIFORM_ESS = 0.97


def summary_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Head and rows, one a method; losses and shares are the test split's, of the point chosen at equal steps."""
    measured = {
        "target": "target_loss",
        "retained": "retained_loss",
        "exact match": "exact_match",
        "right answer": "answer_accuracy",
    }
    rows = []
    for method in METHODS:
        result = results.methods[method]
        means = [
            statistics.fmean(getattr(choice, name) for choice in result.equal_steps.choices)
            for name in measured.values()
        ]
        rows.append(
            [
                result.title,
                _gain(result.equal_steps, method),
                _spread(result.over_permuted) if method not in (BASELINE, CONTROL) else "",
                _gain(result.equal_flops, method),
                *(f"{mean:.3f}" for mean in means),
                f"{result.flops_ratio:.2f}×",
            ]
        )
    return ["method", "equal steps", "less permuted", "equal FLOPs", *measured, "FLOPs"], rows


def verdict(results: Results) -> str:
    """Which methods lie above standard's curve on every seed, whichever they are, and what the permuted weights say."""
    figures = {method: results.methods[method].equal_steps for method in METHODS if method != BASELINE}
    inside = {method: figure for method, figure in figures.items() if math.isfinite(figure.mean)}
    if not inside:
        return "No method's chosen point lies within the range of standard fine-tuning's curve: none can be compared."
    best = max(inside, key=lambda method: inside[method].mean)
    worst = min(inside, key=lambda method: inside[method].mean)
    above = [
        METHODS[method]
        for method, figure in inside.items()
        if not figure.num_outside and min(choice.gain for choice in figure.choices) > 0
    ]
    informed = "; ".join(
        f"{METHODS[method]} {_spread(results.methods[method].over_permuted)}"
        for method in ("exact", "weighted", "resampled")
    )
    return (
        f"At equal steps and equal target loss, the mean gain in retained loss over standard fine-tuning runs from "
        f"{inside[worst].mean:+.4f} nats a token ({METHODS[worst]}) to {inside[best].mean:+.4f} ({METHODS[best]}). "
        f"Above standard's curve on every seed: {'; '.join(above) or 'none'}. "
        f"Less what the permuted weights gain: {informed}."
    )


def spread_of_weights(results: Results) -> str:
    """How much information the weights can carry here."""
    ess = results.temperature.exact_ess
    if ess > _UNIFORM_ESS:
        return f"ESS/n is {ess:.3f}: the weights are nearly uniform, and FLOW can change little here."
    return f"ESS/n is {ess:.3f}: 1 would be uniform weights, which carry no information."


def _gain(figure: Figure, method: str) -> str:
    if method == BASELINE:
        return "the curve"
    if not figure.choices:
        return "over budget"
    return _spread([choice.gain for choice in figure.choices])


def _spread(gains: Sequence[float]) -> str:
    """Mean ± standard deviation of those that are numbers, and how many are not."""
    inside = [gain for gain in gains if math.isfinite(gain)]
    if not inside:
        return "outside"
    spread = f"±{statistics.stdev(inside):.4f}" if len(inside) > 1 else ""
    outside = f" ({len(gains) - len(inside)} out)" if len(inside) < len(gains) else ""
    return f"{statistics.fmean(inside):+.4f}{spread}{outside}"
