"""What tests of rehearsal share: prior data of known losses, and a tuned model of known rates of damage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from batches import batches_of, by_key, gamma_losses
from torch import Tensor

import flowstream as fs
from flowstream.rehearsal import Rehearsal


class Known:
    """Prior samples with the fields of `batches_of`: sample i has the i-th loss. Counts how often each is read."""

    def __init__(self, losses: Tensor) -> None:
        self.losses = losses
        self.num_reads = 0

    def __len__(self) -> int:
        return len(self.losses)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.num_reads += 1
        return {"loss": self.losses[index], "id": 1000 + index, "name": f"prior {index}"}


def evenly(num: int) -> Known:
    """Losses 0, 1, 2 …: quantiles cut them into bins of equal size."""
    return Known(torch.arange(num, dtype=torch.float32))


def always(_: object) -> bool:
    return True


def rehearsal_of(prior: Known, **settings: Any) -> Rehearsal:
    usual: dict[str, Any] = {"bins": 4, "was_correct": always, "ratio": 0.5, "half_life": None}
    return Rehearsal(prior, by_key, **(usual | settings))


def stream_of(rehearsal: Rehearsal | None, num: int = 16 * 40, batch_size: int = 16, **settings: Any) -> fs.FlowStream:
    """A stream of `num` samples, in windows of 4 batches."""
    usual: dict[str, Any] = {"window": 4, "cache": None, "temperature": fs.RunningMedian(warmup_samples=64)}
    loader = batches_of(gamma_losses(num), batch_size)
    return fs.FlowStream(loader, by_key, rehearsal=rehearsal, **(usual | settings))


def is_rehearsed(batch: Any) -> bool:
    return bool((batch["flow_rehearsed"] >= 0).any())


def damaged_at(rates: Sequence[float] | Callable[[], Sequence[float]], seed: int = 0) -> Callable[..., Tensor]:
    """A tuned model that gets samples of bin k wrong with the k-th probability."""
    draw = np.random.default_rng(seed)

    def right(stream: fs.FlowStream, batch: Any) -> Tensor:
        assert stream.rehearsal is not None
        of_bin = np.asarray(rates() if callable(rates) else rates)
        bins = stream.rehearsal.prior.bins.of[batch["flow_rehearsed"].numpy()]
        return torch.from_numpy(draw.random(len(bins)) >= of_bin[bins])

    return right
