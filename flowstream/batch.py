"""Reads a batch of any shape, and rebuilds it with something added.

A batch is a tree: mappings, dataclasses, namedtuples, tuples and lists hold *fields*; its leaves are tensors and arrays
(rows along the first dimension), lists with an entry a row, and values that belong to the batch as a whole.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
import xxhash
from torch import Tensor

Key = str | int

_ROW_FIELDS = ("labels", "input_ids", "attention_mask")
"""Where a batch has them, these tell its number of rows: `pixel_values` may be patches, not rows."""

_TOKEN_FIELDS = ("input_ids", "attention_mask")


def is_array(value: object) -> TypeGuard[Tensor | np.ndarray[Any, Any]]:
    """Whether `value` is a tensor or an array with rows."""
    return isinstance(value, Tensor | np.ndarray) and value.ndim > 0


def fields(batch: Any) -> dict[Any, Any]:
    """The fields of a batch: a mapping's items, a dataclass' or namedtuple's by name, a sequence's by position.

    A bare tensor is its own field 0. `ValueError` for what is no batch.
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    if _is_dataclass(batch):
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
    if isinstance(batch, Mapping):
        new = _copied(batch)
        new.clear()
        for name, value in values.items():
            new[name] = value
        return new
    if _is_dataclass(batch):
        new = dataclasses.replace(batch, **{field.name: values[field.name] for field in _init_fields(batch)})
        for name, value in values.items():
            object.__setattr__(new, name, value)  # also what `__init__` does not take, and where the class is frozen
        return new
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
        new = _copied(batch)
        for name, value in extras.items():
            new[name] = value
        return new
    declared = isinstance(batch, tuple) and hasattr(batch, "_fields")
    if declared or _is_dataclass(batch):
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


def inputs(batch: Any) -> dict[Any, Any]:
    """The fields among which the ids stand: the batch's own, or those of a mapping within, as in `(inputs, labels)`."""
    own = fields(batch) if is_container(batch) else {}
    nested = [own, *(fields(child) for child in own.values() if isinstance(child, Mapping))]
    return next((found for found in nested if any(name in found for name in _TOKEN_FIELDS)), own)


def leaves(batch: Any, rows: int | None = None) -> Iterator[tuple[tuple[Key, ...], Any]]:
    """All leaves of the tree, with their paths. A list is a leaf unless it holds arrays or further fields.

    Where the number of `rows` is given, a list with an entry a row (see `has_entries`) is a leaf whatever it holds.
    """
    yield from _leaves(batch, (), rows)


def is_container(value: Any) -> bool:
    """Whether a value of the tree holds fields, and is no leaf."""
    if isinstance(value, Mapping) or _is_dataclass(value):
        return True
    if isinstance(value, tuple | list):
        return hasattr(value, "_fields") or any(is_array(child) or is_container(child) for child in value)
    return False


def has_entries(value: Any, rows: int) -> bool:
    """Whether a list within a batch of `rows` rows holds an entry a row (names, boxes of each image), and not fields.

    A list of arrays or mappings is taken for fields, as collate functions stack tuples, unless it has an entry a row
    and something in it has not; `check_rows` refuses what may be either.
    """
    if not _is_plain_sequence(value):
        return False
    return len(value) == rows and not _has_rows(value, rows) if is_container(value) else len(value) > 0


def device_of(batch: Any) -> torch.device:
    """The device of the labels, or else of the first tensor; the CPU when there is none."""
    labels = fields(batch).get("labels", inputs(batch).get("labels")) if is_container(batch) else None
    tensors = [labels, *(leaf for _, leaf in leaves(batch))]
    return next((tensor.device for tensor in tensors if isinstance(tensor, Tensor)), torch.device("cpu"))


def num_rows(batch: Any) -> int:
    """How many rows a batch has: the first dimension of its labels or ids, or else of its first array or list.

    `ValueError` where nothing tells.
    """
    own = fields(batch) if is_container(batch) or is_array(batch) else {0: batch}
    named = [found.get(name) for found in (own, inputs(batch)) for name in _ROW_FIELDS]
    direct = next((value for value in (*named, *own.values()) if is_array(value)), None)
    if direct is not None:
        return len(direct)
    lengths = [len(leaf) for _, leaf in leaves(batch) if is_array(leaf)]
    of_lists = [len(leaf) for _, leaf in leaves(batch) if isinstance(leaf, list | tuple)]
    of_fields = {len(value) if _is_plain_sequence(value) else -1 for value in own.values()}
    if len({*lengths, *of_lists}) > 1 and len(of_fields) == 1 and min(of_fields) > 0:
        return min(of_fields)  # images and boxes, say: lists of one length, with arrays of many
    if lengths or of_lists:
        return (lengths or of_lists)[0]
    raise ValueError(
        f"a {type(batch).__name__} without a tensor, an array or a list has no rows: does the loader deliver batches "
        "(`batch_size=`, `.batched(…)`), not single samples?"
    )


