"""Losses with known medians, and a stream of them fed to a temperature."""

from __future__ import annotations

import numpy as np

from flowstream.digest import Digest

LAWS = {
    "exponential": (lambda rng, n: rng.exponential(size=n), np.log(2)),
    "lognormal": (lambda rng, n: rng.lognormal(size=n), 1.0),
    "uniform": (lambda rng, n: rng.random(n), 0.5),
    "pareto": (lambda rng, n: 1 + rng.pareto(1.5, size=n), 2 ** (1 / 1.5)),
    "gamma": (lambda rng, n: rng.gamma(2.0, size=n), 1.6783469900166605),
}


def run(temperature, losses, window=256, ranks=1):
    """Feed a stream: sample i comes from rank i mod `ranks`."""
    for start in range(0, len(losses), window):
        part = losses[start : start + window]
        digests = [temperature.window_digest(part[rank::ranks], (0, rank), ranks) for rank in range(ranks)]
        temperature.update(Digest.merged(digests), len(part))
    return temperature
