"""The rate of collateral damage of each bin: a Beta posterior that forgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Damage:
    """What was seen of each bin, in samples; older ones count less. A pure value: equal input gives equal bits."""

    num: tuple[float, ...]
    """[K] rehearsed samples that feedback was given on, …"""
    damaged: tuple[float, ...]
    """… and those among them that the prior model got right and the tuned one wrong."""
    prior_counts: tuple[float, float] = (1.0, 1.0)
    half_life: float | None = None
    """In samples, over all bins: a bin that is not drawn is forgotten, too, and so drawn again."""

    @classmethod
    def unknown(cls, num_bins: int, prior_counts: tuple[float, float], half_life: float | None) -> Self:
        """Of bins of which nothing was seen."""
        nothing = (0.0,) * num_bins
        return cls(nothing, nothing, (float(prior_counts[0]), float(prior_counts[1])), half_life)

    def updated(self, num: Sequence[int], damaged: Sequence[int]) -> Self:
        """After `num` [K] further samples, `damaged` [K] of them."""
        kept = 1.0 if self.half_life is None else 0.5 ** (sum(num) / self.half_life)
        return replace(
            self,
            num=tuple(kept * before + new for before, new in zip(self.num, num, strict=True)),
            damaged=tuple(kept * before + new for before, new in zip(self.damaged, damaged, strict=True)),
        )

    @property
    def rates(self) -> Floats:
        """[K] posterior means (a + damaged) / (a + b + num), in (0, 1)."""
        a, b = self.prior_counts
        return (a + np.array(self.damaged)) / (a + b + np.array(self.num))
