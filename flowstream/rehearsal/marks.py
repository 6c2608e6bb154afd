"""`flow_rehearsed`, as it comes back with feedback."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowstream.batch import fields


def marks_of(batch: Any) -> Tensor:
    """`flow_rehearsed` of a batch, or what it is itself."""
    if isinstance(batch, Tensor):
        if batch.dtype != torch.int64:
            raise ValueError(
                f"feedback was given a tensor of {batch.dtype}: give the batch, or the flow_rehearsed that was popped "
                "from it, int64"
            )
        return batch.detach().cpu()
    found = fields(batch).get("flow_rehearsed") if batch is not None else None
    if not isinstance(found, Tensor):
        raise ValueError(
            "feedback was given a batch without flow_rehearsed, which tells what was rehearsed: pass what you popped, "
            "stream.feedback(rehearsed, …)"
        )
    return found.detach().cpu()


def samples_in(marked: Tensor) -> list[int]:
    """The prior samples of a batch, in order; of packed rows each document's once."""
    flat = marked[marked >= 0]
    return (flat if marked.ndim == 1 else flat.unique_consecutive()).tolist()


def labels_of(batch: Any) -> Any:
    return None if isinstance(batch, Tensor) else fields(batch).get("labels")
