"""Which errors say that memory ran out: they pass, and tell nothing of what a model can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SAID = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "HIP error: out of memory",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What plain `RuntimeError`s say, of allocators other than that of CUDA, and of libraries that have their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less at a time, or the same later, may fit."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


@contextmanager
def enough_to_try() -> Iterator[None]:
    """`RuntimeError` that says so where memory runs out on the few tokens of a trial."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RuntimeError(
            "there is not enough memory to try the reference on a few tokens, and untried it would be scored in a "
            "slower way for good: make the scorer before what takes the memory, free some, or pass `device`"
        ) from error
