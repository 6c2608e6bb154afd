"""The loss of a model on an evaluation set: the mean over all its labelled tokens, whatever the batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flowstream.finetune.tokens import TokenDataset
from flowstream.losses import weighted_lm_loss


@torch.no_grad()
def token_loss(
    model: nn.Module,
    dataset: TokenDataset,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    *,
    batch_size: int,
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> float:
    """Nats a token, over the samples of all ranks; each rank takes every R-th, sorted by length.

    The model is evaluated in eval mode, and put back into the mode it was in.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    order = dataset.lengths.argsort(stable=True)[rank::world_size].tolist()
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    try:
        for start in range(0, len(order), batch_size):
            batch = {
                name: value.to(device)
                for name, value in collate([dataset[row] for row in order[start : start + batch_size]]).items()
            }
            labels = batch.pop("labels")
            with autocast():
                logits = model(**batch, use_cache=False).logits
            total = weighted_lm_loss(logits, labels, torch.ones(len(labels), device=device), denominator=1.0)
            sums += torch.stack([total.double(), (labels[:, 1:] != -100).sum().double()])
    finally:
        model.train(was_training)
    if world_size > 1:
        dist.all_reduce(sums)
    return float(sums[0] / sums[1])
