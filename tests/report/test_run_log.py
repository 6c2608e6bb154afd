"""A run's log, filled by a real stream: it survives JSON, and goes on after a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import flowstream as fs
from flowstream.report.run_log import Evaluation, RunLog, StepPoint

TIMES = ("score_seconds", "wait_seconds", "cache_hit_rate")


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 97, (4, 9), generator=generator)} for _ in range(24)]


@pytest.fixture(scope="module")
def make_stream(tiny: Callable[..., Any], batches: list[dict[str, torch.Tensor]]) -> Callable[[], fs.FlowStream]:
    scorer = fs.CausalLMScorer(tiny("llama"))
    temperature = fs.RunningMedian(warmup_samples=16)
    return lambda: fs.FlowStream(batches, scorer, temperature=temperature, window=4, include=("loss",))


def steps_of(stream: fs.FlowStream, log: RunLog, first: int = 1) -> Iterator[int]:
    """Note each batch as a trainer would."""
    for step, batch in enumerate(stream, first):
        places = [str(row.tolist()) for row in batch["input_ids"]]
        log.add_samples(batch["flow_loss"], batch["flow_weight"], places, lambda row: ("prompt", "response"))
        log.add_window(step, stream.metrics())
        log.steps.append(StepPoint(step=step, loss=1 / step))
        if step % 4 == 0:
            log.evaluations.append(Evaluation(step=step, losses={"target": 1 / step, "web": 2.0}))
        yield step


def without_times(log: RunLog) -> dict[str, Any]:
    state = json.loads(log.to_json())
    for name in TIMES:
        del state["windows"][name]
    return dict(state)


@pytest.fixture(scope="module")
def whole(make_stream: Callable[[], fs.FlowStream]) -> RunLog:
    log = RunLog(target="target", settings={"lr": 1e-5, "eval": ["a=b"]})
    with make_stream() as stream:
        for _ in steps_of(stream, log):
            pass
    return log


@pytest.mark.parametrize("cut", [3, 8, 17])
def test_resumed_log_equals_uninterrupted_log(
    make_stream: Callable[[], fs.FlowStream], whole: RunLog, cut: int
) -> None:
    log = RunLog(target="target", settings={"lr": 1e-5, "eval": ["a=b"]})
    with make_stream() as stream:
        for step in steps_of(stream, log):
            if step == cut:
                state, saved = stream.state_dict(), log.to_json()
                break
    resumed = RunLog.from_json(saved)
    with make_stream() as stream:
        stream.load_state_dict(state)
        for _ in steps_of(stream, resumed, cut + 1):
            pass
    assert without_times(resumed) == without_times(whole)
    for name in ("score_seconds", "wait_seconds"):
        seconds = [getattr(row, name) for row in resumed.windows]
        assert seconds == sorted(seconds)


def test_rows_after_the_resumed_step_are_cut(whole: RunLog) -> None:
    cut = whole.until(10)
    assert [row.step for row in cut.windows] == [row.step for row in cut.steps] == list(range(1, 11))
    assert [each.step for each in cut.evaluations] == [4, 8]
    assert (cut.target, cut.settings) == (whole.target, whole.settings)
    cut.add_window(11, {"flow/score_seconds": 5.0})
    assert cut.windows[-1].score_seconds == whole.windows[9].score_seconds + 5.0
    assert len(whole.windows) == 24


def test_the_log_holds_what_the_stream_told(whole: RunLog, batches: list[dict[str, torch.Tensor]]) -> None:
    last = whole.windows[-1]
    assert last.samples_seen == 96
    assert whole.losses.num_values == 96
    assert last.tau == pytest.approx(whole.losses.quantile(0.5), rel=0.1)
    assert 0 < last.ess <= 1
    assert last.acceptance == 1
    easiest, hardest = whole.extremes.easiest, whole.extremes.hardest
    assert easiest[0].loss == pytest.approx(whole.losses.minimum)
    assert hardest[0].loss == pytest.approx(whole.losses.maximum)
    assert all(note.weight > hardest[0].weight for note in easiest)


def test_json_is_strict_and_gives_back_what_is_not_finite() -> None:
    log = RunLog(settings={"warmup": math.inf, "path": ("a", 1)}, seconds={"training": 1.5})
    log.add_window(1, {"flow/tau": math.nan, "flow/ess": math.inf, "flow/acceptance": -math.inf})
    log.steps.append(StepPoint(step=1, loss=math.nan))
    log.evaluations.append(Evaluation(step=0, losses={"τ": math.inf}))
    log.add_samples(np.array([math.nan, 1.0]), [0.0, 0.5], ["a", "b"], lambda row: ("<p>", "\x00 é"))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    written = log.to_json()
    json.loads(written, parse_constant=refuse)
    again = RunLog.from_json(written)
    assert again.to_json() == written
    (window,), (step,), (evaluation,) = again.windows, again.steps, again.evaluations
    assert math.isnan(window.tau)
    assert (window.ess, window.acceptance) == (math.inf, -math.inf)
    assert math.isnan(step.loss)
    assert evaluation.losses == {"τ": math.inf}
    assert again.extremes.easiest == log.extremes.easiest
    assert RunLog.from_json(RunLog().to_json()).to_json() == RunLog().to_json()


def test_retention_is_the_mean_over_the_sets_that_are_not_the_target() -> None:
    log = RunLog(target="t")
    assert log.retained(Evaluation(step=0, losses={"t": 9.0, "a": 1.0, "b": 2.0})) == 1.5
    assert math.isnan(log.retained(Evaluation(step=0, losses={"t": 9.0})))


@pytest.mark.parametrize(("written", "message"), [("{", "is no JSON"), ("[]", "version None"), ('{"version": 9}', "9")])
def test_what_is_no_log_is_refused_in_words(written: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*delete it"):
        RunLog.from_json(written)
