"""What the terminal, table.md and the report all say: one table, one verdict, drawn from the numbers alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from flowstream.compare.analysis import BASELINE, CONTROL, Judged
from flowstream.compare.intervals import Interval
from flowstream.compare.results import Choice, Figure

COST = (
    "FLOPs: 4N + 2T a trained token (forward 2N, backward through activations 2N, gradients 2 a trained parameter; "
    "N parameters, T of them trained; with T = N this is 6N), and 2N a scored token, each sample scored once a run."
)

_WORDS = {"equal_steps": "equal steps", "equal_flops": "equal FLOPs"}
_WHY = ("outside of the curve", "over budget", "diverged")


@dataclass(frozen=True, kw_only=True)
class MethodFigures:
    """Everything that the table says of a method."""

    figures: dict[str, Figure]
    """By budget."""
    gains: dict[str, Interval]
    """By budget: over standard's curve, over the seeds inside of it."""
    over_permuted: Interval | None
    """At equal steps, seed by seed less what permuted weights gain; None where they are not compared."""
    flops_ratio: float
    """FLOPs of a run at equal steps over standard's; of the chosen points' runs."""

    def is_compared(self, budget: str) -> bool:
        """Whether every seed's choice lies inside of the curve."""
        figure = self.figures[budget]
        return bool(figure.choices) and not self.left_out(budget)

    def left_out(self, budget: str) -> tuple[str, ...]:
        """What keeps some seeds' choices from being compared."""
        figure = self.figures[budget]
        counts = (figure.num_outside, figure.num_over_budget, figure.num_diverged)
        return tuple(why for why, num in zip(_WHY, counts, strict=True) if num)


def figures_of(
    judged: Sequence[Judged], flops_ratios: dict[str, float], budgets: Sequence[str]
) -> dict[str, MethodFigures]:
    """Of all seeds, by method."""
    methods = list(judged[0].choices["equal_steps"])

    def of(method: str) -> MethodFigures:
        # Where all runs at equal steps diverged, there is none at equal FLOPs.
        diverged = [seed.choices["equal_steps"][method] is None for seed in judged]
        figures = {budget: Figure.of([seed.choices[budget][method] for seed in judged], diverged) for budget in budgets}
        has_control = CONTROL in methods and method not in (BASELINE, CONTROL)
        return MethodFigures(
            figures=figures,
            gains={budget: Interval.of(seed.gain(budget, method) for seed in judged) for budget in budgets},
            over_permuted=Interval.of(
                seed.gain("equal_steps", method) - seed.gain("equal_steps", CONTROL) for seed in judged
            )
            if has_control
            else None,
            flops_ratio=flops_ratios[method],
        )

    return {method: of(method) for method in methods}


def rows_of(found: dict[str, MethodFigures]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, one a method; losses, clip rate and ‖Δθ‖ are of the points chosen at equal steps, on test."""
    budgets = list(next(iter(found.values())).figures)
    head = ["method", "target", "retained", *(_WORDS[budget] for budget in budgets)]
    has_control = CONTROL in found
    head += ["over permuted"] * has_control + ["clipped", "‖Δθ‖", "FLOPs"]
    rows = []
    for method, figures in found.items():
        choices = figures.figures["equal_steps"].choices
        row = [method, _mean(choices, lambda c: c.target_loss), _mean(choices, lambda c: c.retained_loss)]
        for budget in budgets:
            row.append("the curve" if method == BASELINE else _gain(figures.figures[budget], figures.gains[budget]))
        if has_control:
            row.append(_interval(figures.over_permuted) if figures.over_permuted is not None else "")
        row.append(_mean(choices, lambda c: c.clip_rate, "{:.0%}"))
        row.append(_mean(choices, lambda c: c.distance, "{:.2f}"))
        rows.append([*row, f"{figures.flops_ratio:.2f}×"])
    return head, rows


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that reads as one in plain text, too."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def drawn(line: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[0] = line[0].ljust(widths[0])
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([drawn(lines[0]), "| " + " | ".join(rule) + " |", *map(drawn, lines[1:])])


def verdict(found: dict[str, MethodFigures], num_seeds: int) -> str:
    """Which methods lie above standard's curve, whichever they are: the interval excludes 0, and no seed is outside."""
    others = {method: figures for method, figures in found.items() if method != BASELINE}
    if num_seeds < 2:
        return "One seed has no confidence interval: nothing is said of which method lies above standard's curve."
    sentences = []
    for budget in next(iter(found.values())).figures:
        compared = {m: f.gains[budget] for m, f in others.items() if f.is_compared(budget)}
        above, below = (
            ", ".join(f"{m} ({_interval(gain)})" for m, gain in compared.items() if gain.side == side)
            for side in (1, -1)
        )
        sentences.append(
            f"At {_WORDS[budget]}, above standard's curve with a 95 % interval that excludes 0: {above or 'none'}; "
            f"below it: {below or 'none'}."
        )
        if left_out := [m for m in others if m not in compared]:
            found_why = {why for m in left_out for why in others[m].left_out(budget)}
            whys = " or ".join(why for why in _WHY if why in found_why)
            sentences.append(f"Not said of those with a seed {whys}: {', '.join(left_out)}.")
    informed = [
        f"{m} ({_interval(f.over_permuted)})"
        for m, f in others.items()
        if f.over_permuted is not None and f.over_permuted.num == num_seeds and f.over_permuted.side == 1
    ]
    if CONTROL in found:
        sentences.append(f"Above what permuted weights gain, in the same sense: {', '.join(informed) or 'none'}.")
    num = sum(f.is_compared(budget) for f in others.values() for budget in f.figures)
    sentences.append(f"Of {num} such intervals, {num / 20:.1f} would exclude 0 by chance.")
    return " ".join(sentences)


def _gain(figure: Figure, gain: Interval) -> str:
    over, diverged = figure.num_over_budget, figure.num_diverged
    if not figure.choices and not (over and diverged):
        return "over budget" if over else "diverged"
    words = [_interval(gain)] if figure.choices else []
    words += [f"({figure.num_outside} out)"] * bool(figure.num_outside and gain.num)
    words += [f"({over} over budget)"] * bool(over) + [f"({diverged} diverged)"] * bool(diverged)
    return " ".join(words)


def _interval(interval: Interval) -> str:
    if not interval.num:
        return "outside"
    width = f"±{interval.half_width:.4f}" if math.isfinite(interval.half_width) else ""
    return f"{interval.mean:+.4f}{width}"


def _mean(choices: Sequence[Choice], of: Callable[[Choice], float], form: str = "{:.3f}") -> str:
    return form.format(statistics.fmean(map(of, choices))) if choices else "diverged"
