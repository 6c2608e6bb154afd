"""Retention against target: the curve that standard fine-tuning draws, and how far above it another method lies.

A smaller learning rate or an earlier stop forgets less and learns less. The weights of FLOW shrink the step too (AdamW
cancels a constant scale of the loss, though not a varying one), so a method is compared with standard fine-tuning *at
equal target loss*. Both axes are losses in nats: lower is better, the frontier is the lower left, convex envelope.

The curve bends, and runs lie on it at a few learning rates only. Straight lines between them would run above it (by .02
to .05 nats between learning rates a factor of 2 apart), and every method that falls between two runs would seem to
gain; so the curve is interpolated by a monotone cubic.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Frontier:
    """A smooth curve through points sorted by target loss; beyond them it is not defined."""

    target: NDArray[np.float64]
    retained: NDArray[np.float64]

    @classmethod
    def through(cls, target: ArrayLike, retained: ArrayLike) -> "Frontier":
        """The curve through all points given, equal targets averaged. ValueError where a point is not finite."""
        x, y = np.asarray(target, dtype=np.float64), np.asarray(retained, dtype=np.float64)
        if x.shape != y.shape or x.ndim != 1 or not len(x) or not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ValueError(f"a frontier goes through finite points; got targets {x.tolist()}, retained {y.tolist()}")
        levels, place = np.unique(x, return_inverse=True)
        return cls(levels, np.bincount(place, weights=y) / np.bincount(place))

    def retained_at(self, target: float) -> float:
        """Retained loss on the curve at a target loss; NaN outside the curve's range, never extrapolated."""
        x, y = self.target, self.retained
        if not x[0] <= target <= x[-1]:
            return float("nan")
        if len(x) == 1:
            return float(y[0])
        slope = _monotone_slopes(x, y)
        i = min(int(np.searchsorted(x, target, side="right")) - 1, len(x) - 2)
        width = x[i + 1] - x[i]
        t = (target - x[i]) / width
        return float(
            (1 + 2 * t) * (1 - t) ** 2 * y[i]
            + t * (1 - t) ** 2 * width * slope[i]
            + t**2 * (3 - 2 * t) * y[i + 1]
            - t**2 * (1 - t) * width * slope[i + 1]
        )

    def gain(self, target: float, retained: float) -> float:
        """How much less a point forgot than the curve at equal target loss, in nats; positive retains more."""
        return self.retained_at(target) - retained


def envelope(target: ArrayLike, retained: ArrayLike) -> list[int]:
    """Indices of the corners of the lower left, convex envelope, by ascending target.

    It runs from the lowest target loss to the lowest retained loss; no point lies below it.
    """
    x, y = np.asarray(target, dtype=np.float64), np.asarray(retained, dtype=np.float64)
    corners: list[int] = []
    lowest = np.inf
    for k in map(int, np.lexsort((y, x))):
        if y[k] >= lowest:
            continue
        lowest = y[k]
        while len(corners) > 1:
            i, j = corners[-2:]
            if (x[j] - x[i]) * (y[k] - y[i]) > (y[j] - y[i]) * (x[k] - x[i]):
                break
            corners.pop()
        corners.append(k)
    return corners


def best_sum(target: Sequence[float], retained: Sequence[float]) -> int:
    """The index of the lowest target loss plus retained loss: the same trade between the two for every method."""
    return int(np.argmin(np.asarray(target) + np.asarray(retained)))


def mean_gain(baseline: Frontier, target: Sequence[float], retained: Sequence[float]) -> float:
    """The gain of a method's envelope over a baseline: the mean over its corners within the baseline's range.

    NaN where none is within. The method itself is not interpolated.
    """
    gains = [baseline.gain(target[i], retained[i]) for i in envelope(target, retained)]
    inside = [gain for gain in gains if not np.isnan(gain)]
    return float(np.mean(inside)) if inside else float("nan")


def _monotone_slopes(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slopes at the points of a cubic without overshoot (Fritsch and Butland, 1984; one-sided ends as in SciPy)."""
    width, secant = np.diff(x), np.diff(y) / np.diff(x)
    if len(secant) == 1:
        return np.repeat(secant, 2)
    left, right = secant[:-1], secant[1:]
    w_left, w_right = 2 * width[1:] + width[:-1], width[1:] + 2 * width[:-1]
    same = left * right > 0
    inner = np.zeros_like(left)
    inner[same] = (w_left + w_right)[same] / (
        (w_left / np.where(same, left, 1) + w_right / np.where(same, right, 1))[same]
    )
    return np.concatenate(
        [
            [_end_slope(width[0], width[1], secant[0], secant[1])],
            inner,
            [_end_slope(width[-1], width[-2], secant[-1], secant[-2])],
        ]
    )


def _end_slope(near: float, far: float, secant: float, next_secant: float) -> float:
    slope = ((2 * near + far) * secant - near * next_secant) / (near + far)
    if slope * secant <= 0:
        return 0.0
    if secant * next_secant <= 0 and abs(slope) > 3 * abs(secant):
        return 3 * secant
    return slope
