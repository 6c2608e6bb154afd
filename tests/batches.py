"""Batches with known losses, for tests of the stream: what the scorer gives is what `loss` says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import flowstream as fs

by_key = fs.FunctionScorer(lambda batch: batch["loss"], name="by key")


def gamma_losses(num: int, seed: int = 0) -> Tensor:
    """[num] losses with a median of about 1.68 nats."""
    generator = torch.Generator().manual_seed(seed)
    return torch._standard_gamma(torch.full((num,), 2.0), generator=generator)


def batches_of(losses: Tensor, batch_size: int = 16) -> list[dict[str, Any]]:
    """Batches with the losses, an id a sample (its position), and its name."""
    ids = torch.arange(len(losses))
    return [
        {"loss": part, "id": at, "name": [f"sample {i}" for i in at.tolist()]}
        for part, at in zip(losses.split(batch_size), ids.split(batch_size), strict=True)
    ]


class Recording:
    """A loader that counts how many batches were asked for."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches
        self.num_pulled = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.num_pulled += 1
            yield batch


def gathered(batches: Sequence[Any], key: str) -> Tensor:
    """What all batches hold under `key`, one after the other."""
    return torch.cat([batch[key] for batch in batches])
