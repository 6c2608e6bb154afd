"""A loss as it is stored: its bits, their type, and a checksum that ties them to the key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

_TYPES: dict[bytes, np.dtype[Any]] = {b"f": np.dtype("<f4"), b"e": np.dtype("<f2")}
_KINDS = {dtype: kind for kind, dtype in _TYPES.items()}
_TAIL = 5
"""Bytes after the losses: one for the type, four of checksum. The losses come first, and so are aligned."""

_SAMPLE = np.dtype([("loss", "<f4"), ("kind", "u1"), ("checksum", "<u4")])
"""An entry of one float32: level "sample", where look-ups should cost little more than LMDB's own."""


def encode(key: bytes, value: NDArray[Any]) -> bytes:
    """`value`, a 1-d array of float32 or float16, as bytes. `ValueError` for another type."""
    kind = _KINDS.get(value.dtype)
    if kind is None:
        raise ValueError(f"a loss cache on disk stores float32 or float16, not {value.dtype}")
    body = value.tobytes() + kind
    return body + xxhash.xxh32_intdigest(key + body).to_bytes(4, "little")


def decode(keys: Sequence[bytes], entries: Sequence[bytes | None]) -> tuple[list[NDArray[Any] | None], int]:
    """The values of `entries`, found under `keys`: `None` for `None`, and for damaged ones. And how many these are."""
    decoded: list[NDArray[Any] | None] = [None] * len(entries)
    found = [(at, key, entry) for at, (key, entry) in enumerate(zip(keys, entries, strict=True)) if entry is not None]
    checksum = xxhash.xxh32_intdigest
    wanted = [checksum(key + entry[:-4]) for _, key, entry in found]
    alike = all(len(entry) == _SAMPLE.itemsize for _, _, entry in found)
    values = (_samples if alike else _values)([entry for _, _, entry in found], wanted)
    for (at, _, _), value in zip(found, values, strict=True):
        decoded[at] = value
    return decoded, sum(value is None for value in values)


def _samples(entries: Sequence[bytes], wanted: Sequence[int]) -> list[NDArray[Any] | None]:
    """The values of entries that are all of one float32, as rows of one array."""
    table = np.frombuffer(b"".join(entries), dtype=_SAMPLE)
    losses = np.ascontiguousarray(table["loss"]).reshape(-1, 1)
    losses.setflags(write=False)
    sound = (table["checksum"] == np.array(wanted, dtype=np.uint32)) & (table["kind"] == ord("f"))
    if sound.all():
        return list(losses)
    return [loss if right else None for loss, right in zip(losses, sound.tolist(), strict=True)]


def _values(entries: Sequence[bytes], wanted: Sequence[int]) -> list[NDArray[Any] | None]:
    return [_value(entry, checksum) for entry, checksum in zip(entries, wanted, strict=True)]


def _value(entry: bytes, wanted: int) -> NDArray[Any] | None:
    dtype = _TYPES.get(entry[-_TAIL:-4])
    num_bytes = len(entry) - _TAIL
    if dtype is None or num_bytes % dtype.itemsize or int.from_bytes(entry[-4:], "little") != wanted:
        return None
    return np.frombuffer(entry, dtype=dtype, count=num_bytes // dtype.itemsize)
