"""The report of a run: what it shows, what it leaves out and why, and that it asks the network for nothing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from pages import Page, read_alone

from flowstream.policies import HardFirst
from flowstream.report.run_log import Evaluation, RunLog, StepPoint
from flowstream.report.training import write_report

HOSTILE = "<script>alert(1)</script> & \"quoted\" '</pre>' $x$ 日本"


def a_log(mode: str = "weight", num_windows: int = 40) -> RunLog:
    rng = np.random.default_rng(0)
    log = RunLog(
        mode=mode,
        target="gsm8k",
        settings={"lr": 1e-5, "note": HOSTILE},
        versions={"torch": "2.13.0"},
        seconds={"training": 90.0, "evaluation": 10.0},
    )
    for step in range(1, num_windows + 1):
        losses = rng.gamma(4, 0.3, size=8)
        places = [f"line {8 * step + row}" for row in range(8)]
        log.add_samples(losses, np.exp(-losses), places, lambda row: (HOSTILE, "#### 4"))
        told = {"tau": 1.125, "tau_error": 0.0625, "mean_weight": 0.375, "ess": 0.8125, "acceptance": 0.4375}
        told |= {"samples_seen": 8.0 * step, "nonfinite": 3.0, "score_seconds": 0.5 * step, "wait_seconds": 0.25}
        log.add_window(step, {f"flow/{name}": value for name, value in told.items()})
        log.steps.append(StepPoint(step=step, loss=1 / step, learning_rate=1e-5, grad_norm=2.0))
    for step in (0, 20, 40):
        losses_of = {"gsm8k": 1.5 - step / 100, "_web<b>$x$": 2.0 + step / 100, "code": 1.0}
        log.evaluations.append(Evaluation(step=step, losses=losses_of))
    return log


def written(log: RunLog, folder: Path, **options: object) -> tuple[str, Page]:
    write_report(log, folder / "report.html", **options)  # type: ignore[arg-type]
    document = (folder / "report.html").read_text(encoding="utf-8")
    return document, read_alone(document)


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return written(a_log(), tmp_path_factory.mktemp("report"))


def test_the_report_shows_the_numbers_it_was_given(weighted: tuple[str, Page]) -> None:
    _, page = weighted
    assert page.tags.count("svg") == 6
    for told in ("1.125 ± 0.0625 nats", "320 samples", "mean weight 0.375", "0.8125 at the end", "torch: 2.13.0"):
        assert told in page.text
    assert "from 1.5 to 1.1" in page.text
    assert "the other sets from 1.5 to 1.7" in page.text
    assert "20 s went into scoring, and for 0.25 s" in page.text
    assert "seconds, training: 90.0" in page.text
    assert "3 with a loss that is not finite" in page.text
    for step in ("before", "20", "40"):
        assert page.words.count(step) >= 1


def test_every_set_and_setting_stands_as_it_was_named(weighted: tuple[str, Page]) -> None:
    document, page = weighted
    assert page.text.count("_web<b>$x$") >= 3  # a legend, a table, a sentence
    assert page.words.count(HOSTILE) == 1 + 10  # the settings, and the easiest and hardest samples
    assert "<script" not in document
    assert "alert(1)" in page.text


def test_resampling_shows_acceptance_where_weighting_shows_the_mean_weight(
    weighted: tuple[str, Page], tmp_path: Path
) -> None:
    _, resampled = written(a_log("resample"), tmp_path)
    assert "44 % of them accepted" in resampled.text
    assert "accepted, of the samples seen" in resampled.text
    assert "mean weight" not in resampled.text
    assert "accepted" not in weighted[1].text


def test_another_policy_has_its_own_curve_and_nearly_uniform_weights_are_told(tmp_path: Path) -> None:
    log = RunLog()
    log.add_samples([6.0, 6.1, 6.2], [0.3, 0.3, 0.3], "abc", lambda row: ("", ""))
    log.add_window(1, {"flow/tau": 6.1})
    _, page = written(log, tmp_path, policy=HardFirst(max_weight=5.0), title="a < b")
    assert "HardFirst(max_weight=5.0)" in page.text
    assert "exp(-f/τ)" not in page.text
    assert page.words.count("a < b") == 2
    assert "nearly uniform and carry no information" in page.text


def test_a_run_that_has_done_nothing_has_a_report_that_says_so(tmp_path: Path) -> None:
    _, page = written(RunLog(), tmp_path)
    assert "svg" not in page.tags
    assert page.text.count("Left out:") == page.tags.count("h2") == 8
    assert "Pass --eval name=file" in page.text


@pytest.mark.parametrize(
    ("target", "losses", "why"),
    [
        (None, {"web": 1.0}, "none of the evaluation sets (web) was named as the target"),
        ("gsm8k", {"web": 1.0}, "the target, gsm8k, is none of the evaluation sets (web)"),
        ("web", {"web": 1.0}, "on one other set at least; evaluated were web"),
        ("web", {"web": math.nan, "code": 1.0}, "a finite loss on the target"),
    ],
)
def test_retention_is_left_out_with_the_reason(
    target: str | None, losses: dict[str, float], why: str, tmp_path: Path
) -> None:
    _, page = written(RunLog(target=target, evaluations=[Evaluation(step=3, losses=losses)]), tmp_path)
    assert why in page.text
    assert page.tags.count("svg") == 1


def test_numbers_that_are_not_finite_and_lone_points_are_drawn_around(tmp_path: Path) -> None:
    log = RunLog(target="t", mode="resample")
    log.add_samples([2.0, 2.0], [0.5, 0.5], "ab", lambda row: ("p", "r"))
    log.add_window(1, {"flow/tau": math.nan, "flow/score_seconds": math.nan})
    log.add_window(2, {"flow/tau": 2.0, "flow/tau_error": math.nan, "flow/score_seconds": math.inf})
    log.steps += [StepPoint(step=1, loss=math.nan), StepPoint(step=2, loss=math.inf)]
    log.evaluations.append(Evaluation(step=0, losses={"t": 1.0, "w": 2.0}))
    _, page = written(log, tmp_path)
    assert page.tags.count("svg") >= 4


def test_the_page_does_not_grow_with_the_run(tmp_path: Path) -> None:
    lengths = []
    for num_windows in (300, 3000):
        log = RunLog()
        for step in range(1, num_windows + 1):
            log.add_window(step, {"flow/tau": 1 + 1 / step, "flow/ess": 0.5, "flow/score_seconds": float(step)})
            log.steps.append(StepPoint(step=step, loss=1 / step))
        lengths.append(len(written(log, tmp_path)[0]))
    assert lengths[1] < 1.5 * lengths[0]


def test_without_matplotlib_there_is_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("flowstream.report.svg.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'flowstream\[train\]'"):
        write_report(RunLog(), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
