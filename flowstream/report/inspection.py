"""The page of `flowstream inspect`: a data set's losses, the weights at several τ, its easiest and hardest samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from flowstream.inspection import Inspection, Tilt
from flowstream.report.extremes import SampleNote
from flowstream.report.figures import WeightCurve, histogram, loss_figure
from flowstream.report.page import narrow, page, pairs, table, text
from flowstream.report.samples import number, side_by_side

HEAD = ("τ is the", "τ (nats)", "mean weight", "ESS/n", "smallest", "largest weight", "weight on the harder half")
"""Of the table of `rows`."""
_DRAWN = ("10 % quantile", "median", "90 % quantile", "ESS/n 0.5")


def rows(tilts: Sequence[Tilt]) -> list[list[str]]:
    """A row of plain texts for each τ, under `HEAD`."""
    return [
        [
            tilt.name,
            *map(number, (tilt.tau, tilt.mean_weight, tilt.ess, tilt.smallest, tilt.largest)),
            f"{100 * tilt.hard_share:.1f} %",
        ]
        for tilt in tilts
    ]


def summary(inspection: Inspection) -> str:
    """The losses in half a line."""
    finite = inspection.finite
    left_out = inspection.losses.size - finite.size
    low, high = np.quantile(finite, [0.1, 0.9])
    return (
        f"{finite.size:,} samples, median loss {number(inspection.median)} nats, 10 to 90 %: {number(low)} to "
        f"{number(high)}{f'; {left_out:,} without a finite loss are left out' if left_out else ''}"
    )


def write_page(
    inspection: Inspection,
    path: Path,
    *,
    title: str,
    easiest: Sequence[SampleNote],
    hardest: Sequence[SampleNote],
    settings: Mapping[str, object],
) -> None:
    """Write the page; everything in it is inline."""
    finite = inspection.finite

    def share_below(loss: float) -> float:
        return float(np.searchsorted(finite, loss, side="right")) / finite.size

    shares, edges = histogram(share_below, finite[0], finite[-1], finite.size)
    curves = [
        WeightCurve(name=f"τ = {number(tilt.tau)}, {tilt.name}", tau=tilt.tau, unit=tilt.mean_weight)
        for tilt in inspection.tilts
        if tilt.name in _DRAWN and tilt.mean_weight > 0
    ]
    body = [
        f"<h1>{text(title)}</h1>",
        f"<p class='lead'>{text(summary(inspection))}.</p>",
        *(f"<p><b>{text(message)}</b></p>" for message in inspection.advice),
        "<h2>Losses, and the weights they get</h2>",
        narrow(loss_figure(shares, edges, curves, ylabel="weight / mean weight")),
        "<p>The loss of each sample under the frozen model, mean over its labelled tokens, and the weight exp(-f/τ) "
        "that FLOW gives it at several τ (dashed), each over its mean: 1 is what all would have if they weighed alike. "
        "A small τ trains on the easiest samples alone; under a large one the curve is flat.</p>",
        table(HEAD, rows(inspection.tilts)),
        "<p>FLOW's τ is the median. <b>Mean weight</b>: by how much a step of plain gradient descent shrinks; also the "
        "share of samples that resampling keeps. <b>ESS/n</b>: the effective sample size; near 1 weights carry "
        "no information. <b>Weight on the harder half</b>: 50 % where weights do not tell easy from hard. The last "
        "rows are what <code>TargetESS(fraction)</code> takes; where the mean weight is small, take it with "
        "<code>normalize=True</code>.</p>",
        "<h2>The easiest and the hardest samples</h2>",
        "<p>Left the prompt, right the response, with the weight at the median. Broken or mislabelled samples tend to "
        "be among the hardest, copies and texts known by heart among the easiest.</p>",
        *side_by_side("Easiest", easiest),
        *side_by_side("Hardest", hardest),
        "<h2>Settings</h2>",
        pairs(settings),
    ]
    path.write_text(page(title, body), encoding="utf-8")