def num_samples(batch: Any) -> int:
    """How many samples a batch holds: its rows, or the documents in packed rows (where `position_ids` restart)."""
    rows = num_rows(batch)
    positions = inputs(batch).get("position_ids")
    if is_array(positions) and positions.ndim == 2:
        starts = (positions[:, :-1] == 0) & (positions[:, 1:] == 1)
        return max(rows, int(starts.sum()))
    return rows


def num_bytes(batch: Any) -> int:
    """Bytes of a batch's tensors and arrays."""
    return sum(leaf.nbytes for _, leaf in leaves(batch) if is_array(leaf))


def content_hash(batch: Any, key: str | None = None) -> str:
    """A hash of what a batch holds on the CPU, or of its field `key` alone. Equal batches have equal hashes."""
    digest = xxhash.xxh3_64()
    for path, leaf in leaves(fields(batch)[key] if key is not None else batch):
        digest.update(repr(path).encode())
        if isinstance(leaf, Tensor):
            if leaf.is_cpu and not leaf.is_sparse:
                flat = leaf.detach().contiguous().reshape(-1)
                if flat.stride(0) != 1:  # a single value, cut from others: contiguous, but no view of bytes
                    flat = flat.clone(memory_format=torch.contiguous_format)
                digest.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(leaf, np.ndarray) and leaf.dtype != object:
            digest.update(np.ascontiguousarray(leaf).tobytes())
        elif isinstance(leaf, list | tuple) and all(isinstance(entry, str | bytes | int | float) for entry in leaf):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def mapped(batch: Any, change: Callable[[Any], Any]) -> Any:
    """The tree anew, of the same containers, with `change(leaf)` in each leaf's place."""
    if not is_container(batch):
        return change(batch)
    return with_fields(batch, {key: mapped(child, change) for key, child in fields(batch).items()})


def moved(batch: Any, device: torch.device) -> Any:
    """The tree anew, with its tensors on `device`; those that are there already are shared."""
    return mapped(batch, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)


def check_rows(batch: Any, rows: int) -> None:
    """Raise `ValueError`, naming the key, unless every array of `batch` has `rows` rows, so that rows can be taken."""
    for path, value in _sequences(batch, ()):
        if len(value) == rows and _has_rows(value, rows):
            raise ValueError(
                f"{path_name(path)} is a {type(value).__name__} of {rows}, with {rows} rows in each, in a batch of "
                f"{rows} rows: nothing tells an entry a row from a field each. Name the fields (a mapping), or leave "
                "out batches so small (drop_last=True)"
            )
    for path, leaf in leaves(batch, rows):
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


def _leaves(value: Any, path: tuple[Key, ...], rows: int | None) -> Iterator[tuple[tuple[Key, ...], Any]]:
    if not is_container(value) or (path and rows is not None and has_entries(value, rows)):
        yield path, value
        return
    for key, child in fields(value).items():
        yield from _leaves(child, (*path, key), rows)


def _sequences(value: Any, path: tuple[Key, ...]) -> Iterator[tuple[tuple[Key, ...], Any]]:
    """Lists and tuples of arrays or further fields within a batch, with their paths."""
    if path and _is_plain_sequence(value):
        yield path, value
    for key, child in fields(value).items() if is_container(value) else ():
        if is_container(child):
            yield from _sequences(child, (*path, key))


def _has_rows(value: Any, rows: int) -> bool:
    """Whether there are arrays or lists in `value`, and all have `rows` rows."""
    lengths = {len(leaf) for _, leaf in leaves(value) if is_array(leaf) or isinstance(leaf, list | tuple)}
    return lengths == {rows}


def _is_plain_sequence(value: Any) -> bool:
    return isinstance(value, tuple | list) and not hasattr(value, "_fields")


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _init_fields(batch: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(batch) if field.init]


def _copied(batch: Mapping[Any, Any]) -> MutableMapping[Any, Any]:
    """A shallow copy that shares no storage with `batch`, of the same type if that can be told."""
    if isinstance(batch, dict | UserDict):
        return copy.copy(batch)  # with its further attributes
    own_copy = getattr(batch, "copy", None)  # `copy.copy` of another mapping would share what it wraps
    copied = own_copy() if own_copy is not None else None
    return copied if isinstance(copied, MutableMapping) else dict(batch)
