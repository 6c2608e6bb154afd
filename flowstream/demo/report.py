"""`report.html`: one page that needs no network, says what was measured, and explains every figure in words."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from flowstream.compare.analysis import BASELINE
from flowstream.demo import figures
from flowstream.demo.feeds import METHODS
from flowstream.demo.results import Results
from flowstream.demo.summary import spread_of_weights, summary_rows, verdict
from flowstream.report.page import narrow, page, pairs, sample, table, text


def write_report(results: Results, path: Path) -> None:
    """Write the page; everything in it is inline."""
    sections = (_opening, _table, _retention, _temperature, _losses, _costs, _problems, _pretraining, _settings)
    body = [piece for section in sections for piece in section(results)]
    path.write_text(page("flowstream demo", body), encoding="utf-8")


def _opening(results: Results) -> Iterable[str]:
    settings = results.settings
    yield "<h1>flowstream demo: what is retained, at equal target?</h1>"
    yield (
        f"<p class='lead'>A Llama of {results.parameters:,} parameters, pre-trained for {settings['model']['steps']:,} "
        f"steps on the standard library of Python {text(results.versions['python'])}, fine-tuned on "
        f"{settings['num_problems']:,} generated word problems by six methods, at {len(settings['learning_rates'])} "
        f"learning rates, with {len(settings['seeds'])} seeds. No network; {results.seconds['total']:.0f} s.</p>"
    )
    yield f"<p><b>{text(verdict(results))}</b></p>"
    yield (
        "<p>The model is far too small, and the seeds too few, to tell whether FLOW helps in general: this page shows "
        "how it is measured, and what was measured here, whichever wins. A gain whose spread covers zero, or which "
        "the permuted weights reach as well, is no effect of <i>which</i> samples were weighted.</p>"
    )


def _table(results: Results) -> Iterable[str]:
    before = results.reference["test"]
    yield "<h2>The figures</h2>"
    yield table(*summary_rows(results))
    yield (
        "<p><b>equal steps</b>, <b>equal FLOPs</b>: the gain, that is how much lower the loss on held-out pre-training "
        "text is than on standard fine-tuning's curve at the <i>same</i> target loss, in nats a token: mean ± standard "
        "deviation over seeds, positive retains more. Learning rate and step are chosen on validation (lowest target "
        "plus retained loss) and valued on the test split, and so are the points of the curve. “Out” counts seeds "
        "whose target lies beyond the curve: nothing is extrapolated. <b>less permuted</b>: the gain at equal steps "
        "less that of the permuted weights, seed by seed: what it is worth <i>which</i> samples have weight. The other "
        "columns are the test split's, at equal steps: <b>exact match</b> is the whole worked answer, token for token; "
        "<b>right answer</b> the final number of the decoded one; <b>FLOPs</b> a whole run over standard's, scoring "
        "included. “Over budget”: scoring alone costs more than standard's whole run. A model this small learns the "
        "form of an answer long before its arithmetic, so the last shares stay near 0. Before fine-tuning, the target "
        f"loss was {before['target_loss']:.3f} and the retained loss {before['retained_loss']:.3f}.</p>"
    )
    yield figures.gain_figure(results)
    yield (
        "<p>The gain of each method: a dot a seed, the bar their mean. Seeds are paired: a method is held against the "
        "curve of its own seed, which saw the same problems in the same order.</p>"
    )


def _retention(results: Results) -> Iterable[str]:
    yield "<h2>Retention against target</h2>"
    yield figures.retention_figure(results)
    yield (
        "<p>Every mark is a run at one learning rate after some steps, on validation; lower left is better. Lines join "
        "the corners of a method's lower left envelope. AdamW cancels a constant scale of the loss, and a "
        "smaller step forgets less whatever the weights. So the baseline is no number but the black line, which "
        "standard fine-tuning draws over learning rates and steps; a method helps where its line lies below. "
        "Dotted: the checkpoint before fine-tuning.</p>"
    )
    seeds = [f"seed {curve.seed}" for curve in results.curves]
    gains = {method: results.methods[method].curve_gain for method in METHODS if method != BASELINE}
    yield table(
        ["mean gain along the envelope, validation", *seeds],
        [
            [METHODS[method], *(f"{gain:+.4f}" if math.isfinite(gain) else "no overlap" for gain in of_seeds)]
            for method, of_seeds in gains.items()
        ],
    )
    yield (
        "<p>A second look, in which no single mark is chosen: how far the corners of a method's envelope lie below "
        "standard's line, on average over those within its range.</p>"
    )


def _temperature(results: Results) -> Iterable[str]:
    temperature = results.temperature
    yield "<h2>τ, online against exact</h2>"
    yield figures.tau_figure(results)
    yield (
        "<p>Left: the running median that the weighted stream used as τ, with the error that it reports of itself, "
        f"against the median of an offline pass over the whole fine-tuning set, {temperature.exact:.4f} nats. At the "
        f"end of the runs they differ by at most {100 * temperature.relative_error:.2f} %. Right: the effective sample "
        f"size of the weights so far. {spread_of_weights(results)}</p>"
    )


def _losses(results: Results) -> Iterable[str]:
    yield "<h2>Losses, and the weights they get</h2>"
    yield narrow(figures.loss_figure(results))
    yield (
        "<p>The loss of every fine-tuning problem under the frozen model, by level, and FLOW's weight at that loss. "
        "Answers worked in idiomatic Python are nearest to the pre-training text, bare arithmetic is farthest.</p>"
    )


def _costs(results: Results) -> Iterable[str]:
    rows = []
    for method in METHODS:
        result = results.methods[method]
        afforded = [run.points[-1].step for run in results.runs if (run.budget, run.method) == ("equal_flops", method)]
        rows.append(
            [
                result.title,
                f"{result.flops_ratio:.2f}×",
                f"{100 * result.score_share:.0f} %",
                f"{result.num_samples:.0f}",
                f"{result.acceptance:.2f}",
                f"{result.seconds:.1f}",
                f"{result.score_seconds:.2f}",
                f"{statistics.fmean(afforded):.0f}" if afforded else str(results.settings["steps"]),
            ]
        )
    head = ["FLOPs", "for scoring", "problems", "accepted", "seconds", "for scoring", "steps afforded"]
    yield "<h2>What it costs</h2>"
    yield table(["a whole run of", *head], rows)
    yield (
        "<p>Means over seeds and learning rates. Training is charged 6N FLOPs a token and scoring 2N, each problem "
        "scored once; the offline method scores the whole set before its first step, the streams as they go. The last "
        "column: the steps that standard's FLOPs pay for, scoring included; “equal FLOPs” above are runs of that many "
        "steps, with a schedule of their own, at the learning rate chosen at equal steps. Seconds are wall time "
        "without evaluations, the seeds side by side.</p>"
    )


def _problems(results: Results) -> Iterable[str]:
    yield "<h2>The easiest and the hardest problems</h2>"
    for problem in results.samples:
        yield sample(
            f"<b>{text(problem.level)}</b>, loss {problem.loss:.2f}, weight {problem.weight:.2f}: "
            f"{text(problem.question)}",
            problem.worked,
            problem.decoded,
        )
    yield (
        "<p>Left the worked answer; right what the model writes after standard fine-tuning (its chosen point, first "
        "seed).</p>"
    )


def _pretraining(results: Results) -> Iterable[str]:
    corpus = results.corpus
    yield "<h2>Pre-training</h2>"
    yield narrow(figures.pretraining_figure(results))
    yield (
        f"<p>{corpus['pretraining_tokens']:,} tokens were read, of {corpus['train_tokens']:,} in the training split "
        f"({corpus['train_chars']:,} characters, de-duplicated, split by module). Retention is measured on "
        f"{corpus['validation_tokens']:,} (validation) and {corpus['test_tokens']:,} (test) tokens of other "
        "modules.</p>"
    )


def _settings(results: Results) -> Iterable[str]:
    yield "<h2>Settings and versions</h2>"
    yield pairs(results.settings)
    yield pairs(results.versions)
    yield pairs({f"seconds, {stage}": f"{seconds:.1f}" for stage, seconds in results.seconds.items()})
