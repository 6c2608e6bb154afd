"""A classification task: images to train on, to choose by, and to report on; and scikit-learn's digits as two tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from flowstream.companions.mixup import mixup

OLD, NEW = range(5), range(5, 10)
"""Digits that the model is pre-trained on, and those that it is fine-tuned on."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Datasets of (image [C, H, W], class)."""

    train: Dataset[Any]
    validation: Dataset[Any]
    """For all that is chosen: epoch and learning rate."""
    test: Dataset[Any]
    """For what is reported, and for nothing else."""
    num_classes: int


class Named(Dataset[dict[str, Any]]):
    """A dataset as mappings, with a name for each image: its losses are cached under it, however it was augmented."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return num_of(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self._dataset[index]
        return {"image": image, "labels": int(label), "__key__": str(index)}


@dataclass(frozen=True)
class Mixed:
    """Collates samples to a batch, and mixes it."""

    alpha: float
    num_classes: int

    def __call__(self, samples: list[Any]) -> Any:
        return mixup(default_collate(samples), alpha=self.alpha, num_classes=self.num_classes)


def training_loader(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
) -> DataLoader[Any]:
    """Shuffled batches of `image`, `labels` and `__key__`, in the same order for the same seed."""
    order = torch.Generator().manual_seed(seed)
    return DataLoader(
        Named(dataset), batch_size, shuffle=True, generator=order, num_workers=num_workers, collate_fn=collate
    )


def num_of(dataset: Dataset[Any]) -> int:
    """How many images."""
    assert isinstance(dataset, Sized)
    return len(dataset)


def split(num: int, share: float, *, seed: int) -> tuple[list[int], list[int]]:
    """Indices of a random part of `num`, and of the `share` that is held out of it."""
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, round(num * share))
    return order[held:], order[:held]


def digits(seed: int) -> tuple[Task, Task]:
    """The old task and the new one: handwritten digits 0 to 4, and 5 to 9 with labels 0 to 4.

    Images [1, 16, 16], normalised; three fifths to train on, a fifth each for validation and test, drawn by `seed`.
    ValueError without scikit-learn.
    """
    images, labels = _all_digits()
    return _digits_of(images, labels, OLD, seed), _digits_of(images, labels, NEW, seed)


@functools.cache
def _all_digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("scikit-learn, whose digits these are, is missing: pip install 'flowstream[vision]'") from None
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = (pixels.float().view(-1, 1, 8, 8) / 16 - 0.305) / 0.376
    return torch.nn.functional.interpolate(images, size=16, mode="bilinear"), labels


def _digits_of(images: Tensor, labels: Tensor, classes: range, seed: int) -> Task:
    own = (labels >= classes.start) & (labels < classes.stop)
    dataset = TensorDataset(images[own], labels[own] - classes.start)
    rest, test = split(len(dataset), 0.2, seed=seed)
    train, validation = split(len(rest), 0.25, seed=seed + 1)
    return Task(
        train=Subset(dataset, [rest[i] for i in train]),
        validation=Subset(dataset, [rest[i] for i in validation]),
        test=Subset(dataset, test),
        num_classes=len(classes),
    )
