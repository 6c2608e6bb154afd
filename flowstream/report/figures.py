"""The figures of a report, each drawn from plain rows as a piece of SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from flowstream.policies import Flow, Policy
from flowstream.report.run_log import RunLog, StepPoint, WindowPoint
from flowstream.report.svg import PALETTE, label, svg

_MAX_POINTS = 300
"""More of them no eye can tell apart, and a page would grow with the run."""
_SETS = tuple(PALETTE[name] for name in ("blue", "green", "vermilion", "purple", "orange", "sky"))

_Row = TypeVar("_Row")
Floats = NDArray[np.float64]


def tau_figure(windows: Sequence[WindowPoint], *, accepts: bool) -> str:
    """Left τ and its error band; right ESS/n, and what share is accepted (or the mean weight)."""
    figure, (left, right) = _panels(2)
    steps, tau, error = _columns(_thinned(windows), "step", "tau", "tau_error")
    left.plot(steps, tau, color=PALETTE["green"], marker="." if len(steps) < 30 else "")
    left.fill_between(steps, tau - error, tau + error, color=PALETTE["green"], alpha=0.2, lw=0)
    left.set(xlabel="step", ylabel="τ (nats), band: ± its standard error")
    steps, ess, mean, accepted = _columns(_thinned(windows), "step", "ess", "mean_weight", "acceptance")
    right.plot(steps, ess, color=PALETTE["blue"], label="effective sample size / n")
    shown, name = (accepted, "accepted, of the samples seen") if accepts else (mean, "mean weight")
    right.plot(steps, shown, color=PALETTE["vermilion"], label=name)
    right.set(xlabel="step", ylim=(0, max(1.02, 1.05 * np.nanmax(shown, initial=0))))
    right.legend(frameon=False, fontsize=8)
    return svg(figure)


@dataclass(frozen=True, kw_only=True)
class WeightCurve:
    """What weight each loss gets at one τ."""

    name: str
    tau: float
    policy: Policy = Flow()
    unit: float = 1.0
    """What is drawn as 1."""


def loss_figure(heights: Floats, edges: Floats, curves: Sequence[WeightCurve], *, ylabel: str = "weight") -> str:
    """How often each loss comes (`heights` [n] between `edges` [n + 1]), and the weights that it gets; τ is dashed."""
    figure = Figure(figsize=(6.4, 3.5), layout="constrained")
    panel = figure.subplots()
    panel.stairs(heights, edges, fill=True, color=PALETTE["sky"], alpha=0.5)
    panel.set(xlabel="loss of a sample under the frozen reference (nats)", ylabel="share of the samples")
    panel.set(ylim=(0, None), xlim=(edges[0], edges[-1]))
    if not curves:
        return svg(figure)
    weights = panel.twinx()
    grid = np.linspace(edges[0], edges[-1], 200)
    for curve, colour in zip(curves, (PALETTE["black"], *_SETS), strict=False):
        drawn = curve.policy(torch.tensor(grid), curve.tau).double().numpy() / curve.unit
        weights.plot(grid, drawn, color=colour, lw=1.6, label=label(curve.name))
        if edges[0] <= curve.tau <= edges[-1]:
            panel.axvline(curve.tau, color=colour, lw=1, ls="--")
    weights.set(ylabel=ylabel, ylim=(0, max(1.02, 1.02 * weights.dataLim.y1)))
    weights.legend(frameon=False, fontsize=8)
    return svg(figure)


def steps_figure(steps: Sequence[StepPoint]) -> str:
    """Left the training loss and the learning rate, right the norm of the gradient, where there is any."""
    steps = list(steps)
    has_norm = any(np.isfinite(row.grad_norm) for row in steps)
    figure, panels = _panels(2 if has_norm else 1)
    at = _means([row.step for row in steps])
    panels[0].plot(at, _means([row.loss for row in steps]), color=PALETTE["black"])
    panels[0].set(xlabel="step", ylabel="training loss (nats)")
    rates = np.array([row.learning_rate for row in steps])
    if np.isfinite(rates).any():
        twin = panels[0].twinx()
        twin.plot(at, _means(rates), color=PALETTE["orange"], lw=1)
        twin.set_ylabel("learning rate", color=PALETTE["orange"])
        twin.set_ylim(0, 1.05 * np.nanmax(rates) or 1)
    if has_norm:
        panels[1].plot(at, _means([row.grad_norm for row in steps]), color=PALETTE["blue"])
        panels[1].set(xlabel="step", ylabel="norm of the gradient", ylim=(0, None))
    return svg(figure)


def cost_figure(windows: Sequence[WindowPoint]) -> str:
    """Left seconds spent in scoring and in waiting, right the share of losses found in the cache."""
    figure, (left, right) = _panels(2)
    steps, score, wait, hits = _columns(_thinned(windows), "step", "score_seconds", "wait_seconds", "cache_hit_rate")
    left.plot(steps, score, color=PALETTE["blue"], label="scoring")
    left.plot(steps, wait, color=PALETTE["orange"], label="waiting for the loader and for other ranks")
    left.set(xlabel="step", ylabel="seconds so far", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    right.plot(steps, hits, color=PALETTE["green"])
    right.set(xlabel="step", ylabel="losses found in the cache, share", ylim=(0, 1.02))
    return svg(figure)


def evaluation_figure(log: RunLog) -> str:
    """The loss of each evaluation set over the steps; the target is the thick black line."""
    figure, (panel,) = _panels(1)
    names = list(dict.fromkeys(name for each in log.evaluations for name in each.losses))
    others = [name for name in names if name != log.target]
    for name in names:
        colour = PALETTE["black"] if name == log.target else _SETS[others.index(name) % len(_SETS)]
        points = [(each.step, each.losses[name]) for each in log.evaluations if name in each.losses]
        shown = f"{name} (target)" if name == log.target else name
        panel.plot(
            *zip(*points, strict=True),
            color=colour,
            lw=2.2 if name == log.target else 1.2,
            marker=".",
            label=label(shown),
        )
    panel.set(xlabel="step", ylabel="loss (nats a token)")
    panel.legend(frameon=False, fontsize=8)
    return svg(figure)


def retention_figure(steps: Sequence[int], target: Floats, retained: Floats) -> str:
    """Mean loss on the other sets against the loss on the target, a mark an evaluation, in the order of the steps."""
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    panel = figure.subplots()
    panel.plot(target, retained, color=PALETTE["green"], lw=1.2, marker="o", ms=4)
    told = {int(k) for k in np.linspace(0, len(steps) - 1, min(len(steps), 8)).round()}
    for k in sorted(told):
        name = "before" if steps[k] == 0 else f"{steps[k]:,}"
        panel.annotate(name, (target[k], retained[k]), xytext=(5, 5), textcoords="offset points", fontsize=8)
    if steps[0] == 0:
        panel.plot(target[:1], retained[:1], color=PALETTE["black"], marker="o", mfc="white", ms=8, ls="")
    panel.margins(0.12)
    panel.set(xlabel="loss on the target (nats a token)", ylabel="mean loss on the other sets (nats a token)")
    return svg(figure)


def histogram(share_below: Callable[[float], float], low: float, high: float, num: int) -> tuple[Floats, Floats]:
    """Shares of `num` samples in bins between `low` and `high`, from their cumulative distribution, and bins' edges."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, int(np.clip(2 * num**0.5, 8, 48)) + 1)
    below = np.array([share_below(edge) for edge in edges])
    below[0], below[-1] = 0.0, 1.0
    return np.diff(below), edges


def _panels(num: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.5 if num > 1 else 6.4, 3.2), layout="constrained")
    return figure, list(figure.subplots(1, num, squeeze=False)[0])


def _columns(rows: Sequence[Any], *names: str) -> tuple[Floats, ...]:
    return tuple(np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in names)


def _thinned(rows: Sequence[_Row]) -> list[_Row]:
    """At most so many rows, evenly spaced, the last among them: for what is a state or a sum at each step."""
    every = max(1, -(-len(rows) // _MAX_POINTS))
    return list(rows[::-1][::every])[::-1]


def _means(values: Sequence[float] | Floats) -> Floats:
    """Means over equal stretches, at most so many: for what is noise about a trend."""
    width = max(1, -(-len(values) // _MAX_POINTS))
    starts = np.arange(0, len(values), width)
    sums: Floats = np.add.reduceat(np.asarray(values, dtype=np.float64), starts)
    return sums / np.diff(np.append(starts, len(values)))
