"""What is handed over to the training loop: a batch, with what goes with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowstream.batch import attach, device_of, num_rows
from flowstream.distributed.message import Agreed
from flowstream.scoring.device import copied_to
from flowstream.settings import Settings


@dataclass(frozen=True, eq=False)
class Delivery:
    """What is handed over: a batch and what goes with it."""

    batch: Any
    weight: Tensor | None
    extras: Mapping[str, Tensor]
    rehearsed: Tensor | None = None
    """The prior sample that each row is, of a rehearsed batch."""

    def complete(self, settings: Settings) -> Any:
        """The batch as `attach` says, with tensors of its own on the labels' device."""
        device = device_of(self.batch)
        named = {} if self.weight is None else {"flow_weight": self.weight}
        # Copies: what was cut from a window's tensor would share its storage, and its version, with other batches.
        own = {name: copied_to(value, device) for name, value in {**named, **self.extras}.items()}
        if settings.rehearsal is not None:
            marks = torch.full((num_rows(self.batch),), -1) if self.rehearsed is None else self.rehearsed
            own["flow_rehearsed"] = copied_to(marks, device)
        if settings.attach == "key":
            return attach(self.batch, own)
        weight = own.pop("flow_weight")
        return (self.batch, weight, own) if own else (self.batch, weight)


def in_order(extras: Mapping[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """The extras in the order of `include`, which is that of a tuple's elements."""
    return {f"flow_{name}": extras[f"flow_{name}"] for name in settings.include if f"flow_{name}" in extras}


def step_counts(counts: Sequence[int], settings: Settings) -> tuple[int, ...]:
    """Labelled tokens (or samples) of each optimizer step, from those of its `accumulate` deliveries.

    Empty where nobody asked.
    """
    if "denominator" not in settings.include:
        return ()
    accumulate = settings.accumulate
    return tuple(sum(counts[i : i + accumulate]) for i in range(0, len(counts), accumulate))


def denominator_of(position: int, agreed: Agreed, settings: Settings) -> Tensor:
    """Labelled tokens (or samples) of the step that a delivery belongs to, over all ranks, a rank's share of it: 0-d.

    `position`: among the window's own batches.

    Divided by the number of ranks, so that a mean of the ranks' gradients is the gradient of one large batch.
    """
    step = agreed.steps[position] if agreed.steps else position // settings.accumulate
    return torch.tensor(agreed.counts[step] / agreed.world_size)
