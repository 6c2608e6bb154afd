"""Reads a batch of any shape, and rebuilds it with something added.

A batch is a tree: mappings, dataclasses, namedtuples, tuples and lists hold *fields*; its leaves are tensors and arrays
(rows along the first dimension), lists with an entry a row, and values that belong to the batch as a whole.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

Key = str | int

_ROW_FIELDS = ("labels", "input_ids", "attention_mask")
"""Where a batch has them, these tell its number of rows: `pixel_values` may be patches, not rows."""


def is_array(value: object) -> TypeGuard[Tensor | np.ndarray[Any, Any]]:
    """Whether `value` is a tensor or an array with rows."""
    return isinstance(value, Tensor | np.ndarray) and value.ndim > 0


def fields(batch: Any) -> dict[Any, Any]:
    """The fields of a batch: a mapping's items, a dataclass' or namedtuple's by name, a sequence's by position.

    A bare tensor is its own field 0. `ValueError` for what is no batch.
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return dict(zip(batch._fields, batch, strict=True))
    if isinstance(batch, tuple | list):
        return dict(enumerate(batch))
    if is_array(batch):
        return {0: batch}
    raise ValueError(
        f"a {type(batch).__name__} is no batch: the loader must deliver a mapping, tuple, list, namedtuple, dataclass "
        "or tensor"
    )


def with_fields(batch: Any, values: Mapping[Any, Any]) -> Any:
    """`batch` anew, of the same type, with exactly `values` as its fields (see `fields`)."""
    if isinstance(batch, UserDict):
        return type(batch)(dict(values))  # not a copy: BatchEncoding keeps the tokenizer's encodings of the old rows
    if isinstance(batch, MutableMapping):
        new = copy.copy(batch)
        new.clear()
        new.update(values)
        return new
    if isinstance(batch, Mapping):
        return dict(values)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return dataclasses.replace(batch, **values)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(**values)
    if isinstance(batch, tuple | list):
        return type(batch)(values.values())
    return values[0]


def attach(batch: Any, extras: Mapping[str, Tensor]) -> Any:
    """`batch` with `extras` beside its labels; the batch itself is left as it is.

    A mapping gains the keys; a tuple or list gains one element each, in order; a namedtuple or dataclass must declare
    the fields. `ValueError` where that cannot be.
    """
    if not extras:
        return batch
    device = device_of(batch)
    extras = {name: value.to(device, non_blocking=True) for name, value in extras.items()}
    if isinstance(batch, Mapping):
        taken = [name for name in extras if name in batch]
        if taken:
            raise ValueError(
                f"the loader's batches already have {taken[0]!r}: flowstream would overwrite it. Is the loader itself "
                "a FlowStream? Rename the key, or use attach='pair'"
            )
        new = copy.copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
        new.update(extras)
        return new
    declared = isinstance(batch, tuple) and hasattr(batch, "_fields")
    if declared or dataclasses.is_dataclass(batch):
        missing = [name for name in extras if name not in fields(batch)]
        if missing:
            raise ValueError(
                f"{type(batch).__name__} declares no field {missing[0]!r}: add it (with a default), or use "
                "attach='pair' and write `for batch, weight in stream`"
            )
        return with_fields(batch, fields(batch) | extras)
    if isinstance(batch, tuple | list):
        return type(batch)([*batch, *extras.values()])
    raise ValueError(
        f"nothing can be attached to a {type(batch).__name__}: use attach='pair' and write "
        "`for batch, weight in stream`"
    )


def leaves(batch: Any) -> Iterator[tuple[tuple[Key, ...], Any]]:
    """All leaves of the tree, with their paths. A list is a leaf unless it holds arrays or further fields."""
    yield from _leaves(batch, ())


def _leaves(value: Any, path: tuple[Key, ...]) -> Iterator[tuple[tuple[Key, ...], Any]]:
    if is_container(value):
        for key, child in fields(value).items():
            yield from _leaves(child, (*path, key))
    else:
        yield path, value


def is_container(value: Any) -> bool:
    """Whether a value of the tree holds fields, and is no leaf."""
    if isinstance(value, Mapping) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return True
    if isinstance(value, tuple | list):
        return hasattr(value, "_fields") or any(is_array(child) or is_container(child) for child in value)
    return False


def device_of(batch: Any) -> torch.device:
    """The device of the labels, or else of the first tensor; the CPU when there is none."""
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
        device: torch.device = batch["labels"].device
        return device
    return next((leaf.device for _, leaf in leaves(batch) if isinstance(leaf, Tensor)), torch.device("cpu"))


def num_rows(batch: Any) -> int:
    """How many rows a batch has: the first dimension of its labels or ids, or else of its first array or list.

    `ValueError` where nothing tells.
    """
    top = fields(batch) if is_container(batch) or is_array(batch) else {0: batch}
    for name in _ROW_FIELDS:
        if is_array(top.get(name)):
            return len(top[name])
    found = [leaf for _, leaf in leaves(batch)]
    for leaf in found:
        if is_array(leaf):
            return len(leaf)
    for leaf in found:
        if isinstance(leaf, list | tuple):
            return len(leaf)
    raise ValueError(
        f"a {type(batch).__name__} without a tensor, an array or a list has no rows: does the loader deliver batches "
        "(`batch_size=`, `.batched(…)`), not single samples?"
    )


def num_samples(batch: Any) -> int:
    """How many samples a batch holds: its rows, or the documents in packed rows (where `position_ids` restart)."""
    rows = num_rows(batch)
    positions = fields(batch).get("position_ids") if isinstance(batch, Mapping) else None
    if is_array(positions) and positions.ndim == 2:
        starts = (positions[:, :-1] == 0) & (positions[:, 1:] == 1)
        return max(rows, int(starts.sum()))
    return rows


def num_bytes(batch: Any) -> int:
    """Bytes of a batch's tensors and arrays."""
    return sum(leaf.nbytes for _, leaf in leaves(batch) if is_array(leaf))


def check_rows(batch: Any, rows: int) -> None:
    """Raise `ValueError`, naming the key, unless every array of `batch` has `rows` rows, so that rows can be taken."""
    for path, leaf in leaves(batch):
        if is_array(leaf) and len(leaf) != rows:
            raise ValueError(
                f"{path_name(path)} has shape {list(leaf.shape)} in a batch of {rows} rows: resampling takes whole "
                "rows, and cannot tell which part belongs to which (patches of images?). Use mode='weight', or let "
                "the loader deliver one entry a row (a list)"
            )
        if isinstance(leaf, list | tuple) and len(leaf) not in (rows, 0):
            raise ValueError(
                f"{path_name(path)} is a list of {len(leaf)} in a batch of {rows} rows: resampling takes whole rows; "
                "give it one entry a row"
            )


def path_name(path: Sequence[Key]) -> str:
    """A leaf's path as a user would write it: `batch['image']['pixels']`."""
    return "batch" + "".join(f"[{key!r}]" for key in path)
