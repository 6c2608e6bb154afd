"""`report.html`: one page that needs no network, says what was measured, and explains every figure in a sentence or two."""

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from flowstream.demo import figures
from flowstream.demo.feeds import BASELINE, METHODS
from flowstream.demo.results import Figure, Results

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p { max-width: 46rem; } p.lead { color: #555; margin-top: 0; }
svg { width: 100%; height: auto; font-family: system-ui, sans-serif; }
svg.narrow { max-width: 34rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: #555; font-weight: 600; vertical-align: bottom; }
pre { background: #f6f6f4; padding: .7rem .9rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; margin: .3rem 0; }
.problem { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem; margin-bottom: 1.4rem; }
.problem > * { min-width: 0; } .problem > p { grid-column: 1 / -1; margin: 0; }
"""


def write_report(results: Results, path: Path) -> None:
    """Write the page; everything in it is inline."""
    body = "\n".join(_sections(results))
    path.write_text(
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>flowstream demo</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n",
        encoding="utf-8",
    )


def summary_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table that both the page and the terminal show."""
    head = [
        "method",
        "gain, equal steps",
        "gain, equal FLOPs",
        "target",
        "retained",
        "exact match",
        "right answer",
        "FLOPs",
    ]
    rows = []
    for method in METHODS:
        result = results.methods[method]
        choices = result.equal_steps.choices
        rows.append(
            [
                result.title,
                _gain(result.equal_steps, method),
                _gain(result.equal_flops, method),
                *(
                    _mean([getattr(choice, name) for choice in choices], digits)
                    for name, digits in (
                        ("target_loss", 3),
                        ("retained_loss", 3),
                        ("exact_match", 3),
                        ("answer_accuracy", 3),
                    )
                ),
                f"{result.flops_ratio:.2f}×",
            ]
        )
    return head, rows


def verdict(results: Results) -> str:
    """One sentence on which method retained most, drawn from the numbers alone."""
    figures_ = {m: results.methods[m].equal_steps for m in METHODS if m != BASELINE}
    inside = {method: figure for method, figure in figures_.items() if math.isfinite(figure.mean)}
    if not inside:
        return (
            "No method's chosen point lies within the range of standard fine-tuning's curve, so none can be compared."
        )
    best = max(inside, key=lambda method: inside[method].mean)
    clear = [
        m for m, f in inside.items() if len(f.choices) > 1 and f.num_outside == 0 and min(c.gain for c in f.choices) > 0
    ]
    above = ", ".join(METHODS[m] for m in clear) or "none"
    return (
        f"At equal steps the largest mean gain on the test split is {inside[best].mean:+.4f} nats ({METHODS[best]}). "
        f"Above standard fine-tuning's curve on every seed: {above}."
    )


def _sections(results: Results) -> Iterable[str]:
    temperature, seeds = results.temperature, results.settings["seeds"]
    model = results.settings["model"]
    head, rows = summary_rows(results)
    yield "<h1>flowstream demo: what is retained, at equal target?</h1>"
    yield (
        f"<p class='lead'>A Llama of {results.parameters:,} parameters, pre-trained for {model['steps']:,} steps on the "
        f"standard library of Python {_e(results.versions['python'])}, fine-tuned on {results.settings['num_problems']:,} "
        f"generated word problems by six methods at {len(results.settings['learning_rates'])} learning rates and "
        f"{len(seeds)} seeds. No network was used; {results.seconds['total']:.0f} s in total.</p>"
    )
    yield f"<p><b>{_e(verdict(results))}</b></p>"
    yield (
        "<p>The models are far too small, and the seeds too few, to tell whether FLOW helps in general: what this page "
        "shows is that the machinery measures it fairly. A gain whose spread covers zero, or which the permuted weights "
        "reach as well, is no effect.</p>"
    )
    yield "<h2>The figures</h2>" + _table(head, rows)
    yield (
        "<p><b>equal steps</b>, <b>equal FLOPs</b>: the gain, that is how much lower the loss on held-out pre-training text is than on standard fine-tuning's curve at "
        "the <i>same</i> target loss, in nats a token, mean ± standard deviation over seeds (positive retains more). "
        "The learning rate and the step are chosen on validation (lowest target plus retained loss) and valued on the "
        "test split, as are the points of the curve. “Outside” counts seeds where the chosen target lies beyond the "
        "curve: nothing is extrapolated. <b>target</b>, <b>retained</b>, <b>exact match</b> (the whole worked answer, "
        "token for token) and <b>right answer</b> (the final number of the decoded answer) are the test split's, at equal "
        "steps; <b>FLOPs</b> is a whole run over standard's, scoring included. Before fine-tuning: "
        f"target {results.reference['test']['target_loss']:.3f}, retained {results.reference['test']['retained_loss']:.3f}.</p>"
    )
    yield figures.gain_figure(results)
    yield (
        "<p>The gain of each method, one dot a seed, the bar their mean. Seeds are paired: a method is held against the "
        "curve of its own seed, with the same order of problems.</p>"
    )
    yield "<h2>Retention against target</h2>" + figures.retention_figure(results)
    yield (
        "<p>Every point is a run at one learning rate after some steps, on validation; lower left is better. Lines join the "
        "points of a method that none of its others beats. AdamW cancels a constant scale of the loss, and a smaller "
        "step forgets less whatever the weights, so the baseline is not a number but the black curve: what standard "
        "fine-tuning reaches over learning rates and steps. A method helps where its line lies below it. "
        "Dotted: the checkpoint before fine-tuning.</p>"
    )
    yield _table(
        ["gain over the whole validation curve", *(f"seed {seed}" for seed in seeds)],
        [[METHODS[m], *(_signed(g) for g in results.methods[m].curve_gain)] for m in METHODS if m != BASELINE],
    )
    yield (
        "<p>A second look, with nothing chosen: the vertical distance between the two lines above, averaged over the "
        "target losses that both reach.</p>"
    )
    yield "<h2>τ, online against exact</h2>" + figures.tau_figure(results)
    yield (
        f"<p>Left: the running median that the weighted stream used, with the error that it reports itself, against the "
        f"median of an offline pass over the whole fine-tuning set ({temperature.exact:.4f} nats). At the end of the runs "
        f"they differ by at most {100 * temperature.relative_error:.2f} %. Right: the effective sample size of the weights; "
        f"exact: {temperature.exact_ess:.3f}. The nearer to 1, the less information the weights carry.</p>"
    )
    yield "<h2>The losses, and the weights they get</h2>" + _narrow(figures.loss_figure(results))
    yield (
        "<p>The loss of every fine-tuning problem under the frozen model, by level, and FLOW's weight. Problems whose "
        "worked answers look like the standard library are easy, long arithmetic is hard.</p>"
    )
    yield "<h2>What it costs</h2>" + _costs(results)
    yield (
        "<p>A whole run, mean over seeds and learning rates. Training is charged 6N FLOPs a token, scoring 2N, each problem "
        "scored once; the offline method scores the whole set before its first step. “At equal FLOPs” above "
        "admits only points that fit, scoring included, into standard's whole run: the last column says how many steps "
        "that leaves. Seconds are wall time without evaluations.</p>"
    )
    yield "<h2>The easiest and the hardest problems</h2>" + "".join(_problems(results))
    yield "<h2>Pre-training</h2>" + _narrow(figures.pretraining_figure(results))
    yield (
        f"<p>{results.corpus['pretraining_tokens']:,} tokens read, of {results.corpus['train_tokens']:,} in the training split "
        f"({results.corpus['train_chars']:,} characters, de-duplicated, split by module). Retention is measured on "
        f"{results.corpus['validation_tokens']:,} (validation) and {results.corpus['test_tokens']:,} (test) tokens of other "
        "modules.</p>"
    )
    yield "<h2>Settings and versions</h2>" + _pairs(results.settings | results.versions)
    yield _pairs({f"seconds, {stage}": f"{value:.1f}" for stage, value in results.seconds.items()})


def _costs(results: Results) -> str:
    allowance = max(p.flops for run in results.runs if run.method == BASELINE for p in run.points)
    rows = []
    for method in METHODS:
        result = results.methods[method]
        steps = [p.step for run in results.runs if run.method == method for p in run.points if p.flops <= allowance]
        rows.append(
            [
                result.title,
                f"{result.flops_ratio:.2f}×",
                f"{100 * result.score_share:.0f} %",
                f"{result.num_samples:.0f}",
                f"{result.acceptance:.2f}",
                f"{result.seconds:.1f}",
                f"{result.score_seconds:.2f}",
                str(max(steps, default=0)),
            ]
        )
    head = [
        "method",
        "FLOPs",
        "of it scoring",
        "distinct problems",
        "acceptance",
        "seconds",
        "scoring seconds",
        "steps at equal FLOPs",
    ]
    return _table(head, rows)


def _problems(results: Results) -> Iterable[str]:
    for sample in results.samples:
        yield (
            f"<div class='problem'><p><b>{_e(sample.level)}</b>, loss {sample.loss:.2f}, weight {sample.weight:.2f}: "
            f"{_e(sample.question)}</p><pre>{_e(sample.worked)}</pre>"
            f"<pre title='decoded after standard fine-tuning'>{_e(sample.decoded)}</pre></div>"
        )
    yield "<p>Left the worked answer, right what the model writes after standard fine-tuning (its chosen point, first seed).</p>"


def _gain(figure: Figure, method: str) -> str:
    if method == BASELINE:
        return "its curve"
    if not figure.choices:
        return "over budget"
    outside = f" ({figure.num_outside} outside)" if figure.num_outside else ""
    if not math.isfinite(figure.mean):
        return "outside"
    spread = f" ± {figure.spread:.4f}" if math.isfinite(figure.spread) else ""
    return f"{figure.mean:+.4f}{spread}{outside}"


def _signed(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else "no overlap"


def _mean(values: Sequence[float], digits: int) -> str:
    return f"{sum(values) / len(values):.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<th>{_e(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{cells}</tr>{lines}</table></div>"


def _pairs(values: dict[str, object]) -> str:
    return "<p>" + "; ".join(f"{_e(name)}: <code>{_e(str(value))}</code>" for name, value in values.items()) + "</p>"


def _narrow(svg: str) -> str:
    return svg.replace("<svg ", "<svg class='narrow' ", 1)


def _e(text: str) -> str:
    return html.escape(text)
