from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from spawned import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import flowstream as fs
from flowstream.distributed.world import World
from flowstream.padding_batches import from_portable, ignored, portable

NUM_BATCHES = (3, 1, 0)
"""Of each rank: the second runs dry, the last never has one."""

STEPS = tuple(itertools.product(("lm", "linear"), range(max(NUM_BATCHES))))


class Language(nn.Module):
    """A causal model, small enough that a rank starts at once."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(97, 16)
        self.body = nn.GRU(16, 16, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 97)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Hidden states [B, T, 16]."""
        hidden, _ = self.body(self.embedding(input_ids))
        normed: Tensor = self.norm(hidden)
        return normed


def language() -> Language:
    torch.manual_seed(0)
    return Language()


def batch_of(rank: int, step: int) -> tuple[dict[str, Any], Tensor]:
    """A batch and its weights: rows of different lengths and few labels on one side, many on the other."""
    generator = torch.Generator().manual_seed(10 * rank + step)
    ids = torch.randint(3, 97, (3, 11), generator=generator)
    labels = ids.clone()
    labels[:, : 2 + 3 * rank] = -100
    labels[0, -3 - step :] = -100
    return {"input_ids": ids, "labels": labels}, torch.rand(3, generator=generator)


def delivered_to(rank: int, step: int) -> tuple[dict[str, Any], Tensor]:
    if step < NUM_BATCHES[rank]:
        return batch_of(rank, step)
    last = NUM_BATCHES[rank] - 1
    batch = batch_of(rank, last)[0] if last >= 0 else from_portable(portable(batch_of(0, 0)[0]))
    return ignored(batch), torch.zeros(3)


def loss_of(
    kind: str, hidden: Tensor, head: nn.Linear, batch: dict[str, Any], weight: Tensor, denominator: Tensor
) -> Tensor:
    if kind == "lm":
        return fs.weighted_lm_loss(head(hidden), batch["labels"], weight, denominator=denominator)
    return fs.weighted_linear_cross_entropy(hidden, head, batch["labels"], weight, denominator=denominator)


def num_labelled(batch: dict[str, Any]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def num_in_step(step: int) -> int:
    return sum(num_labelled(delivered_to(rank, step)[0]) for rank in range(len(NUM_BATCHES)))


def gradients_of(model: nn.Module) -> Tensor:
    found = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    assert len(found) == len(list(model.parameters()))
    return torch.cat(found)


def train() -> list[np.ndarray[Any, Any]]:
    """The gradients of each step with each loss, as every rank has them after DDP's mean."""
    world = World.of()
    model = language()
    wrapped = DistributedDataParallel(model)
    found = []
    for kind, step in STEPS:
        model.zero_grad()
        batch, weight = delivered_to(world.rank, step)
        denominator = torch.tensor(num_in_step(step) / world.world_size)
        loss_of(kind, wrapped(batch["input_ids"]), model.head, batch, weight, denominator).backward()
        found.append(gradients_of(model).numpy())  # a tensor would be shared with a process that has ended
    return found


def test_the_mean_over_ranks_is_the_gradient_of_one_process_over_the_union():
    outcomes = run_ranks(train, len(NUM_BATCHES))
    assert [outcome.error for outcome in outcomes] == [None] * len(NUM_BATCHES)
    model = language()
    for (kind, step), *found in zip(STEPS, *(outcome.result for outcome in outcomes), strict=True):
        model.zero_grad()
        of_step = [batch_of(rank, step) for rank, num in enumerate(NUM_BATCHES) if step < num]
        union = {name: torch.cat([batch[name] for batch, _ in of_step]) for name in of_step[0][0]}
        weight = torch.cat([weight for _, weight in of_step])
        denominator = torch.tensor(float(num_labelled(union)))
        loss_of(kind, model(union["input_ids"]), model.head, union, weight, denominator).backward()
        expected = gradients_of(model).numpy()
        for gradient in found:
            assert np.abs(gradient - expected).max() <= 1e-6 * np.abs(expected).max()
