"""Losses from logits, in fp32, of the labelled rows only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 1024
"""Rows of logits in fp32 at a time: with a vocabulary of 128 k, half a gigabyte."""


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: `.logits`, a mapping's "logits", the first of a tuple, or the tensor itself."""
    if isinstance(output, Mapping):
        output = output.get("logits", output)
    found = getattr(output, "logits", output)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the reference gave a {type(output).__name__} without logits: it must return a tensor or `.logits`; for "
            "anything else write FunctionScorer(fn), fn(batch) -> [B] losses"
        )
    return found


def token_losses(logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """[n] fp32 losses in nats of predicting `targets` [n] from the rows `rows` [n] of `logits` [..., V].

    The model's logits are taken as they come, so softcaps and scales are in them; the softmax is in fp32.
    """
    flat = logits.flatten(0, -2)
    losses = [
        F.cross_entropy(flat.index_select(0, row).float(), target, reduction="none")
        for row, target in zip(rows.split(_CHUNK), targets.split(_CHUNK), strict=True)
    ]
    return torch.cat(losses)
