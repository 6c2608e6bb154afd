"""The hidden states that a model gives its head, taken on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def head_inputs(head: nn.Module) -> Iterator[list[Tensor]]:
    """Within it: what `head` is given, [B, T, D] each time, is kept in the list, and it computes one column of it only.

    Whatever the model does to its hidden states before the head (T5 scales them) is in them.
    """
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept.append(args[0])
        return (args[0][:, :1], *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()
