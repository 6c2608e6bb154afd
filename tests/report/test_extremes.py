"""Extremes against sorting all that was seen."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowstream.report.extremes import Extremes


def places_of(notes: Any) -> list[str]:
    return [note.place for note in notes]


def add(extremes: Extremes, samples: list[tuple[str, float]]) -> None:
    losses = [loss for _, loss in samples]
    extremes.add(losses, [math.exp(-loss) for loss in losses], [place for place, _ in samples], lambda row: ("p", "r"))


def table_of(samples: dict[str, float], k: int) -> tuple[list[str], list[str]]:
    order = sorted(samples, key=lambda place: (samples[place], place))
    return order[:k], order[::-1][:k]


SAMPLES = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(0, 5).map(float), max_size=30)


@given(samples=SAMPLES, k=st.integers(1, 4), seed=st.randoms(use_true_random=False))
def test_extremes_are_those_of_a_sort_in_whatever_order_and_however_often_samples_come(
    samples: dict[str, float], k: int, seed: Any
) -> None:
    extremes = Extremes(k)
    for _ in range(2):
        order = list(samples.items())
        seed.shuffle(order)
        add(extremes, order[: len(order) // 2])
        add(extremes, order[len(order) // 2 :])
    assert (places_of(extremes.easiest), places_of(extremes.hardest)) == table_of(samples, k)


@given(samples=SAMPLES, k=st.integers(1, 4))
def test_merged_ranks_and_a_state_keep_what_one_rank_would(samples: dict[str, float], k: int) -> None:
    order = list(samples.items())
    ranks = [Extremes(k), Extremes(k)]
    for rank, extremes in enumerate(ranks):
        add(extremes, order[rank::2])
    merged = Extremes.from_state_dict(ranks[0].state_dict())
    merged.merge(ranks[1])
    assert (places_of(merged.easiest), places_of(merged.hardest)) == table_of(samples, k)


@given(samples=SAMPLES, k=st.integers(1, 4))
def test_no_sample_is_shown_on_both_sides(samples: dict[str, float], k: int) -> None:
    extremes = Extremes(k)
    add(extremes, list(samples.items()))
    easiest, hardest = extremes.sides()
    shown = places_of(easiest) + places_of(hardest)
    assert len(shown) == len(set(shown)) == min(len(samples), 2 * k)
    assert all(easy.loss <= hard.loss for easy in easiest for hard in hardest)


def test_only_what_is_kept_is_decoded_and_losses_that_are_not_finite_are_not_kept() -> None:
    decoded = []

    def texts(row: int) -> tuple[str, str]:
        decoded.append(row)
        return ("prompt", "response " * 1000)

    extremes = Extremes(1)
    extremes.add([2.0, math.nan, 1.0, 1.5, math.inf, 3.0], [1.0] * 6, "abcdef", texts)
    assert decoded == [0, 2, 5]
    assert (extremes.easiest[0].place, extremes.hardest[0].place) == ("c", "f")
    assert extremes.easiest[0].response.endswith("… (9,000 characters)")


def test_impossible_numbers_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="keep at least 1 sample"):
        Extremes(0)
