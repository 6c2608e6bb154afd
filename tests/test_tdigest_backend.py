"""The package `tdigest` as interchange format and as backend. What τ it gives: see test_running_temperature.py."""

from __future__ import annotations

import builtins
import random
import sys

import numpy as np
import pytest
from temperatures import run

from flowstream.digest import Digest
from flowstream.running_temperature import RunningTemperature
from flowstream.tdigest_backend import from_tdigest, to_tdigest
from flowstream.temperature import RunningMedian


def digest_of(values):
    digest = Digest()
    digest.add(values)
    return digest


def test_centroids_come_back_as_they_were_those_of_equal_mean_in_one():
    pytest.importorskip("tdigest")
    means, counts = from_tdigest(to_tdigest(np.array([0.1, 2.0, 2.0, 5.0]), np.array([1.0, 0.25, 0.5, 3.0])))
    assert means.tolist() == [0.1, 2.0, 5.0]
    assert counts.tolist() == [1.0, 0.75, 3.0]
    means, counts = from_tdigest(to_tdigest(np.empty(0), np.empty(0)))
    assert means.size == counts.size == 0


def test_package_reads_the_same_median_and_gives_the_centroids_back():
    pytest.importorskip("tdigest")
    digest = digest_of(np.round(np.random.default_rng(0).lognormal(size=20_000), 3))
    state = random.getstate()
    package = digest.to_tdigest()
    assert random.getstate() == state
    assert package.percentile(50) == pytest.approx(digest.quantile(0.5), rel=1e-3)
    back = Digest.from_tdigest(package)
    assert back.quantile(0.5) == pytest.approx(digest.quantile(0.5), rel=1e-3)
    assert back.num_values == digest.num_values
    assert back.effective_size == pytest.approx(digest.effective_size)
    assert Digest.from_tdigest(Digest().to_tdigest()).num_values == 0


def test_backend_is_deterministic_and_leaves_the_users_random_alone():
    pytest.importorskip("tdigest")
    losses = np.random.default_rng(0).lognormal(size=4000)
    taus = []
    for seed in (1, 2):
        random.seed(seed)
        before = random.getstate()
        temperature = run(RunningTemperature(RunningMedian(backend="tdigest"), "sample"), losses)
        assert random.getstate() == before
        taus.append(temperature.tau())
    assert taus[0] == taus[1]


def test_missing_package_is_named_with_its_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("tdigest"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "tdigest", raising=False)
    with pytest.raises(ImportError, match=r"flowstream\[tdigest\]"):
        Digest().to_tdigest()
