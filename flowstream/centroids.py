"""Centroids, the sorted weighted means of a t-digest: values compressed into them, and the curve read between them.

Pure functions of arrays, in float64. Only operations that IEEE rounds alike on every CPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Centroids", "Floats", "between", "compressed", "evenly", "nodes_between"]

Floats = NDArray[np.float64]

_UNIFORM_SHARE = 0.5
# A quarter of the centroids goes to a tenth of the weight, about the quantile that is read. With more of them, or
# closer to it, the quantile of losses that drift is read where they had been told apart less.
_FOCUSED_SHARE, _FOCUSED_REACH = 0.25, 0.05


class Centroids(NamedTuple):
    """Sorted centroids, and the range of the values they stand for."""

    means: Floats
    weights: Floats
    minimum: float
    maximum: float


@lru_cache(maxsize=8)
def _grid(max_centroids: int, focus: float | None = None) -> Floats:
    """Left edges in q of the centroids' cells: the scale function's inverse, by the solution of a quadratic in √q."""
    if focus is not None:
        num = int(_FOCUSED_SHARE * max_centroids)
        about = np.linspace(max(focus - _FOCUSED_REACH, 0.0), min(focus + _FOCUSED_REACH, 1.0), num)
        return np.sort(np.concatenate([_grid(max_centroids - num), about]))
    k = np.arange(max_centroids) / max_centroids
    root = (1 - _UNIFORM_SHARE) / np.sqrt(2)
    lower_k = np.minimum(k, 1 - k)
    lower_q = ((np.sqrt(root * root + 4 * _UNIFORM_SHARE * lower_k) - root) / (2 * _UNIFORM_SHARE)) ** 2
    return np.asarray(np.where(k <= 0.5, lower_q, 1 - lower_q))


def compressed(
    values: Floats, weights: Floats, max_centroids: int, focus: float | None = None
) -> tuple[Floats, Floats]:
    """Sorted centroids `[C]` of weighted values `[N]`: C = N while that is few enough, else at most `max_centroids`.

    They are closer to each other about the quantile `focus`.
    """
    if not (weights > 0).all():
        values, weights = values[weights > 0], weights[weights > 0]
    order = np.argsort(values, kind="stable")
    values, weights = values[order] + 0.0, weights[order]
    if values.size <= max_centroids:
        return values, weights
    right_edges = np.cumsum(weights)
    middles = np.concatenate([right_edges[:1], right_edges[:-1] + right_edges[1:]])
    middles[1:] *= 0.5
    middles[0] *= 0.5
    cells = np.searchsorted(middles, _grid(max_centroids, focus) * right_edges[-1])
    starts = cells[(np.diff(cells, prepend=-1) > 0) & (cells < values.size)]
    sums = np.add.reduceat(weights, starts)
    means = np.add.reduceat(values * weights, starts) / sums
    last = np.append(starts[1:], values.size) - 1
    # Rounding must neither move an atom nor let neighbours change places.
    return np.clip(means, values[starts], values[last]), sums


def evenly(values: Floats, weights: Floats, num: int) -> tuple[Floats, Floats]:
    """`num` centroids of one weight, of ascending values `[N]`: those at the edge of two count to both in part."""
    right_edges = np.cumsum(weights)
    edges = np.linspace(0.0, right_edges[-1], num + 1)
    sums = np.interp(edges, np.append(0.0, right_edges), np.append(0.0, np.cumsum(values * weights)))
    unit = right_edges[-1] / num
    return np.maximum.accumulate(np.clip(np.diff(sums) / unit, values[0], values[-1])), np.full(num, unit)


def nodes_between(centroids: Centroids, effective_size: float) -> tuple[Floats, Floats]:
    """Positions (cumulative weight) and values, both ascending, between which quantiles are interpolated.

    Every centroid stands at the middle of its weight; the extremes half a value's weight from the ends.
    With equal weights and single values they are numpy's for linear quantiles.
    """
    means, weights, minimum, maximum = centroids
    if not means.size:
        return means, means
    right_edges = np.cumsum(weights)
    middles = np.maximum.accumulate(right_edges - 0.5 * weights)
    half_value = 0.5 * right_edges[-1] / effective_size
    first, last = min(half_value, middles[0]), max(right_edges[-1] - half_value, middles[-1])
    return np.concatenate([[first], middles, [last]]), np.concatenate([[minimum], means, [maximum]])


def between(x: float, xs: Floats, ys: Floats) -> float:
    """The line through two nodes at `x`, within the nodes' own range whatever the rounding."""
    width = xs[1] - xs[0]
    share = min(max((x - xs[0]) / width, 0.0), 1.0) if width > 0 else 0.0
    return float(min(max(ys[0] + share * (ys[1] - ys[0]), ys[0]), ys[1]))
