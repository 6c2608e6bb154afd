"""The outcomes of all seeds, brought together into one `Results`."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict

from flowstream.compare.analysis import BASELINE, CONTROL
from flowstream.compare.results import Figure, RunResult
from flowstream.compare.versions import versions
from flowstream.demo.experiment import SeedOutcome
from flowstream.demo.feeds import METHODS
from flowstream.demo.preparation import Prepared
from flowstream.demo.problems import LEVELS
from flowstream.demo.results import MethodResult, Results, Temperature


def collect(prepared: Prepared, outcomes: Sequence[SeedOutcome], seconds: dict[str, float]) -> Results:
    """All that the report shows. The reference and its losses are the same for every seed; the first's are taken."""
    task, first = prepared.task, outcomes[0]
    runs = [run for outcome in outcomes for run in outcome.runs]
    return Results(
        settings={"seeds": [outcome.seed for outcome in outcomes], **asdict(task.settings)},
        versions=versions(),
        corpus={
            "train_chars": prepared.num_train_chars,
            "train_tokens": prepared.num_train_tokens,
            "pretraining_tokens": task.settings.model.steps * task.settings.model.batch * task.settings.model.context,
            "validation_tokens": sum(map(len, task.validation_text)),
            "test_tokens": sum(map(len, task.test_text)),
        },
        parameters=first.num_parameters,
        pretraining_loss=prepared.losses,
        reference=first.reference,
        loss_by_level={
            level: tuple(
                loss for loss, problem in zip(first.losses, task.problems, strict=True) if problem.level == level
            )
            for level in LEVELS
        },
        temperature=_temperature(outcomes),
        runs=tuple(runs),
        curves=tuple(outcome.judged.curve for outcome in outcomes),
        methods={method: _method(method, outcomes, runs) for method in METHODS},
        samples=first.samples,
        seconds=seconds,
    )


def _temperature(outcomes: Sequence[SeedOutcome]) -> Temperature:
    exact = outcomes[0].tau
    return Temperature(
        exact=exact,
        exact_ess=outcomes[0].ess,
        online={outcome.seed: outcome.windows for outcome in outcomes},
        relative_error=max(abs(outcome.windows[-1].tau / exact - 1) for outcome in outcomes),
    )


def _method(method: str, outcomes: Sequence[SeedOutcome], runs: Sequence[RunResult]) -> MethodResult:
    own = [run for run in runs if (run.budget, run.method) == ("equal_steps", method)]
    ends = [run.points[-1] for run in own]
    flops = statistics.fmean(end.flops for end in ends)
    baseline = statistics.fmean(run.points[-1].flops for run in runs if run.method == BASELINE)
    scoring = statistics.fmean(2 * end.score_tokens / (6 * end.train_tokens + 2 * end.score_tokens) for end in ends)
    figures = {
        budget: Figure.of([outcome.judged.choices[budget][method] for outcome in outcomes])
        for budget in ("equal_steps", "equal_flops")
    }
    return MethodResult(
        title=METHODS[method],
        equal_steps=figures["equal_steps"],
        equal_flops=figures["equal_flops"],
        curve_gain=tuple(outcome.judged.curve_gain[method] for outcome in outcomes),
        over_permuted=tuple(
            outcome.judged.gain("equal_steps", method) - outcome.judged.gain("equal_steps", CONTROL)
            for outcome in outcomes
        ),
        flops_ratio=flops / baseline,
        score_share=scoring,
        num_samples=statistics.fmean(run.num_samples for run in own),
        acceptance=statistics.fmean(run.acceptance for run in own),
        seconds=statistics.fmean(run.seconds for run in own),
        score_seconds=statistics.fmean(run.score_seconds for run in own),
    )
