"""The report's figures, each drawn from `Results` as a piece of SVG that needs nothing from outside."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flowstream.demo.feeds import BASELINE, METHODS
from flowstream.demo.frontier import Frontier, envelope
from flowstream.demo.problems import LEVELS
from flowstream.demo.results import Results, RunResult
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


def retention_figure(results: Results) -> str:
    """Retained loss against target loss: every point of every run on validation, one panel a seed, and the curves."""
    seeds = [curve.seed for curve in results.curves][:3]
    figure = Figure(figsize=(5.6 * len(seeds), 4.6), layout="constrained")
    panels = figure.subplots(1, len(seeds), squeeze=False, sharey=True)[0]
    for panel, seed in zip(panels, seeds, strict=True):
        for method in METHODS:
            runs = [r for r in results.runs if (r.budget, r.method, r.seed) == ("equal_steps", method, seed)]
            target, retained = _losses(runs)
            kept = envelope(target, retained)
            curve = Frontier.through(target[kept], retained[kept])
            grid = np.linspace(curve.target[0], curve.target[-1], 100)
            line = [curve.retained_at(level) for level in grid]
            panel.plot(grid, line, color=COLOURS[method], lw=2.4 if method == BASELINE else 1.1, zorder=2)
            panel.scatter(
                target,
                retained,
                s=22,
                marker=_MARKERS[method],
                color=COLOURS[method],
                label=METHODS[method],
                alpha=0.75,
                linewidths=0,
                zorder=3,
            )
        panel.axhline(results.reference["validation"]["retained_loss"], color="#999999", lw=0.8, ls=":")
        panel.set(title=f"seed {seed}", xlabel="target loss on validation (nats a token)")
    panels[0].set_ylabel("loss on held-out pre-training text (nats a token)")
    panels[-1].legend(frameon=False, fontsize=8)
    return svg(figure)


def gain_figure(results: Results) -> str:
    """Gain over standard fine-tuning's curve on the test split: one dot a seed, the mean as a bar, both budgets."""
    methods = [method for method in METHODS if method != BASELINE]
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    titles = {"equal_steps": "at equal steps", "equal_flops": "at equal FLOPs, scoring charged"}
    for panel, (budget, title) in zip(panels, titles.items(), strict=True):
        for row, method in enumerate(methods):
            result = getattr(results.methods[method], budget)
            gains = [choice.gain for choice in result.choices if math.isfinite(choice.gain)]
            if gains:
                panel.barh(row, result.mean, color=COLOURS[method], alpha=0.35, height=0.6)
                panel.scatter(gains, [row] * len(gains), color=COLOURS[method], s=26, zorder=3)
            if result.num_outside:
                panel.annotate(
                    f"{result.num_outside} outside", (0, row), xytext=(4, -10), textcoords="offset points", fontsize=7
                )
        panel.axvline(0, color="#222222", lw=1)
        panel.set_yticks(range(len(methods)), [METHODS[method] for method in methods])
        panel.set(title=title, xlabel="nats a token retained above standard's curve")
    panels[0].invert_yaxis()
    return svg(figure)


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


def _losses(runs: Sequence[RunResult]) -> tuple[Any, Any]:
    points = [point for run in runs for point in run.points]
    return np.array([p.target_loss for p in points]), np.array([p.retained_loss for p in points])


def _styles() -> list[str]:
    return ["-", "--", "-.", ":"]
