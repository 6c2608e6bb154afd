"""The three-stage recipe on digits: what each method learns of 5 to 9, and what it keeps of 0 to 4.

A ResNet of 78,000 parameters is pre-trained on the digits 0 to 4 and fine-tuned on 5 to 9 (541 and 538 images), by each
method at the same learning rates, with as many steps and the same orders of images. Target: accuracy on the new digits;
retained: accuracy on the old ones, with the original head and BatchNorm put back. Standard fine-tuning draws the curve
over the learning rates, from 0 on (the lower envelope on validation, valued on the test split); of a method the
learning rate with the lowest target plus retained loss on validation is reported, on the test split, and its gain is
how much more it retains there than the curve does at equal target loss. Whichever method wins, this prints it.

python benchmarks/vision.py        # 5 seeds
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch

from flowstream.compare.frontier import Frontier, best_sum, envelope
from flowstream.vision.evaluation import Measures, measure
from flowstream.vision.methods import Method
from flowstream.vision.models import digits_resnet
from flowstream.vision.recipe import Recipe, fine_tune, retention
from flowstream.vision.task import Task, digits

METHODS = (
    *("standard", "flow", "permuted", "resample", "l2", "l1", "wise", "lora", "mofo", "hft", "dro"),
    *("flow+l2", "flow+wise"),
)
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
CURVE = (0.0, *RATES)
"""Of standard fine-tuning. At 0 it is the probe, its head trained on: else methods of small steps would lie beyond."""


def rates_of(method: str) -> tuple[float, ...]:
    return CURVE if method == "standard" else RATES


class Point(NamedTuple):
    """One learning rate of one method."""

    target: Measures
    retained: Measures
    validation_target: float
    """Loss, nats."""
    validation_retained: float


class Row(NamedTuple):
    """What one seed says of one method."""

    rate: float
    target: Measures
    retained: Measures
    gain: float
    """Nats of retained loss, against standard's curve at equal target loss; NaN beyond its ends."""
    points: float
    """The same in percent of retained accuracy."""


@functools.cache
def prepared(seed: int) -> tuple[torch.nn.Module, torch.nn.Module, Task, Task, Recipe]:
    old, new = digits(seed)
    recipe = Recipe(probe_epochs=10, epochs=10, head_epochs=5, probe_lr=0.01, head_lr=0.01, batch_size=32, seed=seed)
    original = digits_resnet(old, seed=seed)
    return original, recipe.probe(original, new), old, new, recipe


def run(seed: int, method: str, rate: float) -> Point:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft 0.21
    original, probe, old, new, recipe = prepared(seed)
    tuned = probe
    if rate:
        tuned = fine_tune(probe, new, Method.of(method), recipe, learning_rate=rate, choose_epoch=False).model
    tuned = recipe.train_head(tuned, new)
    return Point(
        measure(tuned, new.test),
        retention(tuned, original, old.test),
        measure(tuned, new.validation).loss,
        retention(tuned, original, old.validation).loss,
    )


def before(seed: int) -> tuple[Measures, Measures]:
    """Of the probe: target and retained."""
    torch.set_num_threads(1)
    original, probe, old, new, _ = prepared(seed)
    return measure(probe, new.test), measure(original, old.test)


def judged(points: dict[str, list[Point]]) -> dict[str, Row]:
    """One seed's points, by method and learning rate."""

    def on_validation(method: str) -> tuple[list[float], list[float]]:
        own = points[method]
        return [p.validation_target for p in own], [p.validation_retained for p in own]

    corners = [points["standard"][i] for i in envelope(*on_validation("standard"))]
    target = [p.target.loss for p in corners]
    losses = Frontier.through(target, [p.retained.loss for p in corners])
    errors = Frontier.through(target, [100 * (1 - p.retained.accuracy) for p in corners])
    rows = {}
    for method, own in points.items():
        i = best_sum(*on_validation(method))
        x, y = own[i].target, own[i].retained
        rows[method] = Row(
            rates_of(method)[i], x, y, losses.gain(x.loss, y.loss), errors.gain(x.loss, 100 * (1 - y.accuracy))
        )
    return rows


def spread(values: Sequence[float], digits: int, *, signed: bool = False) -> str:
    """Mean and standard deviation over the seeds that have a value, and how many have where not all do."""
    own = [value for value in values if not math.isnan(value)]
    if not own:
        return "beyond the curve"
    sd = statistics.stdev(own) if len(own) > 1 else 0.0
    few = "" if len(own) == len(values) else f" ({len(own)} of {len(values)})"
    return f"{statistics.mean(own):{'+' if signed else ''}.{digits}f}±{sd:.{digits}f}{few}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS), help="standard is always among them")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    methods = list(dict.fromkeys(["standard", *arguments.methods.split(",")]))
    seeds = range(arguments.seeds)
    started = time.perf_counter()
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        begun = {
            (seed, method): [pool.submit(run, seed, method, rate) for rate in rates_of(method)]
            for seed in seeds
            for method in methods
        }
        starts = [pool.submit(before, seed) for seed in seeds]
        points = {key: [future.result() for future in futures] for key, futures in begun.items()}
        probes = [future.result() for future in starts]
    rows = [judged({method: points[seed, method] for method in methods}) for seed in seeds]
    print(f"digits 5 to 9 after 0 to 4, {len(seeds)} seeds, mean ± standard deviation; test split\n")
    print(f"{'':<10} {'target %':>12} {'retained %':>12} {'lr':>14}   {'gain at equal target, nats':<27} {'% points'}")
    ends = [spread([100 * measures.accuracy for measures in column], 1) for column in zip(*probes, strict=True)]
    print(f"{'probe':<10} {ends[0]:>12} {ends[1]:>12}")
    for method in methods:
        own = [row[method] for row in rows]
        rates = sorted({row.rate for row in own})
        shown = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
        nats, percent = ([row.gain for row in own], [row.points for row in own])
        print(
            f"{method:<10} {spread([100 * row.target.accuracy for row in own], 1):>12} "
            f"{spread([100 * row.retained.accuracy for row in own], 1):>12} {shown:>14}   "
            f"{spread(nats, 3, signed=True):<27} {spread(percent, 1, signed=True)}"
        )
    print("\nstandard fine-tuning, each learning rate: target % / retained % / target nats / retained nats")
    for i, rate in enumerate(CURVE):
        own = [points[seed, "standard"][i] for seed in seeds]
        print(
            f"  {rate:<6g} {spread([100 * p.target.accuracy for p in own], 1)} / "
            f"{spread([100 * p.retained.accuracy for p in own], 1)} / {spread([p.target.loss for p in own], 3)} / "
            f"{spread([p.retained.loss for p in own], 3)}"
        )
    print(f"\n{sum(map(len, points.values()))} runs, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
