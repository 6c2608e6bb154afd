"""`report.html` of a training run: one page that needs no network, with a sentence to each figure on how to read it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from flowstream.advice import advice_on
from flowstream.policies import Flow, Policy, describe
from flowstream.report.page import narrow, page, pairs, table, text
from flowstream.report.run_log import Evaluation, RunLog
from flowstream.report.samples import number, side_by_side
from flowstream.report.svg import check_matplotlib

_MAX_ROWS = 12


def write_report(log: RunLog, path: Path, *, policy: Policy = Flow(), title: str = "flowstream train") -> None:
    """Write the page of a run, finished or not; everything in it is inline.

    Args:
        log: what the run remembers. What is missing in it is left out of the page, which says why.
        policy: the weights' policy, for the curve over the losses.

    Raises:
        ValueError: matplotlib is not installed; `check_matplotlib` tells it before a run.
    """
    check_matplotlib()
    parts = (
        _opening(log, title),
        _retention(log),
        _evaluations(log),
        _temperature(log),
        _losses(log, policy),
        _steps(log),
        _costs(log),
        _samples(log),
        _settings(log),
    )
    document = page(title, [piece for part in parts for piece in part])
    path.write_text(document, encoding="utf-8")


def _opening(log: RunLog, title: str) -> Iterable[str]:
    yield f"<h1>{text(title)}</h1>"
    last = max((rows[-1].step for rows in (log.steps, log.windows, log.evaluations) if rows), default=0)
    told = [f"{last:,} steps in {text(log.mode)} mode"]
    if log.windows:
        window = log.windows[-1]
        told.append(f"{window.samples_seen:,.0f} samples seen")
        if math.isfinite(window.tau):
            told.append(f"τ = {number(window.tau)} nats")
        if log.mode == "resample":
            told.append(f"{100 * window.acceptance:.0f} % of them accepted")
        else:
            told.append(f"mean weight {number(window.mean_weight)}")
        told.append(f"ESS/n {number(window.ess)}")
    yield f"<p class='lead'>{', '.join(told)}. This page loads nothing from elsewhere.</p>"
    curve = _curve(log)
    if len(curve) > 1:
        (first, *_, final) = curve
        yield (
            f"<p><b>From step {first.step:,} to step {final.step:,} the loss on the target, {text(log.target)}, went "
            f"from {_loss(first, log.target)} to {_loss(final, log.target)}, the mean loss on the other sets from "
            f"{number(log.retained(first))} to {number(log.retained(final))} nats a token.</b></p>"
        )


def _retention(log: RunLog) -> Iterable[str]:
    yield "<h2>Retention against target</h2>"
    curve, goal = _curve(log), log.target
    if not curve or goal is None:
        yield f"<p>Left out: {_why_no_curve(log)}</p>"
        return
    from flowstream.report.figures import retention_figure

    target = np.array([each.losses[goal] for each in curve])
    retained = np.array([log.retained(each) for each in curve])
    yield narrow(retention_figure([each.step for each in curve], target, retained))
    others = [name for name in curve[-1].losses if name != goal]
    yield (
        "<p>Each mark is an evaluation after so many steps; lower left is better. Left: the target was learned; up: "
        f"something else was forgotten, which is measured as the mean over {text(', '.join(others))}. A smaller "
        "learning rate forgets less, too: a method helps where its line lies below the line that plain fine-tuning "
        "draws over steps and learning rates, at the <i>same</i> loss on the target.</p>"
    )


def _evaluations(log: RunLog) -> Iterable[str]:
    yield "<h2>Evaluation sets</h2>"
    if not log.evaluations:
        yield "<p>Left out: no evaluation sets were given. Pass <code>--eval name=file</code>, a set each.</p>"
        return
    from flowstream.report.figures import evaluation_figure

    yield narrow(evaluation_figure(log))
    yield "<p>Mean loss of the labelled tokens of each set; step 0 is before training.</p>"
    names = list(dict.fromkeys(name for each in log.evaluations for name in each.losses))
    shown = {round(k) for k in np.linspace(0, len(log.evaluations) - 1, min(len(log.evaluations), _MAX_ROWS))}
    yield table(
        ["step", *(f"{name} (target)" if name == log.target else name for name in names), "mean of the others"],
        [
            [f"{each.step:,}", *(_loss(each, name) for name in names), number(log.retained(each))]
            for each in (log.evaluations[k] for k in sorted(shown))
        ],
    )


def _temperature(log: RunLog) -> Iterable[str]:
    yield "<h2>τ, and what the weights do</h2>"
    if not any(math.isfinite(row.tau) for row in log.windows):
        yield "<p>Left out: no window was scored, or the policy needs no scores.</p>"
        return
    from flowstream.report.figures import tau_figure

    last, accepts = log.windows[-1], log.mode == "resample"
    yield tau_figure(log.windows, accepts=accepts)
    share = (
        f"Of {last.samples_seen:,.0f} samples seen {100 * last.acceptance:.1f} % were accepted: drawn with a "
        "probability equal to their weight. The others were scored, but not trained on."
        if accepts
        else f"The mean weight, {number(last.mean_weight)} at the end, is by how much weighting shortens a step of "
        "plain gradient descent."
    )
    yield (
        f"<p>Left: τ, the loss at which FLOW's weight is 1/e; {number(last.tau)} ± {number(last.tau_error)} nats at "
        "the end. It should settle while the band narrows; a drift says that the stream's samples change. Right: the "
        f"effective sample size of the weights so far, as a share of the samples ({number(last.ess)} at the end): near "
        f"1 all samples count alike, and the weights carry no information. {share}</p>"
    )
    if log.losses.num_values:
        yield from (f"<p><b>{text(message)}</b></p>" for _, message in advice_on(log.losses, last.tau))
    left_out = {"a loss that is not finite": last.nonfinite, "no label": last.empty}
    if any(count > 0 for count in left_out.values()):
        counts = " and ".join(f"{count:,.0f} with {why}" for why, count in left_out.items() if count > 0)
        yield f"<p>Samples left out: {counts}.</p>"


def _losses(log: RunLog, policy: Policy) -> Iterable[str]:
    yield "<h2>Losses, and the weights they get</h2>"
    digest = log.losses
    if not digest.num_values:
        yield "<p>Left out: no sample was scored.</p>"
        return
    from flowstream.report.figures import WeightCurve, histogram, loss_figure

    tau = next((row.tau for row in reversed(log.windows) if math.isfinite(row.tau)), math.nan)
    shares, edges = histogram(digest.cdf, digest.quantile(0.001), digest.quantile(0.999), digest.num_values)
    formula = "exp(-f/τ)" if isinstance(policy, Flow) else describe(policy)
    name = f"weight, {formula}; dashed: τ = {number(tau)}"
    curves = [WeightCurve(name=name, tau=tau, policy=policy)] if tau > 0 else []
    yield narrow(loss_figure(shares, edges, curves))
    quantiles = ", ".join(f"{100 * q:.0f} %: {number(digest.quantile(q))}" for q in (0.1, 0.25, 0.5, 0.75, 0.9))
    yield (
        f"<p>The loss of each of {digest.num_values:,} samples under the frozen reference (the outermost bins hold all "
        "that is beyond them), and the weight of a sample of that loss. Where the curve is flat over the losses, the "
        f"weights hardly tell samples apart. Quantiles, in nats: {quantiles}.</p>"
    )


def _steps(log: RunLog) -> Iterable[str]:
    yield "<h2>Training</h2>"
    if not log.steps:
        yield "<p>Left out: no step was taken.</p>"
        return
    from flowstream.report.figures import steps_figure

    drawn = steps_figure(log.steps)
    yield drawn if any(math.isfinite(row.grad_norm) for row in log.steps) else narrow(drawn)
    which = (
        "over the samples that were drawn: easier ones than the mean of all"
        if log.mode == "resample"
        else "weighted, and so not to be compared with the evaluations' losses"
    )
    yield f"<p>The loss as it was minimised, {which}; {number(log.steps[-1].loss)} nats at the last step noted.</p>"


def _costs(log: RunLog) -> Iterable[str]:
    yield "<h2>Scoring time and waits</h2>"
    if not any(math.isfinite(row.score_seconds) for row in log.windows):
        yield "<p>Left out: nothing was scored.</p>"
        return
    from flowstream.report.figures import cost_figure

    last = log.windows[-1]
    yield cost_figure(log.windows)
    yield (
        f"<p>Left: {number(last.score_seconds)} s went into scoring, and for {number(last.wait_seconds)} s "
        "training waited for the loader or for other ranks. On a GPU scoring is enqueued beside training, which hides "
        "a part of its time. A wait that grows as fast as the run asks for more loader workers. Right: the share of "
        "losses that were found in the cache and not computed; from the second epoch on it should rise.</p>"
    )


def _samples(log: RunLog) -> Iterable[str]:
    yield "<h2>The easiest and the hardest samples</h2>"
    easiest, hardest = log.extremes.sides()
    if not easiest:
        yield "<p>Left out: no sample was noted.</p>"
        return
    yield (
        "<p>Left the prompt, right the response. Look for what should not be there: the hardest samples of a set are "
        "often broken, mislabelled or in another language, the easiest ones copied or known by heart.</p>"
    )
    yield from side_by_side("Easiest", easiest)
    yield from side_by_side("Hardest", hardest)


def _settings(log: RunLog) -> Iterable[str]:
    yield "<h2>Settings and versions</h2>"
    if not (log.settings or log.versions or log.seconds):
        yield "<p>Left out: none were noted.</p>"
        return
    if log.settings:
        yield table(["setting", "value"], [[name, str(value)] for name, value in log.settings.items()])
    if log.versions:
        yield pairs(log.versions)
    if log.seconds:
        yield pairs({f"seconds, {stage}": f"{seconds:.1f}" for stage, seconds in log.seconds.items()})


def _curve(log: RunLog) -> list[Evaluation]:
    """The evaluations that have a finite loss both on the target and on others."""
    target = log.target or ""
    return [
        each
        for each in log.evaluations
        if math.isfinite(each.losses.get(target, math.nan)) and math.isfinite(log.retained(each))
    ]


def _why_no_curve(log: RunLog) -> str:
    if not log.evaluations:
        return "it needs evaluation sets, one for the target and one at least for what shall be retained."
    names = text(", ".join(dict.fromkeys(name for each in log.evaluations for name in each.losses)))
    if log.target is None:
        return f"none of the evaluation sets ({names}) was named as the target."
    if all(log.target not in each.losses for each in log.evaluations):
        return f"the target, {text(log.target)}, is none of the evaluation sets ({names})."
    return f"it needs a finite loss on the target and on one other set at least; evaluated were {names}."


def _loss(evaluation: Evaluation, name: str | None) -> str:
    return number(evaluation.losses.get(name or "", math.nan))
