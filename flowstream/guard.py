"""A guard against weights that are dropped on their way to the loss: nothing else would tell."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowstream.batch import fields, mapped

__all__ = ["check_weights_used"]

_TOLERANCE = 1e-5
"""Relative: what a forward may differ by when it is run again. The weights are changed by a quarter at least."""

_REMEDY = (
    "Take them out of the batch and form the loss with fs.weighted_lm_loss, fs.weighted_cross_entropy or "
    'fs.weighted_linear_cross_entropy; or take mode="resample", which needs no weights'
)


def check_weights_used(
    compute_loss: Callable[[Any], Tensor],
    batch: Any,
    *,
    key: str | int = "flow_weight",
    model: nn.Module | None = None,
    name: str | None = None,
) -> bool:
    """Raise unless the loss changes with the weights: call it once, at the first step.

    A model that swallows unknown arguments, a collate function that keeps known columns only, a loss that never sees
    the weights: each trains without them, and raises nothing. Here `compute_loss` runs twice more on the batch, without
    gradients and under the same random numbers, once with the weights and once with others. Ranks run it as often as
    one another, whatever is in their batches.

    >>> batch = {"x": torch.ones(2, 3), "flow_weight": torch.tensor([0.5, 0.2])}
    >>> check_weights_used(lambda batch: (batch["x"].sum(dim=1) * batch["flow_weight"]).mean(), batch)
    True

    Args:
        compute_loss: from a batch to its loss, as the training step does it, without `backward()`. It may take fields
            out of the batch, and change the weights: it gets a copy each time, which shares the other tensors.
        batch: as the stream delivers it.
        key: of the weights in the batch: a name, or a position in a tuple or list; with `attach="pair"`, give
            `(batch, weight)` and `key=1`.
        model: its buffers are put back, which a forward in train mode moves (BatchNorm).
        name: what computes the loss, for the error; by default the function's own name.

    Returns:
        False where this batch cannot tell: no sample has a weight, or nothing is labelled and the loss is 0.

    Raises:
        ValueError: there are no weights in the batch, the loss does not change with them, or is not one number.
    """
    found = fields(batch)
    name = name or getattr(compute_loss, "__qualname__", None) or type(compute_loss).__name__
    if key not in found:
        raise ValueError(
            f"the batch that reaches {name} has no {key!r}, only {sorted(map(str, found))}: what stands between the "
            "stream and the loss has dropped the weights (a collate function, or a filter of unused columns). Wrap the "
            "loader after it, or let it pass the weights on"
        )
    weight = found[key]
    if not isinstance(weight, Tensor):
        raise ValueError(f"{key!r} of the batch that reaches {name} is a {type(weight).__name__}: weights are a tensor")

    def loss_with(factors: Tensor | float) -> float:
        changed = weight * factors
        with torch.no_grad(), _buffers_put_back(model), _random_numbers_put_back(weight):
            try:
                loss = compute_loss(mapped(batch, lambda leaf: changed if leaf is weight else leaf))
            except TypeError as error:
                if f"'{key}'" not in str(error):
                    raise
                raise ValueError(f"{name} hands the weights to what knows none: {error}. {_REMEDY}") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ValueError(f"{name} gives {found}, and no loss: return a 0-d tensor")
        return float(loss)

    given, other = loss_with(1.0), loss_with(_factors(weight))
    if given == other == 0 or not bool((weight > 0).any()):
        return False
    if abs(given - other) <= _TOLERANCE * max(abs(given), abs(other)):
        raise ValueError(
            f"{name} does not use the weights: its loss is {given:.6g} with them, and {other:.6g} with others. They "
            "are not multiplied into the loss (a model's own loss ignores them without a word), or divided out again "
            f"(by the batch's own sum of weights). {_REMEDY}"
        )
    return True


def _factors(weight: Tensor) -> Tensor:
    """From .125 to .75, another for each sample, and for each token where those have weights."""
    factors = torch.linspace(0.25, 0.75, len(weight), device=weight.device)
    if weight.ndim == 1:
        return factors
    return factors[:, None] * torch.linspace(0.5, 1.0, weight.shape[1], device=weight.device)


@contextmanager
def _buffers_put_back(model: nn.Module | None) -> Iterator[None]:
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()] if model is not None else []
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


@contextmanager
def _random_numbers_put_back(like: Tensor) -> Iterator[None]:
    """torch's on the CPU, the current device and that of `like`, numpy's and Python's."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=_cuda_devices(like)):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _cuda_devices(like: Tensor) -> list[int]:
    if not torch.cuda.is_available():
        return []
    devices = {torch.cuda.current_device()}
    if like.is_cuda:
        devices.add(like.get_device())
    return sorted(devices)
