"""One run of `flowstream vision`: the three stages, what was learned and what was kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import Dataset

from flowstream.finetune.quiet import quiet
from flowstream.scoring.out_of_memory import is_out_of_memory
from flowstream.temperature import FixedTemperature, RunningMedian, TargetESS, Temperature
from flowstream.vision.datasets import load_task, original_images, preset_of
from flowstream.vision.evaluation import Measures, measure
from flowstream.vision.methods import Method
from flowstream.vision.models import digits_resnet, load_model, save_model
from flowstream.vision.recipe import Recipe, fine_tune, probe_losses, retention
from flowstream.vision.task import Task, digits, num_of

if TYPE_CHECKING:
    from flowstream.cli.vision import Vision


@dataclass(frozen=True, kw_only=True)
class _Tuned:
    """Stages 2 and 3 at one learning rate."""

    learning_rate: float
    model: nn.Module
    validation: Measures
    best_epoch: int
    figures: dict[str, float]


def run(settings: Vision) -> dict[str, Any]:
    """Run it, print it, write it; the results.

    Raises:
        ValueError, OSError: what the user can mend, in one line.
    """
    method = Method.of(settings.method)
    if settings.out is not None:
        _make_folder(settings.out)
    try:
        with quiet():
            return _run(settings, method)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        told = str(error).splitlines()[0]
        raise ValueError(f"out of memory, {told}: lower --batch-size or --size") from error


def _run(settings: Vision, method: Method) -> dict[str, Any]:
    console = Console(highlight=False, soft_wrap=True)
    recipe = _recipe(settings)
    model, task, original = _opened(settings)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    results: dict[str, Any] = {"settings": {k: str(v) for k, v in asdict(settings).items() if v not in (None, ())}}
    say = _Lines(console, results)
    console.print(
        f"{settings.model}, {sum(p.numel() for p in model.parameters()):,} parameters; {settings.dataset}, "
        f"{task.num_classes} classes: {num_of(task.train):,} images to train on, {num_of(task.validation):,} to choose "
        f"by, {num_of(task.test):,} to test"
    )
    before = None if original is None else measure(model, original, num_workers=settings.workers)
    probe = recipe.probe(model, task)
    say("probe", measure(probe, task.test, num_workers=settings.workers), before)
    if settings.exact_tau:
        tau = float(probe_losses(probe, task, recipe).median())
        recipe = replace(recipe, temperature=FixedTemperature(max(tau, 1e-6)))
    found = [_tuned(probe, task, method, recipe, rate) for rate in _rates(settings, method)]
    for each in found if len(found) > 1 else ():
        console.print(f"lr {each.learning_rate:g}: validation accuracy {each.validation.accuracy:.4f}")
    best = max(found, key=lambda each: (each.validation.accuracy, -each.validation.loss))
    kept = None if original is None else retention(best.model, model, original, num_workers=settings.workers)
    say(settings.method, measure(best.model, task.test, num_workers=settings.workers), kept)
    figures = {name: best.figures[f"flow/{name}"] for name in ("tau", "mean_weight", "ess")}
    results |= {"learning_rate": best.learning_rate, "epoch": best.best_epoch, **figures}
    console.print(
        f"lr {best.learning_rate:g}, epoch {best.best_epoch} of {recipe.epochs}, as validation chose; "
        + (
            f"τ {figures['tau']:.4f} nats, mean weight {figures['mean_weight']:.3f}, ESS/n {figures['ess']:.3f}"
            if figures["tau"] == figures["tau"]
            else "weights of 1"
        )
    )
    if settings.out is not None:
        save_model(best.model, settings.out)
        (settings.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        console.print(f"model and results.json: {settings.out}")
    return results


class _Lines:
    """Prints a row of accuracies, and keeps it."""

    def __init__(self, console: Console, results: dict[str, Any]) -> None:
        self._console, self._results = console, results

    def __call__(self, name: str, target: Measures, retained: Measures | None) -> None:
        told = "" if retained is None else f"   original {retained.accuracy:.4f}"
        self._console.print(f"{name:<16} target {target.accuracy:.4f}{told}")
        self._results[name] = {"target": target._asdict(), "original": retained and retained._asdict()}


def _tuned(probe: nn.Module, task: Task, method: Method, recipe: Recipe, rate: float) -> _Tuned:
    found = fine_tune(probe, task, method, recipe, learning_rate=rate)
    model = recipe.train_head(found.model, task)
    validation = measure(model, task.validation, num_workers=recipe.num_workers)
    return _Tuned(
        learning_rate=rate, model=model, validation=validation, best_epoch=found.best_epoch, figures=found.figures
    )


def _recipe(settings: Vision) -> Recipe:
    preset = preset_of(settings.dataset)
    epochs, probe_lr = settings.epochs or preset.epochs, settings.probe_lr or preset.probe_lr
    return Recipe(
        probe_epochs=settings.probe_epochs or preset.epochs,
        epochs=epochs,
        head_epochs=settings.head_epochs or preset.epochs,
        probe_lr=probe_lr,
        head_lr=probe_lr,
        batch_size=settings.batch_size or preset.batch_size,
        momentum=preset.momentum,
        weight_decay=preset.weight_decay,
        temperature=_temperature(settings),
        normalize=settings.normalize,
        score_once=settings.score_once,
        mixup=settings.mixup,
        seed=settings.seed,
        num_workers=settings.workers,
    )


def _temperature(settings: Vision) -> Temperature:
    if settings.target_ess is not None:
        return TargetESS(settings.target_ess)
    return RunningMedian() if settings.tau is None else FixedTemperature(settings.tau)


def _rates(settings: Vision, method: Method) -> tuple[float, ...]:
    preset = preset_of(settings.dataset)
    return settings.lr or (preset.standard_lr if method.weights == "standard" else preset.lr,)


def _opened(settings: Vision) -> tuple[nn.Module, Task, Dataset[Any] | None]:
    """The pre-trained model, the new task, and images of the original one."""
    if settings.dataset == "digits":
        old, new = digits(settings.seed)
        return digits_resnet(old, seed=settings.seed), new, old.test
    task = load_task(
        settings.dataset, settings.data, size=settings.size, download=settings.download, seed=settings.seed
    )
    original = None if settings.original is None else original_images(settings.original, size=settings.size)
    return load_model(settings.model, weights=settings.weights), task, original


def _make_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out {folder} is there already: give a folder that is new or empty")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be made ({error.strerror}): give another folder") from error
