"""A sampled checksum of a model's tensors: cheap enough for every window, and it names what changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from flowstream.scoring.device import Lane

_NUM_SAMPLED = 4096
"""Elements that a checksum reads, over all parameters together …"""
_MIN_SAMPLED = 8
"""… and at least from each, so that a single trained layer is noticed."""

Group = tuple[torch.dtype, torch.device]
Places = dict[tuple[str, int], Tensor]
"""(Name, number of elements) → which elements are read: kept from one checksum to the next."""


@dataclass(frozen=True, slots=True)
class Checksum:
    """A few elements of each tensor; those of one dtype and device together, so that comparing costs one launch."""

    names: list[tuple[str, Group, torch.Size, int]]
    """Of each tensor in order: name, group, shape, and how many elements of the group's are its."""
    values: dict[Group, Tensor]

    @classmethod
    def of(cls, modules: Iterable[tuple[str, nn.Module]], places: Places) -> Checksum:
        """Of every parameter and persistent buffer of the named modules."""
        with torch.inference_mode(False), torch.no_grad():
            tensors = [(name, _bits(tensor)) for name, tensor in _named_tensors(modules)]
            total = sum(tensor.numel() for _, tensor in tensors)
            taken: dict[Group, list[Tensor]] = {}
            names: list[tuple[str, Group, torch.Size, int]] = []
            for number, (name, tensor) in enumerate(tensors):
                group, numel = (tensor.dtype, tensor.device), tensor.numel()
                index = places.get((name, numel))
                if index is None or index.device != tensor.device:
                    index = places[name, numel] = _sampled_index(number, numel, total).to(tensor.device)
                taken.setdefault(group, []).append(torch.take(tensor, index))
                names.append((name, group, tensor.shape, len(index)))
            return cls(names, {group: torch.cat(values) for group, values in taken.items()})

    def on_cpu(self) -> Checksum:
        return replace(self, values={group: values.cpu() for group, values in self.values.items()})

    def fetched(self, lane: Lane) -> Callable[[], Checksum]:
        """Begin to copy it to the host, on a lane; the result waits for it."""
        pending = {group: lane.fetch(values) for group, values in self.values.items()}
        return lambda: replace(self, values={group: values.wait() for group, values in pending.items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Checksum) or self.names != other.names:
            return False
        # As bits: NaN is as good a weight as any, and 0.0 is not -0.0.
        return all(torch.equal(_as_bytes(self.values[g]), _as_bytes(other.values[g])) for g in self.values)

    def by_name(self) -> dict[str, tuple[str, bytes]]:
        """Name → (dtype and shape, the elements as bytes)."""
        rest = {group: values.cpu() for group, values in self.values.items()}
        found = {}
        for name, group, shape, count in self.names:
            found[name] = (f"{group[0]} {tuple(shape)}", _as_bytes(rest[group][:count]).numpy().tobytes())
            rest[group] = rest[group][count:]
        return found


def _named_tensors(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor]]:
    """Parameters (tied ones once) and persistent buffers, this rank's part of those that are sharded."""
    seen: set[int] = set()
    for prefix, module in modules:
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            # Buffers that are not saved are derived, and may move: rotary frequencies follow the longest sequence seen.
            if tensor is None or id(tensor) in seen or name in module._non_persistent_buffers_set:
                continue
            seen.add(id(tensor))
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            yield f"{prefix}.{name}" if prefix else name, local


def _sampled_index(number: int, numel: int, total: int) -> Tensor:
    """Which elements of tensor `number` a checksum reads: a pure function, spread over the tensor."""
    if numel == 0:
        return torch.from_numpy(np.zeros(0, dtype=np.int64))
    count = min(numel, max(_MIN_SAMPLED, _NUM_SAMPLED * numel // max(total, 1)))
    generator = np.random.Generator(np.random.Philox(key=number))
    edges = np.linspace(0, numel, count, endpoint=False)
    return torch.from_numpy((edges + generator.random(count) * (numel / count)).astype(np.int64).clip(0, numel - 1))


def _bits(tensor: Tensor) -> Tensor:
    """Eight-bit floats cannot be indexed on every device; their bits can."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _as_bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)
