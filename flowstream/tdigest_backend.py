"""The package `tdigest`: a backend of τ, and the format in which digests are exchanged. Only this file imports it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from flowstream.centroids import Floats
from flowstream.digest import Digest

__all__ = ["PackageDigest", "from_tdigest", "to_tdigest"]


class PackageDigest:
    """A running `tdigest.TDigest`: fed a window's centroids, in an order and with draws that its seed fixes.

    The package inserts a value in some 30 µs, hence centroids and only so many of them. The sums in its tree depend on
    the order of insertion in their last digits, hence a tree rebuilt after every window: a reloaded one is the same.
    """

    centroids_per_window = 128

    def __init__(self) -> None:
        self._tree = _tree_of(np.empty(0), np.empty(0))
        self._num_values = 0
        self._sum_squares = 0.0

    def update(self, window: Digest, decay: float, seed: str) -> None:
        """Merge a window into the past, whose weights are multiplied by `decay` first."""
        few = Digest(self.centroids_per_window)
        few.merge(window)
        centroids = list(zip(few.means.tolist(), few.weights.tolist(), strict=True))
        means, counts = from_tdigest(self._tree)
        tree = _tree_of(means, counts * decay)
        state = random.getstate()
        try:
            random.seed(seed)
            random.shuffle(centroids)
            for mean, weight in centroids:
                tree.update(mean, weight)
        finally:
            random.setstate(state)
        self._tree = _tree_of(*from_tdigest(tree))
        self._num_values += window.num_values
        self._sum_squares = self._sum_squares * decay * decay + window.sum_squares

    def quantile(self, q: float) -> float:
        """The package's own reading of it."""
        return float(self._tree.percentile(100 * q))

    def to_digest(self) -> Digest:
        """The same centroids as ours."""
        return Digest.from_tdigest(self._tree, num_values=self._num_values, sum_squares=self._sum_squares)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and a float64 tensor `[2, C]`: means and counts."""
        return {
            "centroids": torch.from_numpy(np.stack(from_tdigest(self._tree))),
            "num_values": self._num_values,
            "sum_squares": self._sum_squares,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> PackageDigest:
        """What `state_dict` described."""
        result = cls()
        result._tree = _tree_of(*state["centroids"].numpy())
        result._num_values, result._sum_squares = state["num_values"], state["sum_squares"]
        return result


def to_tdigest(means: Floats, weights: Floats) -> Any:
    """A `tdigest.TDigest` with centroids of ascending means `[C]` and weights `[C]`, those of equal mean in one.

    Draws nothing on Python's `random`. Raises `ImportError`, naming the extra, where the package is not installed.
    """
    unique, starts = np.unique(means, return_index=True)
    sums = np.add.reduceat(weights, starts) if means.size else weights
    return _tree_of(unique, sums)


def from_tdigest(tree: Any) -> tuple[Floats, Floats]:
    """Means `[C]`, ascending, and counts `[C]` of a `tdigest.TDigest`'s centroids, in float64."""
    pairs = [(centroid["m"], centroid["c"]) for centroid in tree.centroids_to_list()]
    means, counts = np.array(pairs, dtype=np.float64).reshape(-1, 2).T.copy()
    return means, counts


def _tree_of(means: Floats, counts: Floats) -> Any:
    """A `tdigest.TDigest` with these centroids, those without weight left out, inserted in their order."""
    try:
        from tdigest import TDigest
        from tdigest.tdigest import Centroid
    except ImportError as error:
        raise ImportError("the tdigest package is not installed: pip install 'flowstream[tdigest]'") from error
    tree = TDigest()
    for mean, count in zip(means.tolist(), counts.tolist(), strict=True):
        if count > 0:
            tree.C.insert(mean, Centroid(mean, count))
            tree.n += count
    return tree
