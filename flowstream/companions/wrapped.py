"""The model inside what trainers put around it, so that names of parameters are its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_INSIDE = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What torch.compile and activation checkpointing put into the names of a part of the model."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Without DistributedDataParallel, DataParallel and torch.compile; adapters of PEFT stay."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def plain_name(name: str) -> str:
    """A parameter's name as before parts of the model were wrapped."""
    for part in _INSIDE:
        name = name.replace(part, "")
    return name


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def numbers(given: Iterable[Any]) -> tuple[Any, ...]:
    """What is given; entries of arrays and tensors (`torch.linspace(0, 1, 5)`) as Python's own numbers."""
    return tuple(each.item() if hasattr(each, "item") else each for each in given)


def check_number(name: str, value: Any, *, least: float, most: float, above: bool = False) -> None:
    """`ValueError` unless `value` is a number within [least, most], or (least, most] with `above`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (least < value if above else least <= value) or not value <= most:
        opening, closing = "(" if above else "[", ")" if most == float("inf") else "]"
        raise ValueError(f"{name} is {value!r}: give a number in {opening}{least:g}, {most:g}{closing}")
