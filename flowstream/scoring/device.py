"""Where a reference computes: in line on a CPU, on a stream of its own beside training on a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowstream.batch import fields, with_fields


class Lane:
    """Owns the stream that a reference computes on, enqueued to from the main thread.

    What is made within `entered()` lives in the stream's own memory pool, and is used there only: nothing has to be
    recorded on other streams. Weights and batches come from the stream that was current: `follow()` waits for them, on
    the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("meta")
        self._stream: torch.cuda.Stream | None = None
        self.move(device)

    def move(self, device: torch.device) -> None:
        """Go where the reference is now: a trainer may move a model that is shared."""
        if device == self.device:
            return
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.follow()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What is enqueued within runs on the lane."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def follow(self) -> None:
        """What the lane is given from now on comes after what the current stream was given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def send(self, *arrays: NDArray[np.int64]) -> list[Tensor]:
        """Arrays as int64 tensors on the device: one copy for all of them, that nobody waits for."""
        sizes = [array.size for array in arrays]
        if self._stream is None:
            return [torch.from_numpy(array).to(self.device) for array in arrays]
        # Pinned: a copy from pageable memory waits.
        host = torch.empty(sum(sizes), dtype=torch.int64, device="cpu", pin_memory=True)
        np.concatenate([array.reshape(-1) for array in arrays], out=host.numpy())
        parts = host.to(self.device, non_blocking=True).split(sizes)
        return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def fetch(self, values: Tensor) -> Fetched:
        """Begin to copy a result to the host. Called within `entered()`."""
        if self._stream is None or values.device != self.device:  # of a model on several devices
            return Fetched(values.cpu(), None)
        host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        host.copy_(values, non_blocking=True)
        done = torch.cuda.Event()
        done.record(self._stream)
        return Fetched(host, done)


class Fetched:
    """A result on its way to the host."""

    def __init__(self, host: Tensor, done: torch.cuda.Event | None) -> None:
        self._host = host
        self._done = done

    def wait(self) -> Tensor:
        """The result, on the CPU. Waits for the lane alone, not for training."""
        if self._done is not None:
            self._done.synchronize()
        return self._host


def on_host(batches: Sequence[Any]) -> Sequence[Any]:
    """Batches whose fields are on the host: those of a loader that delivers on a CUDA device are copied.

    One synchronisation, however many tensors there are. Batches without CUDA tensors are the same objects.
    """
    pending: dict[int, Tensor] = {}
    for tensor in _cuda_tensors(batches):
        if id(tensor) not in pending:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            pending[id(tensor)] = host.copy_(tensor.detach(), non_blocking=True)
    if not pending:
        return batches
    for device in {tensor.device for tensor in _cuda_tensors(batches)}:
        torch.cuda.current_stream(device).synchronize()
    return [_replaced(batch, pending) for batch in batches]


def copied_to(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor on `device`, that nobody waits for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # a copy from pageable memory waits
        return tensor.to(device, non_blocking=True)
    return tensor.to(device, copy=True)


def _cuda_tensors(batches: Sequence[Any]) -> Iterator[Tensor]:
    for batch in batches:
        for value in fields(batch).values():
            if isinstance(value, Mapping):
                yield from _cuda_tensors([value])
            elif isinstance(value, Tensor) and value.is_cuda:
                yield value


def _replaced(batch: Any, hosts: Mapping[int, Tensor]) -> Any:
    found = fields(batch)
    copied = {
        key: _replaced(value, hosts) if isinstance(value, Mapping) else hosts.get(id(value), value)
        for key, value in found.items()
    }
    return with_fields(batch, copied)
