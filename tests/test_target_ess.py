"""ESS/n of exponential losses against its closed form, and back to τ."""

from __future__ import annotations

import numpy as np
import pytest

from flowstream.digest import Digest
from flowstream.target_ess import ess_at, tau_at, tau_error_at


def digest_of(losses):
    digest = Digest(2000)
    digest.add(losses)
    return digest


@pytest.mark.parametrize("tau", [0.05, 1.0, 7.0])
def test_ess_of_exponential_losses_has_a_closed_form(tau):
    # E w = τ/(1+τ), E w² = τ/(2+τ): ESS/n = τ(2+τ)/(1+τ)², so that τ = 1/√(1-ESS/n) - 1.
    digest = digest_of(-np.log1p(-(np.arange(30_000) + 0.5) / 30_000))
    expected = tau * (2 + tau) / (1 + tau) ** 2
    assert ess_at(digest, tau) == pytest.approx(expected, rel=5e-3)
    assert tau_at(digest, expected) == pytest.approx(tau, rel=5e-3)


def test_ess_of_few_losses_is_that_of_their_weights():
    losses = np.random.default_rng(0).gamma(2.0, size=300)
    weights = np.exp(-losses / 0.7)
    assert ess_at(digest_of(losses), 0.7) == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / 300)


@pytest.mark.parametrize("losses", [np.full(100, 0.7), np.r_[np.full(90, 0.7), np.full(10, 3.0)]])
def test_ess_that_no_temperature_reaches_gives_the_median(losses):
    assert tau_at(digest_of(losses), 0.5) == 0.7


def test_error_covers_the_closed_form():
    covered = 0
    for seed in range(200):
        digest = digest_of(np.random.default_rng(seed).exponential(size=1000))
        tau = tau_at(digest, 0.75)
        covered += abs(tau - 1.0) <= 1.96 * tau_error_at(digest, tau)
    assert covered >= 0.9 * 200
