"""Advice: told of losses that call for it, and of no others."""

from __future__ import annotations

import numpy as np
import pytest
from temperatures import LAWS

from flowstream.advice import advice_on
from flowstream.digest import Digest


def names(losses, tau=None, quantile=0.5):
    digest = Digest(2000)
    digest.add(losses)
    tau = max(digest.quantile(quantile), 1e-6) if tau is None else tau
    return [name for name, _ in advice_on(digest, tau, floor=1e-6, quantile=quantile)]


def mixture(share):
    """Losses about 1 and about 10, a `share` of them low."""
    rng = np.random.default_rng(0)
    return np.where(rng.random(4096) < share, rng.normal(1, 0.05, 4096), rng.normal(10, 0.05, 4096))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("size", [100, 256, 2048, 50_000])
def test_ordinary_losses_get_no_advice(law, size):
    assert names(LAWS[law][0](np.random.default_rng(1), size)) == []


def test_floor_gap_and_uniform_weights_are_told():
    assert names(np.zeros(1000)) == ["tau_at_floor", "weights_nearly_uniform"]
    assert names(mixture(0.5)) == ["tau_in_gap"]
    assert names(np.random.default_rng(0).normal(6.4, 0.4, 2000)) == ["weights_nearly_uniform"]


@pytest.mark.parametrize(("share", "quantile"), [(0.65, 0.5), (0.5, 0.3), (0.35, 0.5)])
def test_quantile_within_one_of_two_kinds_is_in_no_gap(share, quantile):
    assert "tau_in_gap" not in names(mixture(share), quantile=quantile)
    assert names(mixture(0.65), quantile=0.65) == ["tau_in_gap"]


def test_tau_that_is_no_quantile_is_in_no_gap():
    digest = Digest(2000)
    digest.add(mixture(0.5))
    assert advice_on(digest, 5.0, quantile=None) == []


def test_messages_say_where_tau_stands():
    digest = Digest(2000)
    digest.add(mixture(0.5))
    ((_, message),) = advice_on(digest, 5.0, quantile=0.5)
    assert "τ = 5 nats" in message
    assert "between about 1." in message
    ((_, message),) = advice_on(digest, 500.0, quantile=None)
    assert "at τ = 500 nats" in message


def test_without_losses_only_the_floor_is_told():
    assert advice_on(Digest(), 1.0, floor=0.05, quantile=0.5) == []
    ((name, message),) = advice_on(Digest(), 0.05, floor=0.05, quantile=0.5)
    assert name == "tau_at_floor"
    assert "0.05 nats" in message
