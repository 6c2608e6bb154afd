"""The loss cache that a stream was asked for."""

from __future__ import annotations

import os

from flowstream.scoring.cache import LossCache
from flowstream.scoring.disk_cache import DiskCache
from flowstream.scoring.memory_cache import MemoryCache


def open_cache(cache: object) -> LossCache | None:
    """ "memory", a path, or `None`; `ValueError` for anything else."""
    if cache is None:
        return None
    if not isinstance(cache, str | os.PathLike) or not os.fspath(cache):
        raise ValueError(f"cache is {cache!r}: choose 'memory', a path, or None")
    return MemoryCache() if cache == "memory" else DiskCache(cache)
