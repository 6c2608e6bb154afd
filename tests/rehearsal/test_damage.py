"""The posterior of the rates of damage: a plain loop's, and closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from flowstream.rehearsal.damage import Damage


def test_rates_are_posterior_means():
    damage = Damage.unknown(3, (1.0, 3.0), None)
    assert damage.rates.tolist() == [0.25] * 3
    damage = damage.updated([4, 0, 2], [4, 0, 1]).updated([0, 4, 2], [0, 0, 1])
    assert damage.rates.tolist() == [5 / 8, 1 / 8, 3 / 8]


def test_what_is_a_half_life_old_counts_half_and_bins_forget_alike():
    damage = Damage.unknown(2, (1.0, 1.0), 100).updated([0, 100], [0, 100]).updated([100, 0], [0, 0])
    assert damage.num == (100.0, 50.0)
    assert damage.damaged == (0.0, 50.0)
    tenths = Damage.unknown(2, (1.0, 1.0), 100).updated([0, 100], [0, 100])
    for _ in range(10):
        tenths = tenths.updated([10, 0], [0, 0])
    assert tenths.num[1] == pytest.approx(50.0)


def test_no_rate_reaches_zero_or_one():
    damage = Damage.unknown(2, (1.0, 1.0), 500)
    for _ in range(1000):
        damage = damage.updated([50, 50], [0, 50])
    low, high = damage.rates
    # Evidence on each is at most half of half_life / ln 2 samples, and what came at once.
    assert 1 / (2 + 250 / np.log(2) + 50) < low < 0.01
    assert 0.99 < high < 1
