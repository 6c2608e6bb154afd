"""The demo's figures, each drawn from `Results` as a piece of SVG that needs nothing from outside."""

import numpy as np
from matplotlib.figure import Figure

from flowstream.compare import figures
from flowstream.compare.figures import Look
from flowstream.compare.results import BUDGETS
from flowstream.demo.feeds import METHODS
from flowstream.demo.problems import LEVELS
from flowstream.demo.results import Results
from flowstream.report.svg import PALETTE, svg

COLOURS = {
    "standard": PALETTE["black"],
    "exact": PALETTE["blue"],
    "weighted": PALETTE["green"],
    "resampled": PALETTE["vermilion"],
    "permuted": PALETTE["purple"],
    "subsampled": PALETTE["orange"],
}

_MARKERS = {"standard": "o", "exact": "s", "weighted": "D", "resampled": "^", "permuted": "v", "subsampled": "P"}
_LEVEL_COLOURS = tuple(PALETTE[name] for name in ("sky", "green", "orange", "vermilion"))


_LOOKS = {
    method: Look(title=title, colour=COLOURS[method], marker=_MARKERS[method]) for method, title in METHODS.items()
}


def retention_figure(results: Results) -> str:
    """Retained loss against target loss: every point of every run on validation, one panel a seed, and the curves."""
    seeds = [curve.seed for curve in results.curves]
    before = results.reference["validation"]["retained_loss"]
    return figures.retention_figure(results.runs, seeds, _LOOKS, reference_loss=before)


def gain_figure(results: Results) -> str:
    """Gain over standard fine-tuning's curve on the test split: one dot a seed, the mean as a bar, both budgets."""
    of_budgets = {
        budget: {method: getattr(result, budget) for method, result in results.methods.items()} for budget in BUDGETS
    }
    return figures.gain_figure(of_budgets, _LOOKS)


def tau_figure(results: Results) -> str:
    """τ of the weighted stream over its windows, with its own error band, against the offline median."""
    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (seed, windows), style in zip(results.temperature.online.items(), _styles(), strict=False):
        steps, tau, error, ess = (
            np.array([getattr(window, name) for window in windows]) for name in ("step", "tau", "tau_error", "ess")
        )
        left.plot(steps, tau, style, color=COLOURS["weighted"], label=f"online, seed {seed}")
        left.fill_between(steps, tau - error, tau + error, color=COLOURS["weighted"], alpha=0.15, lw=0)
        right.plot(steps, ess, style, color=COLOURS["weighted"], label=f"online, seed {seed}")
    left.axhline(results.temperature.exact, color=COLOURS["exact"], lw=1.2, label="exact, offline")
    right.axhline(results.temperature.exact_ess, color=COLOURS["exact"], lw=1.2, label="exact, offline")
    left.set(xlabel="step", ylabel="τ (nats), band: ± tau_error")
    right.set(
        xlabel="step", ylabel="effective sample size / n", ylim=(min(0.8, results.temperature.exact_ess - 0.1), 1)
    )
    left.legend(frameon=False, fontsize=8)
    right.legend(frameon=False, fontsize=8)
    return svg(figure)


def loss_figure(results: Results) -> str:
    """The reference's losses of the fine-tuning set, stacked by level, and the weight that each loss gets."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    panel = figure.subplots()
    losses = [np.array(results.loss_by_level[level]) for level in LEVELS]
    panel.hist(losses, bins=48, stacked=True, color=_LEVEL_COLOURS[: len(losses)], label=list(LEVELS))
    panel.axvline(results.temperature.exact, color="#222222", lw=1.2, ls="--", label="τ, the median")
    panel.set(xlabel="loss of a problem under the frozen model (nats a token)", ylabel="problems")
    panel.legend(frameon=False, fontsize=8, loc="upper center")
    weights = panel.twinx()
    grid = np.linspace(min(map(np.min, losses)), max(map(np.max, losses)), 100)
    weights.plot(grid, np.exp(-grid / results.temperature.exact), color="#222222", lw=1.6)
    weights.set(ylabel="weight, exp(-f/τ)", ylim=(0, 1))
    return svg(figure)


def pretraining_figure(results: Results) -> str:
    """The pre-training loss over its steps, averaged over a fortieth of them."""
    figure = Figure(figsize=(4.8, 2.8), layout="constrained")
    panel = figure.subplots()
    losses = np.array(results.pretraining_loss)
    width = max(1, len(losses) // 40)
    means = losses[: len(losses) // width * width].reshape(-1, width).mean(axis=1)
    panel.plot((np.arange(len(means)) + 1) * width, means, color=COLOURS["standard"])
    panel.set(xlabel="step", ylabel="pre-training loss (nats a token)")
    return svg(figure)


def _styles() -> list[str]:
    return ["-", "--", "-.", ":"]
