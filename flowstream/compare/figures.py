"""The figures of a comparison, drawn as pieces of SVG from runs and figures of methods."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from flowstream.compare.analysis import BASELINE
from flowstream.compare.frontier import Frontier, envelope
from flowstream.compare.intervals import Interval
from flowstream.compare.results import Curve, Figure, RunResult
from flowstream.report.svg import PALETTE, svg


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a method is drawn."""

    title: str
    colour: str
    marker: str

    @staticmethod
    def of(methods: Sequence[str]) -> "dict[str, Look]":
        """By name, each told apart by colour or marker; standard's is black."""
        colours = [colour for name, colour in PALETTE.items() if name != "black"]
        others = [method for method in methods if method != BASELINE]
        markers = [marker for marker in "sD^vPX<>p*h" for _ in colours]
        looks = {
            method: Look(title=method, colour=colour, marker=marker)
            for method, colour, marker in zip(others, cycle(colours), cycle(markers), strict=False)
        }
        return {BASELINE: Look(title=BASELINE, colour=PALETTE["black"], marker="o"), **looks}


def retention_figure(
    runs: Sequence[RunResult], seeds: Sequence[int], looks: Mapping[str, Look], *, reference_loss: float
) -> str:
    """Retained loss against target loss: every point of every run on validation, one panel a seed, and the curves."""
    seeds = seeds[:3]
    figure = Drawing(figsize=(5.6 * len(seeds), 4.6), layout="constrained")
    panels = figure.subplots(1, len(seeds), squeeze=False, sharey=True)[0]
    for panel, seed in zip(panels, seeds, strict=True):
        for method, look in looks.items():
            target, retained = _losses(
                [run for run in runs if (run.budget, run.method, run.seed) == ("equal_steps", method, seed)]
            )
            if not len(target):
                continue
            kept = envelope(target, retained)
            _draw_curve(panel, target[kept], retained[kept], look.colour, 2.4 if method == BASELINE else 1.1)
            panel.scatter(
                target,
                retained,
                s=22,
                marker=look.marker,
                color=look.colour,
                label=look.title,
                alpha=0.75,
                linewidths=0,
                zorder=3,
            )
        panel.axhline(reference_loss, color="#999999", lw=0.8, ls=":")
        panel.set(title=f"seed {seed}", xlabel="target loss on validation (nats a token)")
    panels[0].set_ylabel("loss on held-out general text (nats a token)")
    panels[-1].legend(frameon=False, fontsize=8)
    return svg(figure)


def gain_figure(figures: Mapping[str, Mapping[str, Figure]], looks: Mapping[str, Look]) -> str:
    """Gain over standard's curve on the test split, a panel a budget: one dot a seed, the mean as a bar."""
    methods = [method for method in looks if method != BASELINE]
    height = max(3.4, 0.9 + 0.34 * len(methods))
    figure = Drawing(figsize=(4.75 * len(figures), height), layout="constrained")
    panels = figure.subplots(1, len(figures), sharex=True, sharey=True, squeeze=False)[0]
    titles = {"equal_steps": "at equal steps", "equal_flops": "at equal FLOPs, scoring charged"}
    for panel, (budget, of_methods) in zip(panels, figures.items(), strict=True):
        for row, method in enumerate(methods):
            result, colour = of_methods[method], looks[method].colour
            gains = [choice.gain for choice in result.choices if math.isfinite(choice.gain)]
            if gains:
                panel.barh(row, result.mean, color=colour, alpha=0.35, height=0.6)
                panel.scatter(gains, [row] * len(gains), color=colour, s=26, zorder=3)
            if result.num_outside:
                panel.annotate(
                    f"{result.num_outside} outside", (0, row), xytext=(4, -10), textcoords="offset points", fontsize=7
                )
        panel.axvline(0, color="#222222", lw=1)
        panel.set_yticks(range(len(methods)), [looks[method].title for method in methods])
        panel.set(title=titles[budget], xlabel="nats a token retained above standard's curve")
    panels[0].invert_yaxis()
    return svg(figure)


def pareto_figure(curves: Sequence[Curve], figures: Mapping[str, Figure], looks: Mapping[str, Look]) -> str:
    """The test split: standard's curve of each seed, and each method's chosen point, mean over seeds with intervals."""
    figure = Drawing(figsize=(9.5, 5.4), layout="constrained")
    panel = figure.subplots()
    for curve in curves:
        target, retained = np.array(curve.target_loss), np.array(curve.retained_loss)
        _draw_curve(panel, target, retained, looks[BASELINE].colour, 0.9)
        panel.scatter(target, retained, s=8, color=looks[BASELINE].colour, linewidths=0)
    for method, look in looks.items():
        choices = figures[method].choices
        if not choices:
            continue
        x = Interval.of(choice.target_loss for choice in choices)
        y = Interval.of(choice.retained_loss for choice in choices)
        panel.errorbar(
            [x.mean],
            [y.mean],
            xerr=_bar(x),
            yerr=_bar(y),
            fmt=look.marker,
            color=look.colour,
            label=look.title,
            ms=6,
            lw=0.8,
            alpha=0.85,
        )
    panel.set(xlabel="target loss on test (nats a token)", ylabel="loss on general text, test (nats a token)")
    panel.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return svg(figure)


def _bar(interval: Interval) -> list[float] | None:
    return [interval.half_width] if math.isfinite(interval.half_width) else None


def _draw_curve(panel: Axes, target: Any, retained: Any, colour: str, width: float) -> None:
    curve = Frontier.through(target, retained)
    grid = np.linspace(curve.target[0], curve.target[-1], 100)
    panel.plot(grid, [curve.retained_at(level) for level in grid], color=colour, lw=width, zorder=2)


def _losses(runs: Sequence[RunResult]) -> tuple[Any, Any]:
    points = [point for run in runs for point in run.points if point.is_finite]
    return np.array([p.target_loss for p in points]), np.array([p.retained_loss for p in points])
