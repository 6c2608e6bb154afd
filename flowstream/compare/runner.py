"""`flowstream compare` from texts to the table, with its progress on the terminal; what is finished is kept."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from flowstream.compare.analysis import BASELINE
from flowstream.compare.experiment import Plan, SeedOutcome, num_cells, run_seed
from flowstream.compare.fingerprint import fingerprint_of
from flowstream.compare.material import Material, demo_material, read_material
from flowstream.compare.methods import parse_methods
from flowstream.compare.pool import num_cores, run_side_by_side
from flowstream.compare.reference import Reference, load_reference, score
from flowstream.compare.report import Findings, write_report
from flowstream.compare.results import as_json, write_whole
from flowstream.compare.settings import Settings
from flowstream.compare.summary import COST, figures_of, markdown, rows_of, verdict
from flowstream.compare.versions import versions
from flowstream.finetune.paths import make_folder
from flowstream.finetune.quiet import quiet
from flowstream.scoring.base import Level

_SETTINGS = "settings.json"


def compare(settings: Settings) -> Findings:
    """Run what is not yet finished, write `results.json`, `report.html` and `table.md`, and print the table.

    Raises:
        ValueError, OSError: what the user can mend, in one line.
    """
    began = time.perf_counter()
    _check_folder(settings)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with _calm(), Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        plan = _prepared(settings, progress)
        seeds = range(settings.seeds)
        total = num_cells(plan, seeds)
        bar, numbers = progress.add_task("fine-tuning", total=total), itertools.count(1)

        def finished(what: str) -> None:
            progress.update(bar, advance=1, description=what)
            if not console.is_terminal:  # where there is no bar, a line
                console.print(f"run {next(numbers)} of at most {total}: {what}", highlight=False)

        most = 1 if torch.cuda.is_available() else num_cores()
        outcomes = run_side_by_side(run_seed, plan, seeds, finished, max_processes=settings.processes or most)
    found = _findings(plan, outcomes)
    _write(found, settings.out)
    num_kept = sum(outcome.num_kept for outcome in outcomes)
    total = sum(outcome.num_cells for outcome in outcomes)
    table = (settings.out / "table.md").read_text(encoding="utf-8")
    print(table)
    print(
        f"{total} cells, {num_kept} of them finished before; {time.perf_counter() - began:.0f} s. "
        f"Report: {settings.out / 'report.html'}"
    )
    return found


def _check_folder(settings: Settings) -> None:
    """`ValueError` where the folder is of another comparison."""
    make_folder("--out", settings.out)
    path = settings.out / _SETTINGS
    if path.exists():
        settings.check_goes_on(json.loads(path.read_text(encoding="utf-8")))
    elif any(settings.out.iterdir()):
        raise ValueError(f"--out {settings.out} holds other files, and no comparison: give an empty or a new folder")


def _take_folder(settings: Settings) -> None:
    """From now on it is of this comparison, and of no other."""
    write_whole(settings.out / _SETTINGS, json.dumps(settings.asked(), indent=1))


def _prepared(settings: Settings, progress: Progress) -> Plan:
    """The plan, with material and losses on disk; as they were left, where they are there."""
    folder = settings.out
    path, losses, known = folder / "material.safetensors", folder / "losses", folder / "reference.json"
    material = _own_material(settings, path) if settings.model is not None else _demo_material(settings, path, progress)
    if not path.exists():
        material.save(path)
    if known.exists():
        reference = Reference.of_plain(json.loads(known.read_text(encoding="utf-8")))
        _check_weights(settings, material, reference)
    else:
        reference = _scored(settings, material, losses, progress)
        write_whole(known, json.dumps(reference.as_plain(), indent=1))
    return Plan(settings=settings, material=path, losses=losses, reference=reference)


def _scored(settings: Settings, material: Material, losses: Path, progress: Progress) -> Reference:
    """The reference, with its losses at the levels that methods ask for."""
    methods = parse_methods(settings.methods)
    levels: list[Level] = ["sample"] if any(method.needs_losses for method in methods) else []
    if any(method.feed == "flow-token" for method in methods):
        levels.append("token")
    bar = progress.add_task("scoring", visible=bool(levels))
    return score(
        material, losses, levels=levels, on_scored=lambda done, of: progress.update(bar, completed=done, total=of)
    )


def _check_weights(settings: Settings, material: Material, reference: Reference) -> None:
    now = fingerprint_of(load_reference(material.model).state_dict())
    if reference.fingerprint not in ("", now):
        raise ValueError(
            f"{settings.out} is of another comparison: the weights of --model have changed. Give another --out"
        )


def _own_material(settings: Settings, path: Path) -> Material:
    material = read_material(settings)
    _check_batch(settings, material)
    if path.exists() and Material.load(path).fingerprint != material.fingerprint:
        raise ValueError(
            f"{settings.out} is of another comparison: what is in --data, --general, --validation or --test has "
            "changed. Give another --out"
        )
    _take_folder(settings)  # what the user may have mistaken was found before
    return material


def _demo_material(settings: Settings, path: Path, progress: Progress) -> Material:
    _take_folder(settings)
    if path.exists():
        material = Material.load(path)
    else:
        bar = progress.add_task("pre-training")
        material = demo_material(
            settings, settings.out, lambda done, of: progress.update(bar, completed=done, total=of)
        )
    _check_batch(settings, material)
    return material


def _check_batch(settings: Settings, material: Material) -> None:
    if len(material.train) < settings.batch_size:
        raise ValueError(
            f"there are {len(material.train)} samples to learn, and a batch has {settings.batch_size}: give more "
            "samples, or a smaller --batch-size"
        )


def _findings(plan: Plan, outcomes: list[SeedOutcome]) -> Findings:
    runs = [run for outcome in outcomes for run in outcome.runs]

    def flops(method: str) -> float:
        ends = [run.points[-1].flops for run in runs if (run.budget, run.method) == ("equal_steps", method)]
        return sum(ends) / len(ends)

    ratios = {method.name: flops(method.name) / flops(BASELINE) for method in plan.methods}
    judged = [outcome.judged for outcome in outcomes]
    methods = figures_of(judged, ratios, plan.settings.budget_names)
    return Findings(
        settings=plan.settings.asked(),
        versions=versions(),
        reference=plan.reference,
        seeds=[outcome.seed for outcome in outcomes],
        runs=runs,
        curves=[each.curve for each in judged],
        methods=methods,
        verdict=verdict(methods, len(outcomes)),
    )


def _write(found: Findings, folder: Path) -> None:
    head, rows = rows_of(found.methods)
    words = f"{found.verdict}\n\n{COST}\n"
    write_whole(folder / "table.md", f"{markdown(head, rows)}\n\n{words}")
    plain = {**asdict(found), "cost": COST, "table": [head, *rows]}
    write_whole(folder / "results.json", as_json(plain))
    write_report(found, folder / "report.html")


@contextmanager
def _calm() -> Iterator[None]:
    """Without other libraries' notices, and without the advice that each of many streams gives."""
    advice = logging.getLogger("flowstream")
    level = advice.level
    advice.setLevel(logging.ERROR)
    try:
        with quiet():
            yield
    finally:
        advice.setLevel(level)
