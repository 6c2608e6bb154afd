"""What scorers read from a batch: named fields, as arrays, with errors that say where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowstream.batch import fields, is_array

IGNORED = -100
"""The label of what is not to be predicted."""

REMEDY = "write FunctionScorer(fn), fn(batch) -> [B] losses"

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Place:
    """Where in the window something was found, for the error that tells of it."""

    batch: int

    def row(self, row: int) -> str:
        return f"batch {self.batch} of the window, row {row}"

    def __str__(self) -> str:
        return f"batch {self.batch} of the window"


def named_fields(batch: Any, place: Place, main: str) -> dict[str, Any]:
    """A batch's fields by name; positions become `main` and "labels". `None`s are left out.

    `(x,)`, `(x, labels)` and `(mapping, labels)` have one meaning; `ValueError` for a longer tuple.
    """
    found = fields(batch)
    if 0 in found:
        if len(found) > 2:
            raise ValueError(
                f"{place} is a {type(batch).__name__} of {len(found)}: only ({main},) and ({main}, labels) have one "
                f"meaning. Let the loader deliver a mapping with named keys, or {REMEDY}"
            )
        first = found[0]
        named = dict(first) if isinstance(first, Mapping) else {main: first}
        if 1 in found:
            named["labels"] = found[1]
        found = named
    return {str(key): value for key, value in found.items() if value is not None}


def integers(value: Any, name: str, place: Place, ndim: int = 2) -> Integers:
    """`value` as an int64 array on the CPU; `ValueError` unless it is a tensor or array of integers of `ndim` axes."""
    if not is_array(value):
        raise ValueError(
            f"{name} of {place} is {_described(value)}: a scorer needs a tensor or an array of shape "
            f"{_axes(ndim)}. Let the loader's collate function stack its rows"
        )
    if value.ndim != ndim:
        remedy = ""
        if name == "attention_mask" and value.ndim > 2:
            remedy = ". Give one [B, T] of 0 and 1, or position_ids that restart at each document of a packed row"
        elif value.ndim < ndim:
            remedy = ". Single samples? Let the loader make batches (`batch_size=`, `.batched(…)`)"
        raise ValueError(f"{name} of {place} has shape {list(value.shape)}, not {_axes(ndim)}{remedy}")
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) and not value.is_floating_point() else value
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iub":
        raise ValueError(f"{name} of {place} is of {value.dtype}: it must be of integers")
    return array.astype(np.int64, copy=False)


def mask_of(value: Any, shape: tuple[int, ...], place: Place, name: str = "attention_mask") -> NDArray[np.bool_]:
    """A [B, T] mask of 0 and 1 as bools: where there are tokens. `None` is all ones."""
    if value is None:
        return np.ones(shape, dtype=np.bool_)
    if isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point():
        value = value.detach().float().cpu().numpy()
    if isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype.kind == "f" and np.isin(value, (0, 1)).all():
        value = value.astype(np.int64)
    mask = integers(value, name, place)
    same_shape(mask, name, shape, place)
    if mask.size and (mask.min() < 0 or mask.max() > 1):
        raise ValueError(
            f"{name} of {place} has values from {mask.min()} to {mask.max()}, not 0 and 1: documents of a packed row "
            "are told apart by position_ids that restart"
        )
    return mask.astype(np.bool_)


def same_shape(value: Integers, name: str, shape: tuple[int, ...], place: Place) -> None:
    """`ValueError` unless `value` is shaped like the ids."""
    if value.shape != shape:
        raise ValueError(f"{name} of {place} has shape {list(value.shape)} beside ids of shape {list(shape)}")


def check_ids(ids: Integers, real: NDArray[np.bool_], vocabulary: int | None, name: str, place: Place) -> None:
    """`ValueError` if an id that is not padding is negative or outside the vocabulary."""
    wrong = real & ((ids < 0) | (ids >= (vocabulary or np.iinfo(np.int64).max)))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"{name} of {place.row(row)} has the id {ids[row, column]} at position {column}, and the reference a "
            f"vocabulary of {vocabulary}: is this the tokenizer of another model? (Padding may be anything where "
            "attention_mask is 0.)"
        )


def check_labels(labels: Integers, vocabulary: int | None, place: Place) -> None:
    """`ValueError` if a label is neither an id of the vocabulary nor -100."""
    wrong = (labels != IGNORED) & ((labels < 0) | (labels >= (vocabulary or np.iinfo(np.int64).max)))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"labels of {place.row(row)} have {labels[row, column]} at position {column}: a label is an id below "
            f"{vocabulary}, or -100 where there is nothing to predict"
        )


def as_tensor(value: Any) -> Tensor:
    """A tensor or array as a tensor that shares its memory where it can."""
    if isinstance(value, Tensor):
        return value.detach()
    return torch.from_numpy(value if value.flags.writeable else value.copy())


def content(name: str, value: Tensor) -> tuple[bytes, NDArray[np.uint8]]:
    """A tensor's name, dtype and shape, and its bits: what a key is made of."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return f"{name} {value.dtype} {tuple(value.shape)}".encode(), flat.view(torch.uint8).numpy()


def to_device(array: Tensor | NDArray[Any], device: torch.device) -> Tensor:
    """A CPU array on the reference's device, copied without waiting for it."""
    tensor = as_tensor(array)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # a copy from pageable memory waits
    return tensor.to(device, non_blocking=True)


def right_padded(rows: list[Integers], fill: int) -> Integers:
    """Rows of different lengths in one [B, T], `fill` after their ends."""
    padded = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def _axes(ndim: int) -> str:
    return {1: "[B]", 2: "[B, T]"}.get(ndim, f"{ndim} axes")


def _described(value: Any) -> str:
    return (
        f"a {type(value).__name__} of {len(value)}" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
    )
