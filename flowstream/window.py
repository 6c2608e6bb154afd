"""A window's scoring plan: which samples are read together."""

from __future__ import annotations

from collections.abc import Sequence


def plan(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Micro-batches over a whole window: lists of indices into `lengths`, longest samples first.

    Samples are sorted by length (stable: equals keep their order), then cut so that `max_length * count <= budget` in
    every micro-batch; a sample longer than the budget is a micro-batch of its own. Every index appears once. Pure: the
    same lengths give the same plan. `ValueError` for a budget below 1 or a negative length.

    >>> plan([3, 9, 4, 2], budget=9)
    [[1], [2, 0], [3]]
    """
    if budget < 1:
        raise ValueError(f"a micro-batch needs a budget of at least 1 token, not {budget}")
    micro_batches: list[list[int]] = []
    room = 0
    # Longest first: memory runs out at the first step, if at all, and later micro-batches fit in what it freed.
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length < 0:
            raise ValueError(f"sample {index} has length {length}: a length is at least 0")
        if room == 0:
            micro_batches.append([])
            room = max(budget // max(length, 1), 1)
        micro_batches[-1].append(index)
        room -= 1
    return micro_batches


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
