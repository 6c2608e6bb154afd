"""Losses that were taken before, kept under 16-byte keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

_ENTRY_OVERHEAD = 288
"""What an entry costs beside its values: the key, the array object, its place in the dict (measured, rounded up)."""


class LossCache:
    """Owns the losses of samples seen before, in memory, within `max_bytes`; the oldest entries go first.

    A value is an array: what a scorer needs to give a sample's scores again, to the bit. Which samples may share an
    entry is decided by the keys (`content_key`, `row_key`).
    """

    def __init__(self, max_bytes: int = 2**28) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, not {max_bytes}")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_lookups = 0
        self.num_hits = 0
        self.num_evicted = 0
        self._values: dict[bytes, NDArray[Any]] = {}

    def __len__(self) -> int:
        return len(self._values)

    def get(self, keys: Sequence[bytes]) -> list[NDArray[Any] | None]:
        """The values under `keys`, in order; `None` where there is none. They are read-only."""
        values = [self._values.get(key) for key in keys]
        self.num_lookups += len(values)
        self.num_hits += sum(value is not None for value in values)
        return values

    def put(self, keys: Sequence[bytes], values: Sequence[NDArray[Any]]) -> None:
        """Store `values` under `keys`; an entry that is there already is replaced."""
        for key, value in zip(keys, values, strict=True):
            if (old := self._values.pop(key, None)) is not None:
                self.num_bytes -= old.nbytes + _ENTRY_OVERHEAD
            size = value.nbytes + _ENTRY_OVERHEAD
            if size > self.max_bytes:
                continue
            kept = value.copy()  # a view would keep the whole micro-batch alive
            kept.setflags(write=False)
            self._values[key] = kept
            self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            oldest = self._values.pop(next(iter(self._values)))
            self.num_bytes -= oldest.nbytes + _ENTRY_OVERHEAD
            self.num_evicted += 1


def content_key(namespace: bytes, *parts: bytes | NDArray[Any]) -> bytes:
    """The key of a sample by its content: xxh3_128 of the parts, in a namespace of the reference and level."""
    digest = xxhash.xxh3_128(namespace)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return digest.digest()


def row_key(namespace: bytes, key: object, index: int = 0, count: int = 1) -> bytes:
    """The key of a row's sample `index`, of `count` losses, by the row's own name: a string, a number, a 0-d tensor."""
    name = key.item() if hasattr(key, "item") else key
    return xxhash.xxh3_128(namespace + f"row {index} {count} {name!r}".encode()).digest()
