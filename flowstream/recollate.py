"""Rows of different batches meet in one: what a resampler delivers.

A batch's sequences are padded to its own longest, left or right; rows that meet are cut to their own length and padded
anew, on the side and with the id that the loader's batches show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowstream.batch import Key, fields, is_array, is_container, num_rows, path_name, with_fields

IGNORED = -100
"""The label that losses ignore, by torch's and transformers' convention."""

Side = Literal["left", "right"]
Recollate = Callable[[list[Any]], Any]
"""Samples (a batch's fields, without the row dimension) → one batch, as a `collate_fn`."""


@dataclass(frozen=True)
class Padding:
    """How a loader pads, read from its batches."""

    side: Side = "right"
    pad_id: int = 0
    trims: bool = False
    """Whether widths differ from batch to batch. Where all are equal they are left so: somebody wants static shapes."""
    multiple: int = 1
    """A power of two that divides all widths: `pad_to_multiple_of` is kept."""


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a batch, taken to be delivered."""

    batch: Any
    index: int


def take(row: Row) -> Any:
    """The row as a sample: the batch's fields without their first dimension."""
    return _map(row.batch, lambda leaf: leaf[row.index] if _per_row(leaf) else leaf)


def width_of(batch: Any) -> int:
    """Padded tokens of a row: the second dimension of the mask or the ids; 0 for what is no sequence."""
    mask = _sequence(batch)
    return 0 if mask is None else mask.shape[1]


def lengths_of(batch: Any) -> list[int]:
    """Tokens of each row between the ends of its mask; all of them without a mask, and 0 for what is no sequence."""
    mask = _mask(batch)
    if mask is not None:
        return [stop - start for start, stop in _extents(mask)]
    return [width_of(batch)] * num_rows(batch)


def read_padding(loaded: Sequence[Any]) -> Padding:
    """How the loader of these batches pads: a pure function of them."""
    side: Side = "right"
    pad_id: int | None = None
    for batch in loaded:
        mask = _mask(batch)
        if mask is None:
            continue
        ids = _inputs(batch).get("input_ids")
        padded = (mask == 0).nonzero()
        if len(padded):
            if side == "right" and any(start > 0 for start, _ in _extents(mask)):
                side = "left"
            if pad_id is None and is_array(ids) and tuple(ids.shape) == tuple(mask.shape):
                pad_id = int(ids[tuple(padded[0].tolist())])
    widths = {width_of(batch) for batch in loaded} - {0}
    divisor = math.gcd(*widths) if widths else 1
    multiple = min(divisor & -divisor, 128)
    return Padding(side, pad_id or 0, trims=len(widths) > 1, multiple=multiple)


def recollate(rows: Sequence[Row], padding: Padding) -> Any:
    """One batch of `rows`, of the type of the first row's batch; every field stays with its sample.

    Sequences are padded on `padding.side`: labels with -100, masks with 0, ids with the pad id, the rest with 0.
    `ValueError`, naming the key, where rows cannot meet.
    """
    return _merge(rows, [row.batch for row in rows], (), padding)


def _merge(rows: Sequence[Row], values: list[Any], path: tuple[Key, ...], padding: Padding) -> Any:
    """Merge what the rows' batches hold at `path`, whole (`values`), into that of one batch."""
    first = values[0]
    if is_container(first):
        children = [fields(value) for value in values]
        if any(child.keys() != children[0].keys() for child in children):
            names = sorted({str(key) for child in children for key in child})
            raise ValueError(f"batches whose rows meet have different fields at {path_name(path)}: {names}")
        merged = {key: _merge(rows, [child[key] for child in children], (*path, key), padding) for key in children[0]}
        return with_fields(first, merged)
    indices = [row.index for row in rows]
    if isinstance(first, np.ndarray) and first.ndim:
        if first.dtype.kind not in "biuf":
            return np.stack([value[index] for value, index in zip(values, indices, strict=True)])
        return _merge(rows, [torch.from_numpy(value) for value in values], path, padding).numpy()
    if isinstance(first, Tensor) and first.ndim:
        return _merge_tensors(rows, values, path, padding)
    if isinstance(first, list | tuple):
        return type(first)([value[index] for value, index in zip(values, indices, strict=True)])
    if any(not _same(value, first) for value in values):
        raise ValueError(
            f"{path_name(path)} has no entry a row and differs between batches whose rows meet ({first!r}, …): "
            "give it one entry a row, or pass recollate=your_collate_fn"
        )
    return first


def _merge_tensors(rows: Sequence[Row], values: list[Tensor], path: tuple[Key, ...], padding: Padding) -> Tensor:
    first = values[0]
    if any(value.ndim != first.ndim or value.shape[2:] != first.shape[2:] for value in values):
        raise _cannot_meet(path, values)
    if first.ndim == 1 or not padding.trims:
        if any(value.shape[1:] != first.shape[1:] for value in values):
            raise _cannot_meet(path, values)
        return torch.stack([value[row.index] for value, row in zip(values, rows, strict=True)])
    name = str(path[-1])
    sources = {id(row.batch): _extents_in(row.batch, name, value) for row, value in zip(rows, values, strict=True)}
    found = [extents for extents in sources.values() if extents is not None]
    if len(found) < len(sources):
        if any(value.shape[1:] != first.shape[1:] for value in values):
            raise _cannot_meet(path, values)
        return torch.stack([value[row.index] for value, row in zip(values, rows, strict=True)])
    spans = [own.spans[row.index] for row in rows if (own := sources[id(row.batch)]) is not None]
    on_left = padding.side == "left" and not any(extents.of_decoder for extents in found)
    longest = max(stop - start for start, stop in spans)
    width = math.ceil(max(longest, 1) / padding.multiple) * padding.multiple
    merged = first.new_full((len(rows), width, *first.shape[2:]), _pad_value(name, padding))
    for i, (value, row, (start, stop)) in enumerate(zip(values, rows, spans, strict=True)):
        at = width - (stop - start) if on_left else 0
        merged[i, at : at + stop - start] = value[row.index, start:stop]
    return merged


@dataclass(frozen=True)
class _Extents:
    """From where to where the rows of a tensor hold something."""

    spans: list[tuple[int, int]]
    of_decoder: bool = False
    """A decoder's side is padded on the right, whatever the encoder's."""


def _extents_in(batch: Any, name: str, value: Tensor) -> _Extents | None:
    """What the mask covers of the tensor `name` of a batch; `None` for what is no sequence."""
    everything = [(0, value.shape[1])] * len(value)
    if name.startswith("decoder_"):
        mask = _tensor(_inputs(batch).get("decoder_attention_mask"))
        return _Extents(everything if mask is None else _extents(mask), of_decoder=True)
    sequence = _sequence(batch)
    if sequence is not None and value.shape[1] == sequence.shape[1]:
        mask = _mask(batch)
        spans = everything if mask is None else _extents(mask)
        if name != "labels" or _covers(spans, value):
            return _Extents(spans)
    if name == "labels" and value.ndim == 2:  # an encoder-decoder's: as wide as its own targets
        return _Extents([(0, stop) for _, stop in _extents(value != IGNORED)], of_decoder=True)
    return None


def _covers(extents: list[tuple[int, int]], labels: Tensor) -> bool:
    """Whether no label stands outside the mask: else they are an encoder-decoder's, as wide by chance."""
    return all(
        start <= first and stop <= end
        for (start, end), (first, stop) in zip(extents, _extents(labels != IGNORED), strict=True)
        if stop > first
    )


def _extents(mask: Tensor) -> list[tuple[int, int]]:
    """Of each row, the half-open range from the first to the last position that is set; (0, 0) where none is."""
    on = mask != 0
    width = mask.shape[1]
    any_on = on.any(dim=1)
    start = on.int().argmax(dim=1) * any_on
    stop = (width - on.flip(1).int().argmax(dim=1)) * any_on
    return list(zip(start.tolist(), stop.tolist(), strict=True))


def _inputs(batch: Any) -> dict[Any, Any]:
    """The fields among which the ids stand: the batch's own, or those of a tuple's mapping, as in `(inputs, y)`."""
    own = fields(batch) if is_container(batch) else {}
    nested = (fields(child) for child in own.values() if isinstance(child, Mapping))
    return own if "input_ids" in own else next((child for child in nested if "input_ids" in child), own)


def _mask(batch: Any) -> Tensor | None:
    mask = _tensor(_inputs(batch).get("attention_mask"))
    return mask if mask is not None and mask.ndim == 2 else None


def _sequence(batch: Any) -> Tensor | None:
    """The tensor [B, T] that says how wide the rows are."""
    ids = _tensor(_inputs(batch).get("input_ids"))
    mask = _mask(batch)
    return mask if mask is not None else ids if ids is not None and ids.ndim == 2 else None


def _tensor(value: object) -> Tensor | None:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return value if isinstance(value, Tensor) else None


def _pad_value(name: str, padding: Padding) -> int:
    if "label" in name:
        return IGNORED
    return padding.pad_id if name in ("input_ids", "decoder_input_ids") else 0


def _per_row(leaf: object) -> bool:
    return is_array(leaf) or isinstance(leaf, list | tuple)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if not is_container(value):
        return change(value)
    changed = {key: _map(child, change) for key, child in fields(value).items()}
    return changed if isinstance(value, Mapping) else with_fields(value, changed)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor | np.ndarray) or isinstance(b, Tensor | np.ndarray):
        return type(a) is type(b) and bool((a == b).all())
    return bool(a == b)


def _cannot_meet(path: tuple[Key, ...], values: list[Tensor]) -> ValueError:
    shapes = sorted({tuple(value.shape[1:]) for value in values})
    return ValueError(
        f"{path_name(path)} has rows of the shapes {[list(shape) for shape in shapes]}, which cannot meet in a batch: "
        "let the loader deliver one shape, or pass recollate=your_collate_fn"
    )
