"""What tests of resuming share: batches over epochs, and states as a checkpoint holds them."""

from __future__ import annotations

import io
from typing import Any

import torch

import flowstream as fs


def take(stream: fs.FlowStream, num: int) -> list[dict[str, torch.Tensor]]:
    """The next `num` batches, over epochs as long as it takes."""
    out: list[dict[str, torch.Tensor]] = []
    while len(out) < num:
        for batch in stream:
            out.append(batch)
            if len(out) == num:
                break
    return out


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """Saved and loaded as a checkpoint is, without pickled code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
