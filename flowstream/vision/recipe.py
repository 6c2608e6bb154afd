"""The paper's recipe in three stages: probe, fine-tune body and head by weights from the frozen probe, head alone.

Sanyal et al., arXiv 2502.02797, and its official code, but for three things: nothing of the body moves while a head is
trained, the best epoch is chosen on a validation split and not on the test split, and τ is that of the stream.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from flowstream.companions.linear_probe import linear_probe, with_original_head
from flowstream.scoring.classifier import ClassifierScorer
from flowstream.scoring.head import logits_of
from flowstream.stream import FlowStream
from flowstream.temperature import RunningMedian, Temperature
from flowstream.vision.evaluation import Measures, device_of, measure
from flowstream.vision.methods import Method
from flowstream.vision.task import Mixed, Task, num_of, training_loader


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all stages of a run have in common, and how long each is."""

    probe_epochs: int
    epochs: int
    """Of the second stage; its learning rate falls along a half cosine, once an epoch."""
    head_epochs: int
    probe_lr: float
    head_lr: float
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    temperature: Temperature = field(default_factory=RunningMedian)
    normalize: bool = False
    """As in `FlowStream`."""
    score_once: bool = True
    """An image has one weight, of its first augmentation, as in the paper's Algorithm 1; else each augmentation has its
    own, as in its code."""
    mixup: float = 0.0
    """α of mixup; 0 for none. Each mixture then has its own weight."""
    seed: int = 0
    num_workers: int = 0

    def loader(self, task: Task, stage: int) -> DataLoader[Any]:
        """The training images, in an order of the stage's own."""
        return training_loader(
            task.train,
            batch_size=self.batch_size,
            seed=3 * self.seed + stage,
            num_workers=self.num_workers,
            collate=Mixed(self.mixup, task.num_classes) if self.mixup else None,
        )

    def probe(self, model: nn.Module, task: Task) -> nn.Module:
        """Stage 1: a copy of the model with a new head, trained on the frozen body."""
        torch.manual_seed(self.seed)
        loader = self.loader(task, 0)
        return linear_probe(
            model, task.num_classes, loader, steps=self.probe_epochs * len(loader), optimizer=self._sgd(self.probe_lr)
        )

    def train_head(self, tuned: nn.Module, task: Task) -> nn.Module:
        """Stage 3: a copy whose head was trained on, with plain cross-entropy."""
        loader = self.loader(task, 2)
        return linear_probe(
            tuned, None, loader, steps=self.head_epochs * len(loader), optimizer=self._sgd(self.head_lr)
        )

    def _sgd(self, learning_rate: float) -> Any:
        return lambda parameters: torch.optim.SGD(
            parameters, lr=learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """What the second stage gave."""

    model: nn.Module
    best_epoch: int
    """By accuracy on the validation split, or else by its loss; without one, the last."""
    figures: dict[str, float]
    """The stream's metrics at the end."""


def fine_tune(
    probe: nn.Module,
    task: Task,
    method: Method,
    recipe: Recipe,
    *,
    learning_rate: float,
    choose_epoch: bool = True,
) -> FineTuned:
    """Stage 2: body and head from the probe, with weights from the probe itself, frozen.

    As many steps for every method: where resampling makes an epoch shorter, there are more of them.
    """
    loader = recipe.loader(task, 1)
    device = device_of(probe)
    model = method.begun(copy.deepcopy(probe), seed=recipe.seed)
    penalty = method.penalty(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = method.optimizer(recipe._sgd(learning_rate)(trained))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=recipe.epochs)
    torch.manual_seed(recipe.seed)  # of dropout
    best: tuple[float, float, int] | None = None
    kept: dict[str, Any] = {}
    steps_an_epoch, step = len(loader), 0
    stream = FlowStream(
        loader,
        ClassifierScorer(probe),
        mode=method.mode,
        policy=method.policy,
        temperature=recipe.temperature,
        normalize=recipe.normalize,
        cache_key="__key__" if recipe.score_once and not recipe.mixup else None,
        seed=recipe.seed,
    )
    with stream:
        while step < recipe.epochs * steps_an_epoch:
            before = step
            for batch in stream:
                if method.mode == "resample" and 2 * len(batch["labels"]) < recipe.batch_size:
                    continue  # what an epoch has left over: BatchNorm's statistics of a few images ruin the body
                model.train()
                images, labels = batch["image"].to(device), batch["labels"].to(device)
                weight = batch.get("flow_weight", torch.ones(len(labels)))
                loss = method.loss(logits_of(model(images)), labels, weight)
                (loss if penalty is None else loss + penalty()).backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                if step % steps_an_epoch:
                    continue
                schedule.step()
                epoch = step // steps_an_epoch
                if choose_epoch:
                    found = measure(model, task.validation, num_workers=recipe.num_workers)
                    rank = (found.accuracy, -found.loss, epoch)
                    if math.isfinite(found.loss) and (best is None or rank[:2] > best[:2]):
                        best, kept = rank, copy.deepcopy(model.state_dict())
                if epoch == recipe.epochs:
                    break
            if step == before:
                raise ValueError("resampling kept less than half a batch of the training images: lower the batch size")
        figures = stream.metrics()
    if kept:
        model.load_state_dict(kept)
    best_epoch = recipe.epochs if best is None else best[2]
    return FineTuned(model=method.ended(probe, model), best_epoch=best_epoch, figures=figures)


def retention(tuned: nn.Module, original: nn.Module, dataset: Dataset[Any], *, num_workers: int = 0) -> Measures:
    """On the original task, with the original head and BatchNorm put back."""
    return measure(with_original_head(tuned, original), dataset, num_workers=num_workers)


def probe_losses(probe: nn.Module, task: Task, recipe: Recipe) -> torch.Tensor:
    """[N] losses of the training images under the frozen probe, in one pass: their median is the paper's τ."""
    scorer = ClassifierScorer(probe)
    plain = DataLoader(recipe.loader(task, 1).dataset, recipe.batch_size, num_workers=recipe.num_workers)
    losses = [scores.loss for batch in plain for scores in scorer.begin([batch], level="sample").finish()]
    assert sum(map(len, losses)) == num_of(task.train)
    return torch.cat(losses)
