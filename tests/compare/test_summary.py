"""The table and the verdict, from gains that are known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy import stats

from flowstream.compare.analysis import Judged
from flowstream.compare.results import BUDGETS, Choice, Curve
from flowstream.compare.summary import MethodFigures, figures_of, markdown, rows_of, verdict

NAN = math.nan
GAINS = {
    "standard": [0.0, 0.0, 0.0, 0.0],
    "l2": [0.21, 0.19, 0.22, 0.20],
    "flow": [-0.02, -0.03, -0.01, -0.02],
    "permuted": [0.01, -0.02, 0.02, -0.02],
    "wise": [0.3, NAN, 0.31, 0.29],
    "lora": [NAN] * 4,
}


def choice(seed: int, gain: float) -> Choice:
    losses = {"target_loss": 1.0 + seed / 10, "retained_loss": 3.0, "exact_match": 0.0}
    return Choice(seed=seed, learning_rate=1e-3, step=8, gain=gain, distance=2.0, clip_rate=0.5, **losses)


def judged_of(
    gains: Mapping[str, Sequence[float | None]], flops: Mapping[str, Choice | None] | None = None
) -> list[Judged]:
    curve = {"learning_rate": (1e-3,), "step": (8,), "target_loss": (1.0,), "retained_loss": (3.0,)}
    seeds = range(len(gains["standard"]))
    found = []
    for seed in seeds:
        of_seed = {method: each[seed] for method, each in gains.items()}
        at_steps = {m: None if gain is None else choice(seed, gain) for m, gain in of_seed.items()}
        found.append(
            Judged(
                curve=Curve(seed=seed, **curve),
                choices=dict(zip(BUDGETS, (at_steps, at_steps | (flops or {})), strict=True)),
                curve_gain=dict.fromkeys(gains, 0.0),
            )
        )
    return found


def figures(gains: Mapping[str, Sequence[float | None]] = GAINS, **flops: Choice | None) -> dict[str, MethodFigures]:
    return figures_of(judged_of(gains, flops), dict.fromkeys(gains, 1.0), BUDGETS)


@pytest.fixture
def found() -> dict[str, MethodFigures]:
    return figures()


def test_gains_and_what_is_over_permuted_are_paired_t_intervals(found: dict[str, MethodFigures]) -> None:
    for interval, test in (
        (found["l2"].gains["equal_steps"], stats.ttest_1samp(GAINS["l2"], 0.0)),
        (found["flow"].over_permuted, stats.ttest_rel(GAINS["flow"], GAINS["permuted"])),
    ):
        assert interval is not None
        low, high = test.confidence_interval(0.95)
        assert interval.mean == pytest.approx((low + high) / 2)
        assert interval.half_width == pytest.approx((high - low) / 2)
    assert found["permuted"].over_permuted is None
    assert found["wise"].gains["equal_steps"].mean == pytest.approx(np.mean([0.3, 0.31, 0.29]))


def test_the_verdict_names_those_whose_interval_excludes_0_and_claims_nothing_of_those_outside(
    found: dict[str, MethodFigures],
) -> None:
    told = verdict(found, 4)
    assert "At equal steps, above standard's curve with a 95 % interval that excludes 0: l2 (+0.2050±0.0205)" in told
    assert "below it: flow (-0.0200±0.0130)." in told
    assert "Not said of those with a seed outside of the curve: wise, lora." in told
    assert "Above what permuted weights gain, in the same sense: l2 (" in told
    assert "Of 6 such intervals, 0.3 would exclude 0 by chance." in told


def test_where_nothing_lies_above_it_says_none() -> None:
    told = verdict(figures({"standard": [0.0, 0.0], "flow": [0.1, -0.1]}), 2)
    assert told.count("excludes 0: none; below it: none.") == 2
    assert "permuted" not in told


def test_one_seed_is_no_evidence() -> None:
    told = verdict(figures({"standard": [0.0], "flow": [0.5]}), 1)
    assert told.startswith("One seed has no confidence interval")


def test_a_row_shows_what_is_outside_and_what_is_over_budget() -> None:
    head, rows = rows_of(figures(flow=None))
    table = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert table["standard"]["equal steps"] == "the curve"
    assert table["l2"]["equal steps"] == "+0.2050±0.0205"
    assert table["wise"]["equal steps"] == "+0.3000±0.0248 (1 out)"
    assert table["lora"]["equal steps"] == "outside"
    assert table["flow"]["equal FLOPs"] == "over budget"
    assert table["permuted"]["over permuted"] == ""
    assert (table["l2"]["clipped"], table["l2"]["‖Δθ‖"], table["l2"]["target"]) == ("50%", "2.00", "1.150")


def test_what_diverged_is_told_apart_from_what_is_over_budget_and_neither_is_compared() -> None:
    gains = {"standard": [0.0] * 3, "l2": [None] * 3, "mofo": [0.1, None, 0.12], "flow": [0.2, 0.21, None]}
    found = figures(gains, l2=None, flow=None, mofo=None)
    head, rows = rows_of(found)
    table = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    told = {method: (row["equal steps"], row["equal FLOPs"]) for method, row in table.items() if method != "standard"}
    assert told == {
        "l2": ("diverged", "diverged"),
        "mofo": ("+0.1100±0.1271 (1 diverged)", "(2 over budget) (1 diverged)"),
        "flow": ("+0.2050±0.0635 (1 diverged)", "(2 over budget) (1 diverged)"),
    }
    assert not any(each.is_compared(budget) for m, each in found.items() for budget in BUDGETS if m != "standard")
    said = verdict(found, 3)
    assert "Not said of those with a seed diverged: l2, mofo, flow." in said
    assert "Not said of those with a seed over budget or diverged: l2, mofo, flow." in said
    assert "Of 0 such intervals" in said


def test_a_table_reads_as_markdown_and_as_text() -> None:
    assert markdown(["a", "b"], [["one", "2"], ["x", "10.5"]]) == (
        "| a   |    b |\n| --- | ---: |\n| one |    2 |\n| x   | 10.5 |"
    )
