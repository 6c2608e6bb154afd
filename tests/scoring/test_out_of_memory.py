"""Which errors say that memory ran out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowstream.scoring.out_of_memory import enough_to_try, is_out_of_memory

SAID = [
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory (MPS allocated: 9.00 GB, other allocations: 1.00 GB, max allowed: 9.07 GB)",
]


@pytest.mark.parametrize("said", SAID)
def test_memory_that_ran_out_is_known_by_what_allocators_say(said: str) -> None:
    assert is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(ValueError(said))


def test_memory_that_runs_out_on_this_machine_is_known() -> None:
    for run in (lambda: torch.empty(10**15), lambda: np.empty(10**17)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            run()
        assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("full"))


@pytest.mark.parametrize("said", ["CUDA error: an illegal memory access was encountered", "CUDNN_STATUS_NOT_SUPPORTED"])
def test_other_errors_are_none_of_memory(said: str) -> None:
    error = RuntimeError(said)
    assert not is_out_of_memory(error)
    with pytest.raises(RuntimeError) as caught, enough_to_try():
        raise error
    assert caught.value is error
