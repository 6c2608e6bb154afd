"""What a loss cache is, and its keys: 24 bytes, a namespace and a hash of the content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

PREFIX_SIZE = 8
"""Bytes of a key that are its namespace's."""


@dataclass(frozen=True)
class Namespace:
    """What losses depend on beside the sample itself. Entries of one namespace are never seen from another."""

    fingerprint: str
    """Of the reference, the scorer and its version."""

    level: str
    """"sample" (a value is one float32) or "token" (a float16 for each labelled token)."""

    label: str = ""
    """What it is, in words for people."""

    @cached_property
    def prefix(self) -> bytes:
        """The first 8 bytes of its keys."""
        return xxhash.xxh3_64(f"{self.fingerprint} {self.level}".encode()).digest()


class LossCache(Protocol):
    """Losses of samples seen before. A value is what a scorer needs to give a sample's scores again, to the bit.

    A window is looked up with one `get`, and what was missing stored with one `put`. A cache only ever spares work: it
    may forget, it never gives another loss than the one put, and what befalls it while training runs is told, not
    raised.
    """

    num_lookups: int
    num_hits: int

    def register(self, namespace: Namespace) -> None:
        """Told before keys of `namespace` are used; any number of times."""

    def get(self, keys: Sequence[bytes]) -> list[NDArray[Any] | None]:
        """The values under `keys`, in order; `None` where there is none. They are read-only."""

    def put(self, keys: Sequence[bytes], values: Sequence[NDArray[Any]]) -> None:
        """Store `values`, 1-d arrays, under `keys`."""

    def close(self) -> None:
        """Let go of files. Nothing is found or stored afterwards."""


def content_key(namespace: Namespace, *parts: bytes | NDArray[Any]) -> bytes:
    """The key of a sample by its content: the namespace's prefix, and xxh3_128 of the parts."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return namespace.prefix + digest.digest()


def row_key(
    namespace: Namespace, key: object, index: int = 0, count: int = 1, *, labels: NDArray[Any] | None = None
) -> bytes:
    """The key of a row's sample `index`, of `count` losses, by the row's own name: a string, a number, a 0-d tensor.

    `labels`: what is to be predicted, where it is no matter of augmentation: a sample that was labelled anew, or one of
    another shard that happens to have the same name, has another key.
    """
    name = key.item() if hasattr(key, "item") else key
    digest = xxhash.xxh3_128(f"row {index} {count} {name!r}".encode())
    if labels is not None:
        digest.update(np.ascontiguousarray(labels).data)
    return namespace.prefix + digest.digest()
