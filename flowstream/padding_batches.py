"""A batch that keeps a dry rank in step: of the same shape, without a label, of weight 0.

It is made from a real batch, because a model must be able to read it: ids inside the vocabulary, masks that attend to
something, as many rows as a BatchNorm wants. What it teaches is taken out at the other end, where the loss is formed.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowstream.batch import fields, is_container, leaves, path_name, with_fields
from flowstream.scoring.reading import IGNORED

LABEL_NAMES = ("labels", "label", "targets", "target")
"""What scorers read labels from, by name; in `(x, y)` they are the second."""

_Path = tuple[Any, ...]


@torch.inference_mode(False)  # or the caller's mode would give tensors that no backward takes
def ignored(batch: Any, *, by_position: bool = True, device: torch.device | str | None = None) -> Any:
    """`batch` anew, of the same type, with tensors, arrays and lists of its own, and labels that nothing counts.

    Integer labels become -100, in tensors, arrays and lists. Labels that cannot say so stay, and need the weight of 0:
    probabilities, bools, unsigned integers, annotations in a mapping. So does a batch without labels. Everything else
    is as in `batch`, but NaN becomes 0: in a backward pass, 0 times NaN is NaN.

    Labels are where scorers find them: under a name of `LABEL_NAMES` in the batch, or in the mapping that holds its
    ids or is its first element; or the second of `(x, y)`. by_position=False leaves that second element as it is: where
    no scorer reads labels (`FunctionScorer`), it may be ids or masks, which -100 would make unreadable.

    device: where the tensors are to be; by default each stays where it is. `ValueError` for what is no batch.
    """
    fields(batch)  # what is no batch is refused here
    return _renewed(batch, (), _label_paths(batch, by_position), device)


def portable(batch: Any) -> bytes:
    """`batch` as bytes, for ranks of the same run that never had one; tensors travel on the CPU.

    `ValueError` for a batch that cannot be pickled, naming the field.
    """
    try:
        return _packed(batch)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{_unpicklable(batch)} cannot be sent to the ranks that have no data of their own ({error}): batches made "
            "for them need fields and types that pickle can name from a module. Drop the field in the collate "
            "function, define its type at the top of a module, or pass on_uneven='stop'"
        ) from error


@torch.inference_mode(False)
def from_portable(packed: bytes) -> Any:
    """The batch of `portable`, each tensor on this process' current device of the type that it stood on.

    Only for bytes from ranks of this run: unpickling runs what they say. `RuntimeError` without such a device.
    """
    return _Unpickler(io.BytesIO(packed)).load()


# Walking


def _label_paths(batch: Any, by_position: bool) -> set[_Path]:
    if not is_container(batch):
        return set()
    own = fields(batch)
    plain = isinstance(batch, tuple | list) and not hasattr(batch, "_fields")
    paths: set[_Path] = {(name,) for name in own if name in LABEL_NAMES}
    if plain and by_position and len(own) == 2:
        paths.add((1,))
    for key, child in own.items():
        if isinstance(child, Mapping) and (key,) not in paths and ((plain and key == 0) or _holds_ids(child)):
            paths |= {(key, name) for name in child if name in LABEL_NAMES}
    return paths


def _holds_ids(found: Mapping[Any, Any]) -> bool:
    return "input_ids" in found or "attention_mask" in found


def _renewed(value: Any, path: _Path, labels: set[_Path], device: torch.device | str | None) -> Any:
    is_sequence = isinstance(value, tuple | list)
    if not (is_sequence or is_container(value)):
        return _renewed_leaf(value, path in labels, device)
    below = {name: (*path, name) for name in fields(value)}
    if is_sequence and path in labels:  # a mapping there is an annotation, whose parts need not be classes
        labels = labels.union(below.values())
    return with_fields(
        value, {name: _renewed(child, below[name], labels, device) for name, child in fields(value).items()}
    )


# Leaves


def _renewed_leaf(value: Any, is_label: bool, device: torch.device | str | None) -> Any:
    if isinstance(value, Tensor):
        own = value.detach().to(value.device if device is None else device, copy=True)
        return _cleared(own, is_label)
    if isinstance(value, np.ndarray):
        own_array = value.copy()
        if is_label and value.dtype.kind == "i":
            own_array.fill(IGNORED)
        elif value.dtype.kind == "f":
            own_array[np.isnan(own_array)] = 0
        return own_array
    if is_label and (type(value) is int or isinstance(value, np.signedinteger)):
        return type(value)(IGNORED)
    return value


def _cleared(own: Tensor, is_label: bool) -> Tensor:
    if own.layout != torch.strided:
        return own
    if own.is_floating_point():
        if own.element_size() > 1:  # not in 8 bits: torch computes nothing there
            own.masked_fill_(own.isnan(), 0)
    elif is_label and own.dtype.is_signed and not own.is_complex():
        own.fill_(IGNORED)
    return own


# Packing


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> tuple[str, bytes] | None:
        if not isinstance(value, Tensor):
            return None
        stored = io.BytesIO()
        # A copy: of a view, torch.save would store all that it is a view of.
        torch.save(value.detach().to("cpu", copy=True), stored)
        return value.device.type, stored.getvalue()


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, stored: tuple[str, bytes]) -> Tensor:
        kind, content = stored
        tensor: Tensor = torch.load(io.BytesIO(content), weights_only=False)
        try:
            return tensor.to(kind)
        except (AssertionError, RuntimeError) as error:
            raise RuntimeError(
                f"a batch came from a rank that has it on a device of type {kind!r}, and this rank cannot put it there "
                f"({error}): let all ranks' loaders deliver to the same type of device"
            ) from error


def _packed(value: Any) -> bytes:
    stored = io.BytesIO()
    _Pickler(stored, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return stored.getvalue()


def _unpicklable(batch: Any) -> str:
    for path, leaf in leaves(batch):
        try:
            _packed(leaf)
        except (pickle.PicklingError, AttributeError, TypeError):
            return path_name(path)
    return f"a batch of type {type(batch).__name__}"
