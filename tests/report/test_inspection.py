"""What losses make of the weights, against numpy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import read_alone

from flowstream.inspection import inspect_losses
from flowstream.report.inspection import rows, write_page

LOSSES = st.lists(st.floats(0.01, 20), min_size=1, max_size=40)


@given(losses=LOSSES)
def test_every_row_is_what_numpy_says(losses: list[float]) -> None:
    inspection = inspect_losses(losses)
    ascending = np.sort(losses)
    assert inspection.median == np.median(losses)
    for tilt in inspection.tilts:
        weights = np.exp(-ascending / tilt.tau)
        assert tilt.mean_weight == pytest.approx(weights.mean(), rel=1e-5, abs=1e-30)
        assert (tilt.smallest, tilt.largest) == pytest.approx((weights.min(), weights.max()), rel=1e-5, abs=1e-30)
        if weights.sum() > 1e-30:
            assert tilt.ess == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / len(losses), rel=1e-4)
            harder = np.interp(np.arange(len(losses)) + 0.5, [len(losses) / 2 - 0.5, len(losses) / 2 + 0.5], [0, 1])
            assert tilt.hard_share == pytest.approx((weights * harder).sum() / weights.sum(), rel=1e-4, abs=1e-6)
            assert tilt.hard_share <= 0.5 + 1e-6


def test_rows_are_quantiles_and_targets_of_the_effective_sample_size() -> None:
    losses = np.random.default_rng(0).gamma(3, 0.5, size=501)
    tilts = {tilt.name: tilt for tilt in inspect_losses(losses).tilts}
    quantiles = {
        "10 % quantile": 0.1,
        "25 % quantile": 0.25,
        "median": 0.5,
        "75 % quantile": 0.75,
        "90 % quantile": 0.9,
    }
    assert [*tilts] == [*quantiles, "ESS/n 0.7", "ESS/n 0.5"]
    for name, quantile in quantiles.items():
        assert tilts[name].tau == pytest.approx(np.quantile(losses, quantile))
    assert tilts["ESS/n 0.7"].ess == pytest.approx(0.7, rel=1e-5)
    assert tilts["ESS/n 0.5"].ess == pytest.approx(0.5, rel=1e-5)


@given(
    losses=st.lists(st.sampled_from([0.5, 1.0, 2.0, math.nan, math.inf]), min_size=1, max_size=12),
    num=st.integers(0, 4),
)
def test_easiest_and_hardest_are_those_of_a_stable_sort(losses: list[float], num: int) -> None:
    order = sorted((loss, k) for k, loss in enumerate(losses) if math.isfinite(loss))
    if not order:
        return
    inspection = inspect_losses(losses)
    assert inspection.easiest(num) == [k for _, k in order[:num]]
    assert inspection.hardest(num) == [k for _, k in order[num:][::-1][:num]]
    weights = inspection.weights(1.0)
    for loss, weight in zip(losses, weights, strict=True):
        assert weight == pytest.approx(math.exp(-loss) if math.isfinite(loss) else 0)


def test_what_a_stream_would_advise_is_told() -> None:
    (advice,) = inspect_losses(np.linspace(6, 7, 100)).advice
    assert "nearly uniform" in advice
    (advice,) = inspect_losses(np.concatenate([np.linspace(0.1, 0.2, 500), np.linspace(3, 3.1, 500)])).advice
    assert "lies in a gap" in advice
    assert not inspect_losses(np.random.default_rng(0).gamma(2, 0.5, size=200)).advice
    assert any("floor" in advice for advice in inspect_losses([0.0, 0.0, 0.0, 1.0]).advice)


def test_without_one_finite_loss_there_is_nothing_to_weigh() -> None:
    with pytest.raises(ValueError, match="none of the 2 losses is finite.*--bf16"):
        inspect_losses([math.nan, math.inf])


@pytest.mark.parametrize("losses", [[1.5], [2.0] * 5, [0.0, 0.0, 3.0, math.nan]])
def test_a_page_can_be_drawn_of_any_losses(losses: list[float], tmp_path: Path) -> None:
    inspection = inspect_losses(losses)
    write_page(inspection, tmp_path / "p.html", title="<p>", easiest=[], hardest=[], settings={"limit": 3})
    page = read_alone((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 1
    for cell in (cell for row in rows(inspection.tilts) for cell in row):
        assert cell in page.words
    assert ("1 without a finite loss" in page.text) == any(map(math.isnan, losses))
