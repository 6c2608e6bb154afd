"""The scoring plan of a window."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowstream.window import plan

LENGTHS = st.lists(st.integers(0, 50), max_size=60)
BUDGETS = st.integers(1, 200)


@given(LENGTHS, BUDGETS)
def test_every_sample_is_planned_once(lengths: list[int], budget: int) -> None:
    assert sorted(i for group in plan(lengths, budget) for i in group) == list(range(len(lengths)))


@given(LENGTHS, BUDGETS)
def test_a_micro_batch_fits_the_budget_or_is_a_single_sample(lengths: list[int], budget: int) -> None:
    for group in plan(lengths, budget):
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= budget


@given(LENGTHS, BUDGETS)
def test_samples_are_sorted_and_equals_keep_their_order(lengths: list[int], budget: int) -> None:
    order = [i for group in plan(lengths, budget) for i in group]
    assert order == [i for _, i in sorted((-length, i) for i, length in enumerate(lengths))]


@given(LENGTHS, BUDGETS)
def test_no_two_neighbouring_micro_batches_would_fit_in_one(lengths: list[int], budget: int) -> None:
    groups = plan(lengths, budget)
    for one, other in itertools.pairwise(groups):
        assert max(lengths[one[0]], 1) * (len(one) + 1) > budget
        assert lengths[one[-1]] >= lengths[other[0]]


def test_nothing_to_plan() -> None:
    assert plan([], 8) == []


@pytest.mark.parametrize(
    ("lengths", "budget", "message"), [([1], 0, "at least 1 token"), ([3, -1], 4, "sample 1 has length -1")]
)
def test_bad_input_is_refused(lengths: list[int], budget: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(lengths, budget)
