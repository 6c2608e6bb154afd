"""Compression against a plain loop over the grid of the scale function."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from flowstream.centroids import compressed


def scale(q):
    """k(q) of the digest's docstring, in units of a centroid's share."""
    return q / 2 + np.sqrt(q / 8) if q <= 0.5 else 1 - scale(1 - q)


def in_a_loop(values, weights, max_centroids):
    """Each value into the cell of k where the middle of its weight lies; one mean a cell."""
    order = np.argsort(values, kind="stable")
    cells, seen = {}, 0.0
    for value, weight in zip(values[order], weights[order], strict=True):
        middle = (seen + 0.5 * weight) / weights.sum()
        cells.setdefault(int(scale(middle) * max_centroids), []).append((value, weight))
        seen += weight
    parts = [np.array(cell) for _, cell in sorted(cells.items())]
    return [np.average(part[:, 0], weights=part[:, 1]) for part in parts], [part[:, 1].sum() for part in parts]


@given(st.integers(0, 2**32 - 1), st.integers(9, 400), st.integers(8, 60))
@hypothesis_settings(max_examples=50, deadline=None)
def test_compression_equals_a_loop_over_the_values(seed, size, max_centroids):
    rng = np.random.default_rng(seed)
    values, weights = rng.lognormal(size=size), rng.random(size) + 0.01
    means, sums = compressed(values, weights, max_centroids)
    if size <= max_centroids:
        assert means.tolist() == sorted(values)
        return
    expected_means, expected_sums = in_a_loop(values, weights, max_centroids)
    assert len(means) <= max_centroids
    np.testing.assert_allclose(means, expected_means)
    np.testing.assert_allclose(sums, expected_sums)


def test_centroids_at_the_median_and_at_the_ends_hold_the_shares_that_the_docstring_says():
    size, max_centroids = 200_000, 500
    _, sums = compressed(np.arange(size, dtype=float), np.ones(size), max_centroids)
    assert sums[len(sums) // 2] / size == pytest.approx(0.0027, abs=1e-4)
    assert sums[0] / size == pytest.approx(3.2e-5, abs=1e-5)
    assert sums[-1] / size == pytest.approx(3.2e-5, abs=1e-5)


def test_values_without_weight_are_left_out():
    means, sums = compressed(np.array([3.0, 1.0, 2.0]), np.array([1.0, 0.0, 2.0]), 8)
    assert means.tolist() == [2.0, 3.0]
    assert sums.tolist() == [2.0, 1.0]
