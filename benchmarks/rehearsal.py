"""mix-cd against random rehearsal and none, at the same number of batches: a prior task that is forgotten unequally.

Prior task: scikit-learn's handwritten digits, ten classes, in four domains (as they are, transposed, inverted, their
pixels shuffled). A small convolutional network learns it, and is then fine-tuned on the same digits upside down, which
collide with some of what it knows (6 and 9) and leave other domains nearly alone. Prints the accuracy on both tasks,
test split, and the paired differences over the seeds, whichever method wins. Needs flowstream[vision].

    python benchmarks/rehearsal.py [--seeds 10] [--batches 300] [--ratio 0.1] [--lr 0.002]
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flowstream as fs
from flowstream.rehearsal import Rehearsal

BATCH = 32
PRIOR_STEPS = 600
SHUFFLED = torch.randperm(64, generator=torch.Generator().manual_seed(7))
DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda x: x,
    "transposed": lambda x: x.mT,
    "inverted": lambda x: 1 - x,
    "shuffled": lambda x: x.flatten(-2)[..., SHUFFLED].view_as(x),
}
METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "random": {"strategy": "random"},
    "mix-cd, by domain": {"bins": 1, "label": "domain"},
    "mix-cd, by class": {"bins": 1, "label": "class"},
    "mix-cd, by loss": {"bins": 10},
    "mix-cd, by both": {"bins": 5, "label": "domain"},
}


@dataclass(frozen=True)
class Task:
    """Images [N, 1, 8, 8], classes [N] and domains [N], to train on and to test."""

    train: tuple[Tensor, Tensor, Tensor]
    test: tuple[Tensor, Tensor, Tensor]


def tasks(seed: int) -> tuple[Task, Task]:
    """The prior task and the new one: no test image, in whatever domain, is one that is trained on."""
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = pixels.float().view(-1, 1, 8, 8) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    halves = order[:1300], order[1300:]

    def of(changes: list[Callable[[Tensor], Tensor]]) -> Task:
        parts = []
        for half in halves:
            x = torch.cat([change(images[half]) for change in changes])
            domains = torch.arange(len(changes)).repeat_interleave(len(half))
            parts.append((x, labels[half].repeat(len(changes)), domains))
        return Task(*parts)

    return of(list(DOMAINS.values())), of([lambda x: x.flip(-1, -2)])


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def pretrained(task: Task, seed: int) -> nn.Module:
    model = network(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(PRIOR_STEPS):
        which = torch.randint(len(task.train[0]), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(task.train[0][which]), task.train[1][which]).backward()
        optimizer.step()
    return model


def accuracy(model: nn.Module, part: tuple[Tensor, Tensor, Tensor]) -> list[float]:
    """In %, of each domain."""
    x, y, domains = part
    with torch.no_grad():
        right = model(x).argmax(-1) == y
    return [100 * float(right[domains == domain].float().mean()) for domain in domains.unique().tolist()]


def finetuned(
    prior: nn.Module, old: Task, new: Task, how: dict[str, Any] | None, arguments: argparse.Namespace, seed: int
) -> nn.Module:
    """After so many batches, rehearsed ones among them."""
    model = copy.deepcopy(prior)
    scorer = fs.ClassifierScorer(prior, copy=True)
    rehearsal = None
    if how is not None:
        options = {"criterion": "class", "ratio": arguments.ratio, "seed": seed, "batch_size": 256} | how
        options |= {"label": old.train[1 if how["label"] == "class" else 2]} if "label" in how else {}
        rehearsal = Rehearsal(TensorDataset(*old.train[:2]), scorer, **options)
    loader = DataLoader(
        TensorDataset(*new.train[:2]), batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed)
    )
    stream = fs.FlowStream(loader, scorer, policy=fs.Uniform(), window=8, rehearsal=rehearsal)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=arguments.batches)
    done = 0
    while done < arguments.batches:
        for x, y, _, *rehearsed in stream:
            logits = model(x)
            optimizer.zero_grad()
            F.cross_entropy(logits, y).backward()
            optimizer.step()
            schedule.step()
            if rehearsed:
                stream.feedback(rehearsed[0], logits=logits, labels=y)
            done += 1
            if done == arguments.batches:
                break
    stream.close()
    return model


def told(values: np.ndarray[Any, Any], digits: int = 1) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=2e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # for so small a network more are no faster
    started = time.perf_counter()
    retained = {name: np.zeros((arguments.seeds, len(DOMAINS))) for name in ("before", *METHODS)}
    target = {name: np.zeros(arguments.seeds) for name in ("before", *METHODS)}
    for seed in range(arguments.seeds):
        old, new = tasks(seed)
        prior = pretrained(old, seed)
        for name in retained:
            tuned = prior if name == "before" else finetuned(prior, old, new, METHODS[name], arguments, seed)
            retained[name][seed] = accuracy(tuned, old.test)
            (target[name][seed],) = accuracy(tuned, new.test)

    print(
        f"{arguments.seeds} seeds, {arguments.batches} batches of {BATCH}, ratio {arguments.ratio:g}, lr "
        f"{arguments.lr:g}; accuracy in %, mean ± standard deviation over seeds"
    )
    print(f"{'':<19}{'prior task':>14}{'new task':>14}   prior task by domain: {', '.join(DOMAINS)}")
    for name, found in retained.items():
        domains = "  ".join(f"{mean:5.1f}" for mean in found.mean(0))
        print(f"{name:<19}{told(found.mean(1)):>14}{told(target[name]):>14}   {domains}")
    print("\npaired differences over seeds: mean ± half of a 95 % interval, and how many seeds gain")
    base = "random"
    for name in [name for name in METHODS if name not in ("none", base)]:
        for what, ours, theirs in (
            ("prior", retained[name].mean(1), retained[base].mean(1)),
            ("new", target[name], target[base]),
        ):
            gain = ours - theirs
            half = student(arguments.seeds - 1) * gain.std(ddof=1) / math.sqrt(arguments.seeds)
            print(
                f"{name:<19}less {base}, {what:<6}{gain.mean():+6.2f} ± {half:.2f}   {(gain > 0).sum()} of {len(gain)}"
            )
    print(f"{time.perf_counter() - started:.0f} s")


def student(freedom: int) -> float:
    """The .975 quantile of Student's t."""
    table = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 14: 2.14, 19: 2.09}
    return table[max(key for key in table if key <= freedom)]


if __name__ == "__main__":
    main()
