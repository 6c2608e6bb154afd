"""The effective sample size that a temperature gives, read off a digest of losses, and the other way round."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flowstream.digest import Digest

__all__ = ["ess_at", "tau_at", "tau_error_at"]


def ess_at(digest: Digest, tau: float) -> float:
    """ESS/n of weights e^{-f/τ} over a distribution of losses: (E w)² / E w², read off the centroids."""
    means, shares = digest.means, digest.weights / digest.total_weight
    weights = np.exp(-(means - means[0]) / tau)
    return float((shares * weights).sum() ** 2 / (shares * weights**2).sum())


def tau_at(digest: Digest, fraction: float) -> float:
    """The τ at which ESS/n is `fraction`, by bisection in log τ; ESS/n grows with τ (log E e^{-sf} is convex in s)."""
    span = digest.maximum - digest.minimum
    low, high = np.log(max(span, 1e-300) * 1e-9), np.log(max(span, 1e-300) * 1e9)
    if ess_at(digest, np.exp(low)) >= fraction:
        return digest.quantile(0.5)
    for _ in range(60):
        middle = 0.5 * (low + high)
        if ess_at(digest, np.exp(middle)) < fraction:
            low = middle
        else:
            high = middle
    return float(np.exp(0.5 * (low + high)))


def tau_error_at(digest: Digest, tau: float) -> float:
    """Delta method: the standard error of (E w)²/E w² at this τ, over its slope in τ."""
    means, shares = digest.means, digest.weights / digest.total_weight
    weights: NDArray[np.float64] = np.exp(-(means - means[0]) / tau)
    first, second = (shares * weights).sum(), (shares * weights**2).sum()
    influence = 2 * first / second * (weights - first) - (first / second) ** 2 * (weights**2 - second)
    error = np.sqrt((shares * influence**2).sum() / digest.effective_size)
    step = 1e-4
    slope = (ess_at(digest, tau * (1 + step)) - ess_at(digest, tau * (1 - step))) / (2 * step * tau)
    return float(error / slope) if slope > 0 else float("nan")
