"""The prior data in bins: by the prior model's loss, by a label, or both. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowstream.digest import Digest


@dataclass(frozen=True, eq=False)
class Bins:
    """A partition of the prior samples: every bin has at least one."""

    members: tuple[NDArray[np.int64], ...]
    """The samples of each, ascending."""
    of: NDArray[np.int64]
    """[N] the bin of each sample."""
    names: tuple[str, ...]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """[K]"""
        return np.array([len(one) for one in self.members], dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """Equal for equal partitions."""
        return f"{len(self.members)} bins {hashlib.blake2b(self.of.tobytes(), digest_size=8).hexdigest()}"


def partition(losses: NDArray[np.float32] | None, labels: Sequence[str] | None, num_bins: int, num: int) -> Bins:
    """`num` samples in bins: `num_bins` by their `losses` [N] (nats), each value of `labels` [N] for itself.

    Edges are quantiles of a digest of all losses, so that they are the same on any number of ranks. A loss that is not
    finite is in the last bin. Bins without a sample are left out.

    >>> partition(np.array([3.0, 1.0, 2.0, 9.0]), None, 2, 4).of
    array([1, 0, 0, 1])
    """
    by_loss = np.zeros(num, dtype=np.int64)
    edges = np.empty(0)
    if losses is not None and num_bins > 1:
        digest = Digest(max_centroids=max(500, 8 * num_bins))
        digest.add(losses[np.isfinite(losses)])
        if digest.num_values:
            edges = np.unique([digest.quantile(i / num_bins) for i in range(1, num_bins)])
            by_loss = np.searchsorted(edges, losses, side="left").astype(np.int64)
    kinds = sorted(set(labels)) if labels is not None else [""]
    number_of = {kind: number for number, kind in enumerate(kinds)}
    by_label = np.array([number_of[label] for label in labels], dtype=np.int64) if labels is not None else 0
    cells, of = np.unique(by_label * (len(edges) + 1) + by_loss, return_inverse=True)
    names = []
    for cell in cells.tolist():
        kind, place = kinds[cell // (len(edges) + 1)], cell % (len(edges) + 1)
        low = f"{edges[place - 1]:.4g}" if place else "0"
        high = f"{edges[place]:.4g}" if place < len(edges) else "∞"
        names.append(" ".join(part for part in (kind, f"{low}-{high} nats" if len(edges) else "") if part) or "all")
    members = tuple(np.flatnonzero(of == k) for k in range(len(cells)))
    return Bins(members, of.astype(np.int64), tuple(names))
