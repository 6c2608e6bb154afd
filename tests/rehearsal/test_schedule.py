"""How many batches are rehearsed, and where."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from flowstream.rehearsal.schedule import num_rehearsed, order


@given(
    st.floats(0.05, 0.9),
    st.lists(st.tuples(st.integers(1, 9), st.integers(50, 100)), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(60, 100),
)
def test_the_ratio_holds_over_time_to_less_than_a_step(ratio, windows, multiple, cost):
    """Windows of so many batches of such a cost, and rehearsed batches of another."""
    new = rehearsed = num = num_before = 0
    for size, each in windows:
        new += size * each
        more = num_rehearsed(
            ratio=ratio,
            new_cost=new,
            expected=each,
            rehearsed_cost=rehearsed,
            num_rehearsed=num,
            multiple=multiple,
        )
        assert more % multiple == 0
        num_before, num, rehearsed = num, num + more, rehearsed + more * cost
    late = new * ratio / (1 - ratio) - rehearsed
    # The first of them are taken to cost what the loader's batches do: at most they cost twice as much.
    assert -(new * ratio / (1 - ratio)) - 1 < late
    if len({each for _, each in windows} | {cost}) == 1:
        assert -1e-6 * new < late < cost * multiple * (1 + 1e-6)
    elif num_before:  # what one costs is known
        assert late < cost * multiple * (1 + 1e-6)


@given(st.integers(1, 40), st.integers(0, 60))
def test_rehearsed_batches_are_spread_evenly(num_new, num):
    which = order(num_new, num)
    assert len(which) == num_new + num
    assert sum(which) == num
    for begin in range(len(which)):
        for end in range(begin, len(which) + 1):
            expected = (end - begin) * num / len(which)
            assert abs(sum(which[begin:end]) - expected) < 1 + 1e-9
