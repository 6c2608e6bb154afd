"""Which prior samples are rehearsed next: bins by rate times size, and samples within each in turn. Counter-based."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flowstream.randomness import permutation, uniforms
from flowstream.rehearsal.bins import Bins

Ints = NDArray[np.int64]


class Draws:
    """Draws samples of one rank. Pure but for permutations that are kept: the arguments decide.

    Ranks share one permutation a pass over a bin and take turns in it: as long as they have drawn alike from the bin,
    none has drawn what another has.
    """

    def __init__(self, bins: Bins, *, seed: int, rank: int, world_size: int) -> None:
        self._bins = bins
        self._seed = seed
        self._rank, self.world_size = rank, world_size
        self._orders: dict[int, tuple[int, Ints]] = {}

    def bins(self, num: int, rates: NDArray[np.float64], place: Sequence[int]) -> Ints:
        """[num] bins, each k with probability ∝ rates[k] · |D_k|. `place`: (epoch, window)."""
        edges = np.cumsum(rates * self._bins.sizes)
        drawn = uniforms(num, (self._seed, *place, self._rank), use="rehearsed bins")
        found: Ints = np.searchsorted(edges, drawn * edges[-1], side="right").clip(max=len(edges) - 1)
        return found

    def sample(self, k: int, turn: int) -> int:
        """The sample of this rank's `turn`-th draw from bin k, counted from 0."""
        members = self._bins.members[k]
        number, at = divmod(turn * self.world_size + self._rank, len(members))
        if self._orders.get(k, (-1,))[0] != number:
            self._orders[k] = number, permutation(len(members), (self._seed, k, number), use="rehearsed samples")
        return int(members[self._orders[k][1][at]])
