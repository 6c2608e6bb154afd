"""Loaders' states as plain values, and back: what `torch.load(weights_only=True)` reads, and nothing else."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

import numpy as np
import torch

_TAG = "__flowstream__"
_PLAIN = (type(None), bool, int, float, str, bytes)


def to_plain(value: Any, path: str = "state") -> Any:
    """A copy of `value` out of plain values and tensors. What is neither, but common in states, is marked as such.

    Raises:
        ValueError: an object of a kind that cannot be kept without running its code on loading; named with its path.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {_TAG: "ndarray", "dtype": value.dtype.str, "shape": list(value.shape), "bytes": value.tobytes()}
    if isinstance(value, np.bool_ | np.integer | np.floating):
        return {_TAG: "scalar", "dtype": value.dtype.str, "bytes": value.tobytes()}
    if type(value) in (dict, OrderedDict):
        keys = [to_plain(key, f"{path} key") for key in value]
        if any(isinstance(key, dict) for key in keys):
            raise ValueError(f"{path} has keys that are not plain values")
        return type(value)(
            (key, to_plain(entry, f"{path}[{key!r}]")) for key, entry in zip(keys, value.values(), strict=True)
        )
    if type(value) in (list, tuple):
        return type(value)(to_plain(entry, f"{path}[{i}]") for i, entry in enumerate(value))
    if type(value) in (set, frozenset, deque):
        entries = [to_plain(entry, f"{path} entry") for entry in value]
        return {_TAG: type(value).__name__, "entries": entries, "maxlen": getattr(value, "maxlen", None)}
    raise ValueError(f"{path} is a {type(value).__module__}.{type(value).__qualname__}")


def from_plain(value: Any) -> Any:
    """What `to_plain` was given, as a new copy."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        if _TAG in value:
            return _restored(value)
        return type(value)((key, from_plain(entry)) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return type(value)(map(from_plain, value))
    return value


def _restored(marked: dict[str, Any]) -> Any:
    kind = marked[_TAG]
    if kind == "ndarray":
        return np.frombuffer(marked["bytes"], dtype=marked["dtype"]).reshape(marked["shape"]).copy()
    if kind == "scalar":
        return np.frombuffer(marked["bytes"], dtype=marked["dtype"])[0]
    entries = [from_plain(entry) for entry in marked["entries"]]
    if kind == "deque":
        return deque(entries, marked["maxlen"])
    return set(entries) if kind == "set" else frozenset(entries)
