"""Rows of different batches meet in one: what a resampler delivers.

A batch's sequences are padded to its own longest, left or right; rows that meet are cut to their own length and padded
anew, on the side and with the id that the loader's batches show.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowstream.batch import (
    Key,
    fields,
    has_entries,
    inputs,
    is_array,
    is_container,
    leaves,
    num_rows,
    path_name,
    with_fields,
)

IGNORED = -100
"""The label that losses ignore, by torch's and transformers' convention."""

Side = Literal["left", "right"]
Recollate = Callable[[list[Any]], Any]
"""Samples (a batch's fields, without the row dimension) → one batch, as a `collate_fn`."""

Path = tuple[Key, ...]
Span = tuple[int, int]
"""From where to where a row holds something, half-open."""


@dataclass(frozen=True)
class Padding:
    """How a loader pads, read from its batches."""

    side: Side = "right"
    pad_id: int = 0
    trims: bool = False
    """Whether widths differ from batch to batch. Where all are equal they are left so: somebody wants static shapes."""
    multiple: int = 1
    """A power of two that divides all widths: `pad_to_multiple_of` is kept."""
    tokens: frozenset[Path] = frozenset()
    """Fields along a row's tokens: in every batch as wide as its mask or ids. Empty unless it `trims`."""
    targets: frozenset[Path] = frozenset()
    """Fields along a decoder's tokens, whose widths are their own and differ; padded on the right."""
    target_multiple: int = 1


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a batch, taken to be delivered."""

    batch: Any
    index: int


def take(row: Row) -> Any:
    """The row as a sample: the batch's fields without their first dimension, padding and all."""
    return _taken(row.batch, row.index, num_rows(row.batch), nested=False)


def width_of(batch: Any) -> int:
    """Padded tokens of a row: the second dimension of the mask or the ids; 0 for what is no sequence."""
    sequence = _sequence(batch)
    return 0 if sequence is None else sequence.shape[1]


def cost_of(batch: Any) -> int:
    """What a batch makes a model read: rows x padded width, of what is no sequence its rows."""
    return num_rows(batch) * (width_of(batch) or 1)


def lengths_of(batch: Any) -> list[int]:
    """Tokens of each row between the ends of its mask (of its labels, if those reach beyond); 0 for no sequence."""
    return [stop - start for start, stop in _token_spans(batch)]


def read_padding(loaded: Sequence[Any]) -> Padding:
    """How the loader of these batches pads: a pure function of them, to be used for rows of these batches."""
    side: Side = "right"
    pad_id: int | None = None
    for batch in loaded:
        mask = _mask(batch)
        if mask is None:
            continue
        spans = _extents(mask)
        if any(start > 0 for start, _ in spans):
            side = "left"
        if pad_id is None:
            pad_id = _pad_id(batch, mask, spans)
    widths = {width_of(batch) for batch in loaded} - {0}
    trims = len(widths) > 1
    tokens, targets, target_widths = _sequences_of(loaded) if trims or _targets_vary(loaded) else _NO_SEQUENCES
    return Padding(
        side,
        pad_id or 0,
        trims=trims,
        multiple=_multiple(widths),
        tokens=tokens if trims else frozenset(),
        targets=targets,
        target_multiple=_multiple(target_widths),
    )


def recollate(rows: Sequence[Row], padding: Padding) -> Any:
    """One new batch of `rows`, of the type of the first row's batch; every field stays with its sample.

    Sequences are padded on `padding.side`: labels with -100, masks with 0, ids with the pad id, the rest with 0.
    Nothing in it shares memory with the rows' batches. `ValueError`, naming the key, where rows cannot meet.
    """
    sources = {id(row.batch): row.batch for row in rows}
    spans = {key: _token_spans(batch) if padding.tokens else [] for key, batch in sources.items()}
    target_spans = {key: _target_spans(batch, padding) if padding.targets else [] for key, batch in sources.items()}
    num = {key: num_rows(batch) for key, batch in sources.items()}
    meeting = _Meeting(
        padding,
        [row.index for row in rows],
        [num[id(row.batch)] for row in rows],
        [spans[id(row.batch)][row.index] for row in rows] if padding.tokens else [],
        [target_spans[id(row.batch)][row.index] for row in rows] if padding.targets else [],
    )
    return meeting.merge([row.batch for row in rows], ())


@dataclass(frozen=True)
class _Meeting:
    """Rows on their way into one batch."""

    padding: Padding
    indices: list[int]
    """Of each row, where it stands in its batch."""
    sizes: list[int]
    """Of each row, how many its batch has."""
    spans: list[Span]
    """Of each row, where its tokens are."""
    target_spans: list[Span]
    """… and its decoder's."""

    def merge(self, values: list[Any], path: Path) -> Any:
        """Merge what the rows' batches hold at `path`, whole (`values`), into that of one batch."""
        first = values[0]
        kinds = {_kind(value, rows, path) for value, rows in zip(values, self.sizes, strict=True)}
        if len(kinds) > 1:
            raise ValueError(
                f"{path_name(path)} is {' in one batch and '.join(sorted(kinds))} in another, and their rows meet: let "
                "the loader deliver the same in all batches, or pass recollate=your_collate_fn"
            )
        kind = kinds.pop()
        if kind == "fields":
            children = [fields(value) for value in values]
            if any(child.keys() != children[0].keys() for child in children):
                names = sorted({str(key) for child in children for key in child})
                raise ValueError(f"batches whose rows meet have different fields at {path_name(path)}: {names}")
            merged = {key: self.merge([child[key] for child in children], (*path, key)) for key in children[0]}
            return with_fields(first, merged)
        if kind in ("a tensor", "an array"):
            return self._merge_arrays(values, path)
        if kind == "a list":
            entries = [_fresh(value[index]) for value, index in zip(values, self.indices, strict=True)]
            return type(first)(entries)
        if not all(value is first or _same(value, first) for value in values):
            raise ValueError(
                f"{path_name(path)} has no entry a row and differs between batches whose rows meet ({first!r}, …): "
                "give it one entry a row, or pass recollate=your_collate_fn"
            )
        return _fresh(first)

    def _merge_arrays(self, values: list[Any], path: Path) -> Any:
        padding, first = self.padding, values[0]
        along = path in padding.tokens or path in padding.targets
        inner = [value.shape[2:] if along else value.shape[1:] for value in values]
        if any(value.ndim != first.ndim for value in values) or any(shape != inner[0] for shape in inner):
            raise _cannot_meet(path, values)
        if not along:
            return _concatenated([value[i : i + 1] for value, i in zip(values, self.indices, strict=True)])
        of_decoder = path in padding.targets
        spans = self.target_spans if of_decoder else self.spans
        multiple = padding.target_multiple if of_decoder else padding.multiple
        longest = max(stop - start for start, stop in spans)
        width = -(-max(longest, 1) // multiple) * multiple
        on_left = padding.side == "left" and not of_decoder
        merged = _filled(values, (len(values), width, *inner[0]), _pad_value(path, first, padding))
        for i, (value, index, (start, stop)) in enumerate(zip(values, self.indices, spans, strict=True)):
            at = width - (stop - start) if on_left else 0
            merged[i, at : at + stop - start] = value[index, start:stop]
        return merged


# Where the tokens are


def _token_spans(batch: Any) -> list[Span]:
    """Of each row, what its mask and its labels cover; all of it without a mask, and (0, 0) for what is no sequence.

    Labels outside the mask are the loader's mistake or, where an encoder-decoder's are as wide as its inputs by chance,
    none: either way every field keeps what it has, and all keep one width.
    """
    mask, labels = _mask(batch), _labels(batch)
    if mask is None:
        return [(0, width_of(batch))] * num_rows(batch)
    if labels is not None and labels.shape == mask.shape and not _names_decoder(batch):
        return _extents(mask | (labels != IGNORED))
    return _extents(mask)


def _target_spans(batch: Any, padding: Padding) -> list[Span]:
    """Of each row, from 0 to the last token of the decoder: all its fields keep one width."""
    found = [leaf for path, leaf in leaves(batch) if path in padding.targets]
    width = max((leaf.shape[1] for leaf in found if is_array(leaf) and leaf.ndim > 1), default=0)
    marks = [_numpy(inputs(batch).get("decoder_attention_mask")), _labels(batch)]
    known = [mark != (0, IGNORED)[i] for i, mark in enumerate(marks) if mark is not None and mark.shape[1:] == (width,)]
    if not known:
        return [(0, width)] * num_rows(batch)
    return [(0, stop) for _, stop in _extents(functools.reduce(np.logical_or, known))]


def _sequences_of(loaded: Sequence[Any]) -> tuple[frozenset[Path], frozenset[Path], set[int]]:
    """Fields along the tokens; fields along a decoder's whose widths differ; and those widths."""
    widths: dict[Path, set[int]] = {}
    tokens: dict[Path, bool] = {}
    decoders: dict[Path, bool] = {}
    for batch in loaded:
        width, has_decoder = width_of(batch), _names_decoder(batch)
        for path, leaf in leaves(batch, num_rows(batch)):
            if is_array(leaf) and leaf.ndim > 1:
                name = _name(path)
                as_wide = width > 0 and leaf.shape[1] == width
                widths.setdefault(path, set()).add(leaf.shape[1])
                tokens[path] = tokens.get(path, True) and as_wide
                of_decoder = name.startswith("decoder_") or (name == "labels" and (has_decoder or not as_wide))
                decoders[path] = decoders.get(path, False) or of_decoder
    targets = frozenset(path for path, is_decoder in decoders.items() if is_decoder and len(widths[path]) > 1)
    along = frozenset(path for path, as_wide in tokens.items() if as_wide and not decoders[path])
    return along, targets, set().union(*(widths[path] for path in targets))


_NO_SEQUENCES: tuple[frozenset[Path], frozenset[Path], set[int]] = (frozenset(), frozenset(), set())


def _targets_vary(loaded: Sequence[Any]) -> bool:
    """Whether labels differ in width: a look at each batch tells that of most there is nothing more to be read."""
    return len({labels.shape[1:] for batch in loaded if (labels := _labels(batch)) is not None}) > 1


def _extents(mask: NDArray[Any]) -> list[Span]:
    """Of each row, the half-open range from the first to the last position that is set; (0, 0) where none is."""
    on = mask != 0
    width = mask.shape[1]
    if not width:
        return [(0, 0)] * len(mask)
    any_on = on.any(axis=1)
    start = on.argmax(axis=1) * any_on
    stop = (width - on[:, ::-1].argmax(axis=1)) * any_on
    return list(zip(start.tolist(), stop.tolist(), strict=True))


def _multiple(widths: set[int]) -> int:
    divisor = math.gcd(*widths) if widths else 1
    return min(divisor & -divisor, 128) or 1


# Reading a batch


def _mask(batch: Any) -> NDArray[np.bool_] | None:
    mask = _numpy(inputs(batch).get("attention_mask"))
    return mask != 0 if mask is not None and mask.ndim == 2 else None


def _sequence(batch: Any) -> Any:
    """The tensor or array [B, T] that says how wide the rows are."""
    for name in ("attention_mask", "input_ids"):
        found = inputs(batch).get(name)
        if is_array(found) and found.ndim == 2:
            return found
    return None


def _labels(batch: Any) -> NDArray[Any] | None:
    """The labels of the tokens [B, T]: those beside the ids, or the second element of `(inputs, labels)`."""
    own = fields(batch) if is_container(batch) else {}
    places = ((inputs(batch), "labels"), (own, "labels"), (own, 1))
    labels = _numpy(next((found[key] for found, key in places if key in found), None))
    return labels if labels is not None and labels.ndim == 2 else None


def _names_decoder(batch: Any) -> bool:
    return any(isinstance(name, str) and name.startswith("decoder_") for name in inputs(batch))


def _pad_id(batch: Any, mask: NDArray[np.bool_], spans: list[Span]) -> int | None:
    """The id that stands outside the mask, if there is a place outside."""
    ids = _numpy(inputs(batch).get("input_ids"))
    if ids is None or ids.shape != mask.shape:
        return None
    for row, (start, stop) in enumerate(spans):
        if stop - start < mask.shape[1]:
            return int(ids[row, 0 if start > 0 else stop])
    return None


def _name(path: Path) -> str:
    """What a field means: the second of `(inputs, labels)` are labels."""
    return "labels" if path == (1,) else str(path[-1])


def _pad_value(path: Path, value: Any, padding: Padding) -> int:
    name = _name(path)
    if name in ("labels", "label", "label_ids") or name.endswith("_labels"):
        signed = value.dtype.is_signed if isinstance(value, Tensor) else value.dtype.kind in "if"
        return IGNORED if signed else 0
    return padding.pad_id if name in ("input_ids", "decoder_input_ids") else 0


# Values


def _kind(value: Any, rows: int, path: Path) -> str:
    if is_array(value):
        return "a tensor" if isinstance(value, Tensor) else "an array"
    if path and has_entries(value, rows):
        return "a list"
    if is_container(value):
        return "fields"
    if isinstance(value, list | tuple) and value:
        return "a list"
    return "one value"


def _taken(value: Any, index: int, rows: int, *, nested: bool) -> Any:
    kind = _kind(value, rows, (0,) if nested else ())
    if kind == "fields":
        taken = {key: _taken(child, index, rows, nested=True) for key, child in fields(value).items()}
        return taken if isinstance(value, Mapping) else with_fields(value, taken)
    return value if kind == "one value" else value[index]


def _numpy(value: object) -> NDArray[Any] | None:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return value if isinstance(value, np.ndarray) else None


def _concatenated(parts: list[Any]) -> Any:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else np.concatenate(parts)


def _filled(values: list[Any], shape: tuple[int, ...], fill: int) -> Any:
    """A new tensor or array like those of `values`, of a dtype that holds them all."""
    first = values[0]
    if isinstance(first, Tensor):
        dtype = functools.reduce(torch.promote_types, {value.dtype for value in values})
        return first.new_full(shape, fill, dtype=dtype)
    return np.full(shape, fill, dtype=np.result_type(*{value.dtype for value in values}))


def _fresh(value: Any) -> Any:
    """The value without the arrays and lists of its batch: what is changed in place in a new batch stays there."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if is_container(value):
        return with_fields(value, {key: _fresh(child) for key, child in fields(value).items()})
    return list(value) if type(value) is list else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor | np.ndarray) or isinstance(b, Tensor | np.ndarray):
        return type(a) is type(b) and a.shape == b.shape and bool((a == b).all())
    return bool(a == b or (a != a and b != b))


def _cannot_meet(path: Path, values: list[Any]) -> ValueError:
    shapes = sorted({tuple(value.shape[1:]) for value in values})
    return ValueError(
        f"{path_name(path)} has rows of the shapes {[list(shape) for shape in shapes]}, which cannot meet in a batch: "
        "let the loader deliver one shape, or pass recollate=your_collate_fn"
    )
