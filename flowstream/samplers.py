"""Samplers: the weights of a window's candidates, and one uniform number, say how often each is delivered.

All is pure: the uniform number u comes from `flowstream.randomness`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Systematic", "Thin", "chunk_size"]

# Running sums are kept on a grid of 2^-36: additions are then exact in float64 (up to a mass of 2^17 a window), so that
# no rounding can deliver a sample twice, and the split into chunks cannot matter.
_GRID = 2.0**36


@dataclass(frozen=True)
class Thin:
    """Keep each sample with probability c·w: copies_i = ⌊C_i + u⌋ - ⌊C_{i-1} + u⌋, C the running sum of c·w.

    `scale` is c. A sample with c·w ≤ 1 is delivered at most once; one above it, ⌊c·w⌋ or ⌈c·w⌉ times. The expected
    number of copies is c·w for every candidate (to 2^-37), so any sum over what is emitted is unbiased for its weighted
    sum over the stream, *provided that the candidates of a window do not depend on its u*: stop by `enough`.
    Raises ValueError unless `scale` is finite and above 0.
    Source: systematic sampling with unequal probabilities (Madow, 1949), for the weights of arXiv 2502.02797.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"Thin(scale={self.scale}): give a finite number above 0, such as 1")

    def draw(self, weights: ArrayLike, start: float, u: float) -> tuple[NDArray[np.int64], float]:
        """Copies [n] int64 of a chunk of candidates with weights [n], and C after it.

        `start`: C before the chunk, 0 at the window's first; `u`: in [0, 1), the same for all chunks of a window.
        How candidates are split into chunks does not matter. Raises ValueError for weights that are not finite and ≥ 0.

        >>> Thin().draw([0.5, 0.25, 0.5, 1.0], start=0.0, u=0.3)
        (array([0, 1, 0, 1]), 2.25)
        """
        steps = np.rint(_checked(weights) * self.scale * _GRID) / _GRID
        running = np.cumsum(np.concatenate([[start], steps]))
        return np.diff(np.floor(running + _on_grid(u))).astype(np.int64), float(running[-1])

    def enough(self, end: float, wanted: int) -> bool:
        """Whether candidates with running sum C = `end` suffice for `wanted` samples (those carried over taken off).

        True once ⌊C⌋ ≥ wanted, and then at least `wanted` are kept whatever u is. To stop by the number that *was*
        kept would be biased: u would choose its own candidates, and a window would end just where u was lucky.
        """
        return math.floor(end) >= wanted


@dataclass(frozen=True)
class Systematic:
    """A fixed number of samples a window, with probabilities ∝ w within it. Biased between windows.

    `oversample`: candidates a delivered sample. Every window delivers the same number, so weights count only against
    those of the same window: on a stream sorted by difficulty FLOW gives the hard half 22 % of the mass, this sampler
    50 %. Use it on well-shuffled streams, where a window resembles the whole; otherwise `Thin`.
    Raises ValueError unless `oversample` is finite and 1 or above. Source: Kitagawa, 1996, systematic resampling.
    """

    oversample: float = 4.0

    def __post_init__(self) -> None:
        if not 1 <= self.oversample < math.inf:
            raise ValueError(f"Systematic(oversample={self.oversample}): give a finite number of 1 or above, such as 4")

    def num_candidates(self, num_batches: int) -> int:
        """Loader batches that are pulled for a window of `num_batches` delivered ones."""
        return math.ceil(self.oversample * num_batches)

    def draw(self, weights: ArrayLike, num: int, u: float) -> NDArray[np.int64]:
        """Copies [n] int64, which sum to exactly `num`, of candidates with weights [n]; `u` in [0, 1).

        Raises ValueError where all weights are 0, or where one is negative or not finite.

        >>> Systematic().draw([0.5, 0.25, 0.5, 0.0, 0.75], num=4, u=0.3)
        array([1, 0, 1, 0, 2])
        """
        checked = _checked(weights)
        if num < 0:
            raise ValueError(f"num is {num}; ask for 0 samples or more")
        if num == 0:
            return np.zeros(len(checked), dtype=np.int64)
        if not checked.any():
            raise ValueError(
                f"all {len(checked)} weights of the window are 0, so {num} samples cannot be drawn from it; raise the "
                "temperature or the window, or use Thin(), which passes over such windows"
            )
        running = np.cumsum(checked / checked.max())
        edges = np.floor(running / running[-1] * num + _on_grid(u)).clip(0, num)
        edges[running == running[-1]] = num
        copies: NDArray[np.int64] = np.diff(edges, prepend=0.0).astype(np.int64)
        return copies


def chunk_size(missing: float, mean_weight: float, batch_size: int, *, margin: float, limit: int) -> int:
    """Whole loader batches to pull next, from 1 to `limit`, in order to gain `margin` times the `missing` mass.

    `missing`: wanted samples less C; `mean_weight`: expected c·w a candidate. For `Thin` to stay unbiased neither may
    come from this window's u. A mean that is unknown (NaN) or 0 gives `limit`. Raises ValueError for sizes below 1.

    >>> chunk_size(missing=32.0, mean_weight=0.4, batch_size=8, margin=1.0, limit=64)
    10
    """
    if batch_size < 1 or limit < 1 or not margin > 0:
        raise ValueError(f"batch_size {batch_size} and limit {limit} must be 1 or more, margin {margin} above 0")
    if missing <= 0:
        return 1
    gain = mean_weight * batch_size
    if not gain * limit > margin * missing:  # also where the mean is NaN
        return limit
    return max(1, math.ceil(margin * missing / gain))


def _checked(weights: ArrayLike) -> NDArray[np.float64]:
    """Weights [n] in float64, each finite and 0 or above."""
    array = np.asarray(weights, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"weights have shape {list(array.shape)}; resampling is by sample, so give one a sample, [n]")
    bad = ~(np.isfinite(array) & (array >= 0))
    if bad.any():
        raise ValueError(f"weight {array[bad][0]} of sample {bad.argmax()} of the chunk; give finite weights ≥ 0")
    return array


def _on_grid(u: float) -> float:
    if not 0 <= u < 1:
        raise ValueError(f"u is {u}; give a number in [0, 1), such as uniform((seed, epoch, window, rank))")
    return math.floor(u * _GRID) / _GRID
