"""How well a classifier does on a dataset."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from flowstream.scoring.head import logits_of


class Measures(NamedTuple):
    """Means over a dataset."""

    accuracy: float
    """Share of images whose class has the highest logit."""
    loss: float
    """Cross-entropy, nats."""


@torch.no_grad()
def measure(model: nn.Module, dataset: Dataset[Any], *, batch_size: int = 128, num_workers: int = 0) -> Measures:
    """Of a model in eval mode (which it is left in)."""
    device = device_of(model)
    model.eval()
    num = 0
    correct, total = torch.zeros((), device=device), torch.zeros((), device=device)
    for images, labels in DataLoader(dataset, batch_size, num_workers=num_workers):
        logits, target = logits_of(model(images.to(device))).float(), labels.to(device)
        correct += (logits.argmax(1) == target).sum()
        total += F.cross_entropy(logits, target, reduction="sum")
        num += len(labels)
    return Measures(float(correct) / num, float(total) / num)


def device_of(model: nn.Module) -> torch.device:
    """Where the model is."""
    parameter: Tensor = next(model.parameters())
    return parameter.device
