"""What is handed over to the training loop: a batch, with what goes with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowstream.batch import attach, device_of
from flowstream.scoring.device import copied_to
from flowstream.settings import Settings


@dataclass(frozen=True, eq=False)
class Delivery:
    """What is handed over: a batch and what goes with it."""

    batch: Any
    weight: Tensor | None
    extras: Mapping[str, Tensor]

    def complete(self, settings: Settings) -> Any:
        """The batch as `attach` says, with tensors of its own on the labels' device."""
        device = device_of(self.batch)
        named = {} if self.weight is None else {"flow_weight": self.weight}
        # Copies: what was cut from a window's tensor would share its storage, and its version, with other batches.
        own = {name: copied_to(value, device) for name, value in {**named, **self.extras}.items()}
        if settings.attach == "key":
            return attach(self.batch, own)
        weight = own.pop("flow_weight")
        return (self.batch, weight, own) if own else (self.batch, weight)


def group_denominators(counts: Sequence[int], settings: Settings) -> list[Tensor]:
    """Of each delivery, the labelled tokens (or samples) of the `accumulate` deliveries it shares a step with: 0-d.

    `counts`: those of each delivery. Empty where nobody asked.
    """
    if "denominator" not in settings.include:
        return []
    accumulate = settings.accumulate
    sums = [sum(counts[i : i + accumulate]) for i in range(0, len(counts), accumulate)]
    return [torch.tensor(float(sums[i // accumulate])) for i in range(len(counts))]
