"""Loaders and models that fail where a test wants them to."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class Raising:
    """A loader that raises before the batches `at`, in every pass, and goes on when it is asked again."""

    def __init__(self, batches: Sequence[Any], at: Collection[int], error: type[BaseException] = OSError) -> None:
        self.batches, self.at, self.error = batches, at, error

    def __iter__(self) -> Iterator[Any]:
        return _Pass(self)


class _Pass:
    def __init__(self, loader: Raising) -> None:
        self.loader, self.number, self.left = loader, 0, set(loader.at)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.number in self.left:
            self.left.remove(self.number)
            raise self.loader.error(f"torn before batch {self.number}")
        if self.number == len(self.loader.batches):
            raise StopIteration
        self.number += 1
        return self.loader.batches[self.number - 1]


class RaisingAt:
    """A scoring function that raises at a batch's first id, as often as it is asked."""

    def __init__(self, first_id: int, error: type[BaseException] = RuntimeError) -> None:
        self.first_id, self.error = first_id, error

    def __call__(self, batch: Any) -> Tensor:
        if int(batch["id"][0]) == self.first_id:
            raise self.error("the function failed")
        loss: Tensor = batch["loss"]
        return loss


class Bounded(nn.Module):
    """A language model with room for `limit` tokens at a time."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(97, 16)
            self.head = nn.Linear(16, 97)
        self.requires_grad_(False)
        self.limit = limit

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        if input_ids.numel() > self.limit:
            raise torch.OutOfMemoryError(f"tried to allocate {input_ids.numel()}")
        return SimpleNamespace(logits=self.head(self.embed(input_ids).cumsum(1)))
