"""`flowstream demo` from the first byte to the report, with its progress on the terminal."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import transformers
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flowstream.compare.pool import run_side_by_side
from flowstream.demo.collection import collect
from flowstream.demo.experiment import run_seed
from flowstream.demo.feeds import SCORING
from flowstream.demo.preparation import prepare
from flowstream.demo.report import write_report
from flowstream.demo.results import Results
from flowstream.demo.settings import Settings
from flowstream.demo.summary import spread_of_weights, summary_rows, verdict

_NUM_COLUMNS = 4
"""Of the report's table, as many as a terminal has room for."""


def run(settings: Settings, seeds: Sequence[int], out: Path) -> Results:
    """Run everything, write `results.json` and `report.html` to `out`, and print a summary."""
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with _quiet(), Progress(*columns, console=console) as progress:
        bar = progress.add_task("pre-training", total=settings.model.steps)
        with _timed(seconds, "pre-training"):
            prepared = prepare(settings, out, lambda step: progress.update(bar, completed=step + 1))
        num_runs = len(seeds) * (len(list(settings.grid())) + len(SCORING))
        bar = progress.add_task("fine-tuning", total=num_runs)

        def finished(what: str) -> None:
            progress.update(bar, advance=1, description=what)

        with _timed(seconds, "fine-tuning"):
            outcomes = run_side_by_side(run_seed, prepared.task, seeds, finished, max_processes=settings.max_processes)
    seconds["total"] = time.perf_counter() - began
    results = collect(prepared, outcomes, seconds)
    results.save(out / "results.json")
    write_report(results, out / "report.html")
    _summarise(results, console)
    console.print(f"Report: {out / 'report.html'}", highlight=False)
    return results


def _summarise(results: Results, console: Console) -> None:
    head, rows = summary_rows(results)
    table = Table(
        title="Retained above standard's curve at equal target (test split, nats a token)",
        box=box.SIMPLE,
        padding=(0, 1),
    )
    for number, name in enumerate(head[:_NUM_COLUMNS]):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row[:_NUM_COLUMNS])
    console.print(table)
    console.print(verdict(results), highlight=False)
    temperature = results.temperature
    console.print(
        f"τ: exact {temperature.exact:.4f} nats, online within {100 * temperature.relative_error:.2f} % at the end. "
        f"{spread_of_weights(results)} {results.seconds['total']:.0f} s.",
        highlight=False,
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars, and without the advice that each of many streams gives: the summary gives it once."""
    transformers.utils.logging.disable_progress_bar()
    advice = logging.getLogger("flowstream")
    level = advice.level
    advice.setLevel(logging.ERROR)
    try:
        yield
    finally:
        advice.setLevel(level)
        transformers.utils.logging.enable_progress_bar()
