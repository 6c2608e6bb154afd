"""What the terminal and the report both say: the table of figures, and one sentence drawn from the numbers alone."""

import math
import statistics

from flowstream.demo.feeds import BASELINE, METHODS
from flowstream.demo.results import Figure, Results

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
                _gain(result.equal_flops, method),
                *(f"{mean:.3f}" for mean in means),
                f"{result.flops_ratio:.2f}×",
            ]
        )
    return ["method", "equal steps", "equal FLOPs", *measured, "FLOPs"], rows


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
    return (
        f"At equal steps and equal target loss, the mean gain in retained loss over standard fine-tuning runs from "
        f"{inside[worst].mean:+.4f} nats a token ({METHODS[worst]}) to {inside[best].mean:+.4f} ({METHODS[best]}). "
        f"Above standard's curve on every seed: {'; '.join(above) or 'none'}."
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
    if not math.isfinite(figure.mean):
        return "outside"
    spread = f" ± {figure.spread:.4f}" if math.isfinite(figure.spread) else ""
    outside = f" ({figure.num_outside} outside)" if figure.num_outside else ""
    return f"{figure.mean:+.4f}{spread}{outside}"
