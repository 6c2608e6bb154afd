"""A window's scoring plan: which samples are read together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Layout(Protocol):
    """How samples are brought together in a micro-batch: as rows that are padded, or one after the other."""

    def plan(self, lengths: Sequence[int], budget: int) -> list[list[int]]:
        """Micro-batches over a whole window: lists of indices into `lengths`, longest samples first.

        Samples are sorted by length (stable: equals keep their order), then cut so that the `size` of each micro-batch
        is within the budget; a sample longer than it is a micro-batch of its own. Every index appears once. Pure: the
        same lengths give the same plan. `ValueError` for a budget below 1 or a negative length.
        """

    def size(self, lengths: Sequence[int]) -> int:
        """Tokens of a micro-batch of samples of these lengths, with what fills it up."""


@dataclass(frozen=True)
class Padded:
    """Each sample a row, as long as the longest.

    >>> Padded().plan([3, 9, 4, 2], budget=9)
    [[1], [2, 0], [3]]
    """

    def plan(self, lengths: Sequence[int], budget: int) -> list[list[int]]:
        micro_batches: list[list[int]] = []
        room = 0
        for index in _longest_first(lengths, budget):
            if room == 0:
                micro_batches.append([])
                room = max(budget // max(lengths[index], 1), 1)
            micro_batches[-1].append(index)
            room -= 1
        return micro_batches

    def size(self, lengths: Sequence[int]) -> int:
        return max(lengths) * len(lengths)


@dataclass(frozen=True)
class Packed:
    """Samples one after the other in a single row, without padding between them.

    The packs of a window are of like size, and filled up to one of few shapes.

    >>> Packed().plan([3, 9, 4, 2], budget=10)
    [[1], [2, 0, 3]]
    >>> Packed(multiple=8).size([4, 3, 2])
    16
    """

    multiple: int = 1
    """A pack's size is a multiple of it: few shapes, where each new one costs (memory pools, compilation)."""

    def plan(self, lengths: Sequence[int], budget: int) -> list[list[int]]:
        packs: list[list[int]] = []
        # A budget below the multiple still counts, of what is read: memory that ran out makes it smaller and smaller.
        budget = budget // self.multiple * self.multiple or budget
        left, size, target = sum(lengths), 0, 0
        for index in _longest_first(lengths, budget):
            length = lengths[index]
            if not packs or size + length > target:
                # What is left, in as few packs as the budget allows, all of like size. Samples do not fit exactly: half
                # of one is what a pack overshoots or lacks.
                num_packs = -(-left // budget) or 1
                target = min(self._filled(left / num_packs + length / 2), budget)
                packs.append([])
                size = 0
            packs[-1].append(index)
            size += length
            left -= length
        return packs

    def size(self, lengths: Sequence[int]) -> int:
        return self._filled(sum(lengths))

    def _filled(self, size: float) -> int:
        return math.ceil(size / self.multiple) * self.multiple


def _longest_first(lengths: Sequence[int], budget: int) -> list[int]:
    """Memory runs out at the first step, if at all, and later micro-batches fit in what it freed."""
    if budget < 1:
        raise ValueError(f"a micro-batch needs a budget of at least 1 token, not {budget}")
    if lengths and (shortest := min(lengths)) < 0:
        raise ValueError(f"sample {lengths.index(shortest)} has length {shortest}: a length is at least 0")
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def fill_batches(
    lengths: Sequence[int], num_batches: int, max_rows: int, max_area: int, multiple: int = 1
) -> tuple[list[list[int]], int]:
    """Rows of these lengths into at most `num_batches` batches, in their order.

    A batch has at most `max_rows` rows, and rows times its longest length, rounded up to a `multiple`, is at most
    `max_area` (or it holds a single row). Returns the batches, each a list of indices into `lengths`, and how many rows
    they hold: always the first ones. Rows of like lengths are not brought together: that would save padding, but also
    gather samples of one kind in one batch, which was measured to train worse (benchmarks/RESULTS.md).

    >>> fill_batches([5, 2, 9, 2, 5], num_batches=2, max_rows=2, max_area=20)
    ([[0, 1], [2, 3]], 4)
    """
    groups: list[list[int]] = []
    widest = 0
    for i, length in enumerate(lengths):
        width = -(-length // multiple) * multiple
        widest = max(widest, width)
        if not groups or len(groups[-1]) == max_rows or (len(groups[-1]) + 1) * widest > max_area > 0:
            if len(groups) == num_batches:
                return groups, i
            groups.append([])
            widest = width
        groups[-1].append(i)
    return groups, len(lengths)
