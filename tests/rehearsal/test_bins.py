"""Bins of prior samples: a partition, cut where numpy cuts."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from flowstream.rehearsal.bins import partition


@settings(max_examples=40)
@given(
    st.lists(st.one_of(st.floats(0, 30, width=32), st.just(float("nan")), st.just(0.0)), min_size=1, max_size=60),
    st.integers(1, 8),
    st.booleans(),
)
def test_every_sample_is_in_one_bin_and_no_bin_is_empty(losses, num_bins, has_labels):
    labels = [f"domain {i % 3}" for i in range(len(losses))] if has_labels else None
    bins = partition(np.array(losses, dtype=np.float32), labels, num_bins, len(losses))
    assert sorted(np.concatenate(bins.members).tolist()) == list(range(len(losses)))
    assert bins.sizes.min() > 0
    assert len(bins.names) == len(bins.members) <= num_bins * (3 if has_labels else 1)
    for k, members in enumerate(bins.members):
        assert (bins.of[members] == k).all()
        if labels:
            assert len({labels[i] for i in members}) == 1


def test_edges_are_quantiles_of_the_losses():
    losses = np.random.default_rng(0).gamma(2.0, size=400).astype(np.float32)
    bins = partition(losses, None, 4, 400)
    assert bins.sizes.tolist() == [100] * 4
    assert (bins.of == np.searchsorted(np.quantile(losses, [0.25, 0.5, 0.75]), losses)).all()


def test_equal_losses_stay_together_and_a_loss_that_is_no_number_is_in_the_last_bin():
    losses = np.array([0.0] * 8 + [1.0, 2.0, np.nan], dtype=np.float32)
    bins = partition(losses, None, 4, 11)
    assert len(set(bins.of[:8].tolist())) == 1
    assert bins.of[10] == len(bins.members) - 1


def test_labels_and_losses_make_a_product():
    labels = ["b", "a"] * 4
    assert partition(None, labels, 1, 8).of.tolist() == [1, 0] * 4
    both = partition(np.arange(8, dtype=np.float32), labels, 2, 8)
    assert both.of.tolist() == [2, 0, 2, 0, 3, 1, 3, 1]
    assert both.names == ("a 0-3.5 nats", "a 3.5-∞ nats", "b 0-3.5 nats", "b 3.5-∞ nats")


@pytest.mark.parametrize("change", [(0, 5), (3, 0)])
def test_partitions_are_told_apart(change):
    losses = np.arange(8, dtype=np.float32)
    other = losses.copy()
    other[change[0]] = change[1]
    assert partition(losses, None, 2, 8).fingerprint == partition(losses.copy(), None, 2, 8).fingerprint
    assert (partition(losses, None, 2, 8).fingerprint != partition(other, None, 2, 8).fingerprint) == (change == (0, 5))
