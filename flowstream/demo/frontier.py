"""Retention against target: the curve that standard fine-tuning draws, and how far above it another method lies.

A smaller learning rate or an earlier stop forgets less and learns less. The weights of FLOW shrink the step too (AdamW
cancels a constant scale of the loss, though not a varying one), so a method is compared with standard fine-tuning *at
equal target loss*. Both axes are losses in nats: lower is better, the frontier is the lower left envelope.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Frontier:
    """A curve through points sorted by target loss; between them it is straight, beyond them it is not defined."""

    target: NDArray[np.float64]
    retained: NDArray[np.float64]

    @classmethod
    def through(cls, target: ArrayLike, retained: ArrayLike) -> "Frontier":
        """The curve through all points given, equal targets averaged. ValueError where a point is not finite."""
        x, y = np.asarray(target, dtype=np.float64), np.asarray(retained, dtype=np.float64)
        if x.shape != y.shape or x.ndim != 1 or not len(x) or not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ValueError(
                f"a frontier goes through finite points; got targets {x.tolist()} and retained {y.tolist()}"
            )
        levels, place = np.unique(x, return_inverse=True)
        return cls(levels, np.bincount(place, weights=y) / np.bincount(place))

    def retained_at(self, target: float) -> float:
        """Retained loss on the curve at a target loss; NaN outside the curve's range, never extrapolated."""
        if not self.target[0] <= target <= self.target[-1]:
            return float("nan")
        return float(np.interp(target, self.target, self.retained))

    def gain(self, target: float, retained: float) -> float:
        """How much less a point forgot than the curve at equal target loss, in nats; positive retains more."""
        return self.retained_at(target) - retained


def pareto(target: ArrayLike, retained: ArrayLike) -> list[int]:
    """Indices of the points that no other beats on both losses, by ascending target."""
    x, y = np.asarray(target, dtype=np.float64), np.asarray(retained, dtype=np.float64)
    kept: list[int] = []
    lowest = np.inf
    for index in np.lexsort((y, x)):
        if y[index] < lowest:
            kept.append(int(index))
            lowest = y[index]
    return kept


def best_sum(target: Sequence[float], retained: Sequence[float]) -> int:
    """The index of the lowest target loss plus retained loss: the same trade between the two for every method."""
    return int(np.argmin(np.asarray(target) + np.asarray(retained)))


def mean_gain(curve: Frontier, baseline: Frontier, num_levels: int = 64) -> float:
    """The gain of a whole curve over a baseline, averaged over the target losses that both reach; NaN without any."""
    low, high = max(curve.target[0], baseline.target[0]), min(curve.target[-1], baseline.target[-1])
    if not low < high:
        return float("nan")
    levels = np.linspace(low, high, num_levels)
    return float(np.mean([baseline.gain(level, curve.retained_at(level)) for level in levels]))
