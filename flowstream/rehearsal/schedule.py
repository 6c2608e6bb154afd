"""How many rehearsed batches a window gets, and where they stand in it. Pure: every rank comes to the same."""

from __future__ import annotations

import itertools
import math


def num_rehearsed(
    *, ratio: float, new_cost: int, expected: float, rehearsed_cost: int, num_rehearsed: int, multiple: int = 1
) -> int:
    """Batches that each rank rehearses now, a multiple of `multiple`, so that `ratio` of all compute is rehearsed.

    What no whole batch fits into is left for the next window.

    Args:
        new_cost: of the loader's batches on all ranks, in all windows, this one among them.
        expected: cost of a rehearsed batch on all ranks, for as long as there was none.
        rehearsed_cost: of rehearsed batches on all ranks before.
        num_rehearsed: how many such batches each rank had: with the cost it tells what one takes.

    >>> num_rehearsed(ratio=0.25, new_cost=128, expected=16, rehearsed_cost=0, num_rehearsed=0)
    2
    """
    due = new_cost * ratio / (1 - ratio) - rehearsed_cost
    each = rehearsed_cost / num_rehearsed if rehearsed_cost else expected
    if not (due > 0 and each > 0):
        return 0
    return math.floor(due / (each * multiple) + 1e-9) * multiple


def order(num_new: int, num_rehearsed: int) -> list[bool]:
    """Which deliveries of a window are rehearsed: evenly spread.

    >>> order(3, 1)
    [False, True, False, False]
    """
    num = num_new + num_rehearsed
    taken = [((i * num_rehearsed) + num // 2) // num for i in range(num + 1)]
    return [after > before for before, after in itertools.pairwise(taken)]
