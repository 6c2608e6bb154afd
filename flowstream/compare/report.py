"""`report.html` of a comparison: one page that needs no network, and says what every figure means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowstream.compare import figures
from flowstream.compare.reference import Reference
from flowstream.compare.results import Curve, RunResult
from flowstream.compare.summary import COST, MethodFigures, rows_of
from flowstream.report.page import page, pairs, table, text


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The whole of a comparison."""

    settings: Mapping[str, str]
    versions: Mapping[str, str]
    reference: Reference
    seeds: Sequence[int]
    runs: Sequence[RunResult]
    curves: Sequence[Curve]
    methods: dict[str, MethodFigures]
    verdict: str


def write_report(found: Findings, path: Path) -> None:
    """Write the page; everything in it is inline."""
    sections = (_opening, _pareto, _validation, _choices, _settings)
    body = [piece for section in sections for piece in section(found)]
    path.write_text(page("flowstream compare", body), encoding="utf-8")


def _opening(found: Findings) -> Iterable[str]:
    before = found.reference.validation
    tau, ess = found.reference.tau, found.reference.ess
    weights = f"; τ is {tau:.3f} nats, and ESS/n of FLOW's weights {ess:.3f}" if math.isfinite(tau) else ""
    yield "<h1>What is retained, at equal target?</h1>"
    yield (
        f"<p class='lead'>{len(found.methods)} methods of fine-tuning, each at the same learning rates and steps, with "
        f"{len(found.seeds)} seeds; a model of {found.reference.num_parameters:,} parameters.</p>"
    )
    yield f"<p><b>{text(found.verdict)}</b></p>"
    yield table(*rows_of(found.methods))
    yield (
        "<p><b>equal steps</b>, <b>equal FLOPs</b>: the gain, that is how much lower the loss on held-out general text "
        "is than on standard fine-tuning's curve at the <i>same</i> target loss, in nats a token: mean over seeds ± "
        "half of a 95 % confidence interval (Student's t); positive retains more. Learning rate, step, strength and α "
        "are chosen on validation (lowest target plus retained loss) and valued on the test split, and so are the "
        "points of the curve. A seed is held against its own curve, which saw the same samples in the same order. "
        "“Out” counts seeds whose target lies beyond the curve: nothing is extrapolated; “over budget” those of which "
        "no step fits it; “diverged” those of which no run came to a finite loss. <b>over permuted</b>: the "
        "gain at equal steps less that of the same weights on other samples, seed by seed. <b>clipped</b>: the share "
        "of steps whose gradient was cut; <b>‖Δθ‖</b>: the distance to the start, adapters merged; <b>FLOPs</b>: a "
        f"run at equal steps over standard's. {text(COST)} “Equal FLOPs” are runs of their own, of as many steps as "
        "standard's FLOPs pay for, at the learning rate chosen at equal steps; where a step costs what standard's "
        "costs, they are those at equal steps. wise interpolates the runs of the method that it goes with. All "
        "methods have the same learning rates, though lora, for one, wants larger ones than the rest; standard runs "
        "at more of them, for its curve. Before fine-tuning, the target loss was "
        f"{before.target_loss:.3f} and the retained loss {before.retained_loss:.3f} (validation){weights}.</p>"
    )
    of_budgets = {
        budget: {method: each.figures[budget] for method, each in found.methods.items()}
        for budget in next(iter(found.methods.values())).figures
    }
    yield figures.gain_figure(of_budgets, figures.Look.of(list(found.methods)))


def _pareto(found: Findings) -> Iterable[str]:
    looks = figures.Look.of(list(found.methods))
    chosen = {method: each.figures["equal_steps"] for method, each in found.methods.items()}
    yield "<h2>Retention against target</h2>"
    yield figures.pareto_figure(found.curves, chosen, looks)
    yield (
        "<p>The test split, at equal steps; lower left is better. Black: standard's curve of each seed. Marks: a "
        "method's chosen points, mean over seeds with 95 % intervals (between seeds, not paired: the figures above are "
        "narrower).</p>"
    )


def _validation(found: Findings) -> Iterable[str]:
    looks = figures.Look.of(list(found.methods))
    before = found.reference.validation.retained_loss
    yield "<h2>Every point, on validation</h2>"
    yield figures.retention_figure(found.runs, found.seeds, looks, reference_loss=before)
    yield "<p>A mark is a run at one learning rate after some steps. Dotted: the model before fine-tuning.</p>"


def _choices(found: Findings) -> Iterable[str]:
    rows = [
        [
            method,
            budget.replace("_", " "),
            str(choice.seed),
            f"{choice.learning_rate:.2g}",
            str(choice.step),
            "" if choice.strength is None else f"{choice.strength:g}",
            "" if choice.alpha is None else f"{choice.alpha:g}",
            f"{choice.target_loss:.4f}",
            f"{choice.retained_loss:.4f}",
            f"{choice.gain:+.4f}" if choice.gain == choice.gain else "outside",
        ]
        for method, each in found.methods.items()
        for budget, figure in each.figures.items()
        for choice in figure.choices
    ]
    head = ["method", "budget", "seed", "lr", "step", "strength", "α", "target", "retained", "gain"]
    yield "<h2>What validation has chosen, and what the test split says</h2>"
    yield table(head, rows)


def _settings(found: Findings) -> Iterable[str]:
    yield "<h2>Settings and versions</h2>"
    yield pairs(found.settings)
    yield pairs(found.versions)
