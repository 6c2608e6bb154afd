"""The scoring plan of a window, and how rows that are kept fill its batches."""

from __future__ import annotations

import doctest
import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowstream import window
from flowstream.window import Layout, Packed, Padded, fill_batches

LENGTHS = st.lists(st.integers(0, 50), max_size=60)
BUDGETS = st.integers(1, 200)


LAYOUTS = st.sampled_from([Padded(), Packed(), Packed(multiple=8)])


@given(LAYOUTS, LENGTHS, BUDGETS)
def test_every_sample_is_planned_once(layout: Layout, lengths: list[int], budget: int) -> None:
    assert sorted(i for group in layout.plan(lengths, budget) for i in group) == list(range(len(lengths)))


@given(LENGTHS, BUDGETS)
def test_padded_rows_fit_the_budget_or_are_a_single_sample(lengths: list[int], budget: int) -> None:
    for group in Padded().plan(lengths, budget):
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= budget


@given(st.integers(1, 16), LENGTHS, BUDGETS)
def test_a_filled_pack_fits_the_budget_or_is_a_single_sample(multiple: int, lengths: list[int], budget: int) -> None:
    layout = Packed(multiple)
    for group in layout.plan(lengths, budget):
        size = layout.size([lengths[i] for i in group])
        assert sum(lengths[i] for i in group) <= size < sum(lengths[i] for i in group) + multiple
        assert size % multiple == 0
        assert len(group) == 1 or size <= max(budget, multiple)
        # What fills it up aside, so that halving a budget ends.
        assert len(group) == 1 or sum(lengths[i] for i in group) <= budget


@given(LAYOUTS, LENGTHS, BUDGETS)
def test_samples_are_sorted_and_equals_keep_their_order(layout: Layout, lengths: list[int], budget: int) -> None:
    order = [i for group in layout.plan(lengths, budget) for i in group]
    assert order == [i for _, i in sorted((-length, i) for i, length in enumerate(lengths))]


@given(LENGTHS, BUDGETS)
def test_no_two_neighbouring_micro_batches_would_fit_in_one(lengths: list[int], budget: int) -> None:
    groups = Padded().plan(lengths, budget)
    for one, other in itertools.pairwise(groups):
        assert max(lengths[one[0]], 1) * (len(one) + 1) > budget
        assert lengths[one[-1]] >= lengths[other[0]]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(100, 400))
def test_packs_are_few_and_of_like_size(lengths: list[int], budget: int) -> None:
    sizes = [sum(lengths[i] for i in group) for group in Packed().plan(lengths, budget)]
    fewest = math.ceil(sum(lengths) / budget)
    assert fewest <= len(sizes) <= math.ceil(sum(lengths) / (budget - max(lengths))) + 1
    assert max(sizes) - min(sizes) <= 3 * max(lengths) or len(sizes) > fewest


def test_windows_of_one_kind_have_few_shapes_and_little_filling() -> None:
    generator = random.Random(0)
    layout, shapes, filled, real = Packed(multiple=1024), set(), 0, 0
    for _ in range(50):
        lengths = [min(int(generator.lognormvariate(5.2, 0.5)), 1024) for _ in range(256)]
        packs = [[lengths[i] for i in pack] for pack in layout.plan(lengths, 16384)]
        shapes |= {layout.size(pack) for pack in packs}
        filled += sum(map(layout.size, packs))
        real += sum(map(sum, packs))
    assert len(shapes) <= 16
    assert filled / real < 1.05


@pytest.mark.parametrize("layout", [Padded(), Packed(), Packed(8)])
def test_nothing_to_plan(layout: Layout) -> None:
    assert layout.plan([], 8) == []


@pytest.mark.parametrize("layout", [Padded(), Packed(), Packed(8)])
@pytest.mark.parametrize(
    ("lengths", "budget", "message"), [([1], 0, "at least 1 token"), ([3, -1], 4, "sample 1 has length -1")]
)
def test_bad_input_is_refused(layout: Layout, lengths: list[int], budget: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.plan(lengths, budget)


# Filling batches


def area(group: list[int], lengths: list[int], multiple: int) -> int:
    longest = max(lengths[i] for i in group)
    return len(group) * next(width for width in itertools.count(longest) if width % multiple == 0)


def fewest_batches(lengths: list[int], max_rows: int, max_area: int, multiple: int) -> int:
    """Over every cut of the rows in their order: which the limits allow, and which takes the fewest batches."""
    order = list(range(len(lengths)))
    fewest = [0]
    for end in range(1, len(order) + 1):
        fewest.append(
            min(
                fewest[start] + 1
                for start in range(max(end - max_rows, 0), end)
                if end - start == 1 or not max_area or area(order[start:end], lengths, multiple) <= max_area
            )
        )
    return fewest[-1]


FILLS = st.tuples(
    st.lists(st.integers(0, 12), max_size=24),
    st.integers(0, 5),
    st.integers(1, 5),
    st.sampled_from([0, 3, 12, 25, 40]),
    st.sampled_from([1, 4]),
)


@settings(deadline=None)
@given(FILLS)
def test_filled_batches_keep_the_limits(fill: tuple[list[int], int, int, int, int]) -> None:
    lengths, num_batches, max_rows, max_area, multiple = fill
    groups, _ = fill_batches(*fill)
    assert len(groups) <= num_batches
    for group in groups:
        assert 1 <= len(group) <= max_rows
        assert len(group) == 1 or not max_area or area(group, lengths, multiple) <= max_area


@settings(deadline=None)
@given(FILLS)
def test_the_first_rows_are_used_each_once(fill: tuple[list[int], int, int, int, int]) -> None:
    groups, num = fill_batches(*fill)
    assert sorted(i for group in groups for i in group) == list(range(num))


@settings(deadline=None)
@given(FILLS)
def test_rows_keep_their_order(fill: tuple[list[int], int, int, int, int]) -> None:
    order = [i for group in fill_batches(*fill)[0] for i in group]
    assert order == sorted(order)


@settings(deadline=None)
@given(FILLS)
def test_as_many_rows_are_used_as_the_batches_can_hold(fill: tuple[list[int], int, int, int, int]) -> None:
    lengths, num_batches, *limits = fill
    _, num = fill_batches(*fill)
    held = [n for n in range(len(lengths) + 1) if fewest_batches(lengths[:n], *limits) <= num_batches]
    assert num == max(held)


def test_without_lengths_only_rows_count() -> None:
    assert fill_batches([0] * 5, num_batches=2, max_rows=2, max_area=0) == ([[0, 1], [2, 3]], 4)


def test_a_row_too_large_for_any_batch_has_its_own() -> None:
    assert fill_batches([9, 1, 1], num_batches=2, max_rows=4, max_area=4) == ([[0], [1, 2]], 3)


def test_nothing_to_fill() -> None:
    assert fill_batches([], 3, 2, 8) == fill_batches([1, 2], 0, 2, 8) == ([], 0)


def test_docstring_examples_run() -> None:
    assert doctest.testmod(window).failed == 0
