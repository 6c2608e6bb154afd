"""Losses kept in memory, up to a bound."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from flowstream.scoring.cache import Namespace

_ENTRY_OVERHEAD = 288
"""What an entry costs beside its values: the key, the array object, its place in the dict (measured, rounded up)."""

_logger = logging.getLogger("flowstream")


class MemoryCache:
    """Owns losses in memory, at most `max_bytes` of them. A `LossCache`.

    Once full it keeps what it has and takes nothing more: epochs go through the samples in turn, and a cache that lets
    the oldest go would have let go of each sample just before it comes round again.
    """

    def __init__(self, max_bytes: int = 2**28) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, not {max_bytes}")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_lookups = 0
        self.num_hits = 0
        self._values: dict[bytes, NDArray[Any]] = {}
        self._told = False

    def __len__(self) -> int:
        return len(self._values)

    def register(self, namespace: Namespace) -> None:
        """Nothing: the keys tell namespaces apart."""

    def get(self, keys: Sequence[bytes]) -> list[NDArray[Any] | None]:
        values = [self._values.get(key) for key in keys]
        self.num_lookups += len(values)
        self.num_hits += sum(value is not None for value in values)
        return values

    def put(self, keys: Sequence[bytes], values: Sequence[NDArray[Any]]) -> None:
        for key, value in zip(keys, values, strict=True):
            old = self._values.get(key)
            size = value.nbytes + _ENTRY_OVERHEAD - (0 if old is None else old.nbytes + _ENTRY_OVERHEAD)
            if self.num_bytes + size > self.max_bytes:
                self._tell_full()
                continue
            kept = value.copy()  # a view would keep the whole micro-batch alive
            kept.setflags(write=False)
            self._values[key] = kept
            self.num_bytes += size

    def close(self) -> None:
        self._values.clear()
        self.num_bytes = 0

    def _tell_full(self) -> None:
        if not self._told:
            self._told = True
            _logger.warning(
                "the loss cache in memory is full: it keeps the %d samples that it has (%.0f MB), and others are "
                "scored again each epoch. To keep all losses, give the stream a path: cache='losses' (told once)",
                len(self),
                self.num_bytes / 2**20,
            )
