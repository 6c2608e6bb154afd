"""Stay near the start: an ℓ2 or ℓ1 penalty on the distance to the reference, in the loss or after each step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from flowstream.companions.wrapped import check_number, local, plain_name, unwrapped

__all__ = ["DistanceToReference"]

Norm = Literal["l2", "l1"]
Pairs = list[tuple[Tensor, Tensor]]
"""Each parameter, and where it started."""

_BUCKET = 2**26
"""Entries that a decoupled step reads at a time: it never holds a copy of the model."""


class DistanceToReference:
    """Owns θ*, where the trainable parameters θ started, and pulls them back to it.

    In the loss, which is what the official code of arXiv 2502.02797 does for its ℓ2 baseline (strength 1e-3):

        distance = fs.DistanceToReference(model, strength=1e-3)
        loss = loss + distance.penalty()

    or decoupled from the gradient and its moments, as AdamW's weight decay is, but towards θ* (L2-SP, Li et al. 2018,
    arXiv 1802.01483, is the loss term under SGD):

        distance = fs.DistanceToReference(model, strength=0.1)
        distance.decouple(optimizer)

    In bf16 parameters a decoupled pull smaller than their rounding is lost: train fp32 ones, or take the penalty.

    Args:
        model: what is trained: plain, under DDP or torch.compile, or already sharded by FSDP2 (`fully_shard`). Its
            parameters that require a gradient now are those that count; of a PEFT model these are the adapters, under
            `half_fine_tuning` those of this round (before `reselect`, make it first).
        norm: "l2" for Σ(θ-θ*)², "l1" for Σ|θ-θ*|, which leaves many entries exactly at θ*.
        strength: λ, at least 0. What it multiplies stands under `penalty` and `decouple`.
        reference: a module that holds θ* under the same names, such as the frozen model that scores; nothing is copied.
            By default θ* is a copy of the trainable parameters as they are now: **as much memory as these take**.
        per_parameter: whether the penalty is divided by the number of trainable parameters.

    Raises:
        ValueError: nothing is trainable; the reference lacks a parameter, has it in another shape, or has the very
            tensor that is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: Norm = "l2",
        strength: float,
        reference: nn.Module | None = None,
        per_parameter: bool = True,
    ) -> None:
        if norm not in ("l2", "l1"):
            raise ValueError(f"norm is {norm!r}: give 'l2' or 'l1'")
        check_number("strength", strength, least=0.0, most=math.inf)
        if strength == math.inf:
            raise ValueError("strength is inf: give a finite number")
        self.norm, self.strength, self.per_parameter = norm, float(strength), per_parameter
        self._model = unwrapped(model)
        trained = {plain_name(n): p for n, p in self._model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError(
                f"no parameter of the {type(self._model).__name__} requires a gradient: nothing is trained"
            )
        self.num_parameters = sum(p.numel() for p in trained.values())
        """N, over all ranks where the model is sharded."""
        self._owned = reference is None
        if reference is None:
            self._start = {name: parameter.detach().clone() for name, parameter in trained.items()}
        else:
            self._start = _found_in(reference, trained)

    def penalty(self) -> Tensor:
        """λ/N · Σ(θ-θ*)², or λ/N · Σ|θ-θ*| with subgradient 0 at 0: a 0-d fp32 tensor to add to the loss.

        N is the number of trainable parameters, or 1 with `per_parameter=False`. Differences are taken in fp32, and
        nothing is kept for the backward pass. Added to each of k micro-batch losses that share a given denominator
        (`flow_denominator`) it counts k times: divide it by k. Under DDP and FSDP2 it is the same on all ranks, and
        its gradient as well.

        With DDP's `find_unused_parameters=True` a parameter that the forward pass leaves out must not get a gradient
        of the penalty either: take `decouple`.
        """
        parameters, starts = zip(*self._pairs(), strict=True)
        scale = self.strength / (self.num_parameters if self.per_parameter else 1)
        value: Tensor = _Penalty.apply(self.norm, scale, starts, *parameters)
        return value

    def decouple(self, optimizer: Optimizer) -> RemovableHandle:
        """Pull θ towards θ* after each step of the optimizer, with that step's lr; `handle.remove()` ends it.

        ℓ2: θ ← θ - lr·λ·(θ-θ*); ℓ1, the proximal step: each entry by lr·λ towards θ*, and not past it. So λ means
        what `weight_decay` means in AdamW, with θ* in place of 0: it is **not** divided by N, and has no factor 2 of
        a square's derivative. Parameters without a gradient in this step do not move, as in AdamW. A step that a
        GradScaler skips pulls nothing. No synchronisation; at most 2**26 entries, or one tensor, are copied at a time.

        Raises ValueError if a trainable parameter is in no group of the optimizer.
        """
        if type(optimizer).__module__.partition(".")[0] == "accelerate":  # its wrapper knows no hooks
            optimizer = optimizer.optimizer  # type: ignore[attr-defined]
        grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        outside = [name for name, parameter in self._trained() if id(parameter) not in grouped]
        if outside:
            raise ValueError(
                f"{outside[0]!r} ({len(outside)} such) is in no group of the {type(optimizer).__name__}: give the "
                "optimizer every trainable parameter, of the model as it is now wrapped"
            )
        return optimizer.register_step_post_hook(self._pull)

    @torch.no_grad()
    def distance(self) -> Tensor:
        """‖θ-θ*‖₂, or ‖θ-θ*‖₁ with `norm="l1"`: a 0-d fp32 tensor."""
        total = _total(self._pairs(), self.norm)
        return total.sqrt() if self.norm == "l2" else total

    def state_dict(self) -> dict[str, Tensor]:
        """θ* by parameter, for a run that is resumed from other weights; empty where a reference holds it."""
        return dict(self._start) if self._owned else {}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take θ* from `state_dict()`. ValueError names a parameter that is missing, left over, or of another shape."""
        own = self._start if self._owned else {}
        for names, what in ((own.keys() - state.keys(), "lacks"), (state.keys() - own.keys(), "has, unlike this run,")):
            if names:
                raise ValueError(
                    f"the state {what} {min(names)!r} ({len(names)} such): make the DistanceToReference as in the run "
                    "that saved it, of the same model, trainable parameters and reference"
                )
        for name, start in own.items():
            if start.shape != state[name].shape:
                raise ValueError(
                    f"{name!r} has shape {list(state[name].shape)} in the state and {list(start.shape)} in the model"
                )
        for name, start in own.items():
            start.copy_(state[name])

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters as the model has them now: sharding puts others in their place."""
        for name, parameter in self._model.named_parameters():
            if (plain := plain_name(name)) in self._start:
                yield plain, parameter

    def _pairs(self) -> Pairs:
        pairs = []
        for name, parameter in self._trained():
            start = self._start[name]
            if isinstance(parameter, DTensor) != isinstance(start, DTensor) or parameter.shape != start.shape:
                raise ValueError(
                    f"{name!r} is a {type(parameter).__name__} of {list(parameter.shape)}, and was a "
                    f"{type(start).__name__} of {list(start.shape)} when its start was noted: make the "
                    "DistanceToReference after the model, and the reference with it, is sharded or resized"
                )
            if start.device != parameter.device:
                if not self._owned:
                    raise ValueError(
                        f"{name!r} is on {parameter.device} and the reference's on {start.device}: move the reference"
                    )
                start = self._start[name] = start.to(parameter.device)
            pairs.append((parameter, start))
        if len(pairs) != len(self._start):
            missing = self._start.keys() - {name for name, _ in self._trained()}
            raise ValueError(
                f"{min(missing)!r} is no longer in the model: make the DistanceToReference after all changes to it"
            )
        return pairs

    @torch.no_grad()
    def _pull(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        start_of = {id(parameter): start for parameter, start in self._pairs()}
        for group in optimizer.param_groups:
            moving = [p for p in group["params"] if p.requires_grad and p.grad is not None and id(p) in start_of]
            pairs = [(local(p), local(start_of[id(p)])) for p in moving]
            for bucket in _buckets(pairs):
                _step(bucket, self.norm, _rate(optimizer, group["lr"] * self.strength, bucket[0][0].device))


class _Penalty(torch.autograd.Function):
    """scale · Σ(θ-θ*)² or Σ|θ-θ*|: differences are taken anew in the backward pass rather than kept."""

    @staticmethod
    def forward(ctx: Any, norm: Norm, scale: float, starts: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        ctx.norm, ctx.scale, ctx.starts = norm, scale, starts
        ctx.save_for_backward(*parameters)
        return _total(list(zip(parameters, starts, strict=True)), norm) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        factor = gradient * ctx.scale * (2 if ctx.norm == "l2" else 1)
        found: list[Tensor | None] = []
        for needed, parameter, start in zip(ctx.needs_input_grad[3:], ctx.saved_tensors, ctx.starts, strict=True):
            found.append(_pulled(parameter, start, ctx.norm, factor) if needed else None)
        return None, None, None, *found


def _pulled(parameter: Tensor, start: Tensor, norm: Norm, factor: Tensor) -> Tensor:
    difference = local(parameter).float() - local(start).float()
    gradient = ((difference if norm == "l2" else difference.sign()) * factor.to(difference.device)).to(parameter.dtype)
    if not isinstance(parameter, DTensor):
        return gradient
    return DTensor.from_local(
        gradient,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _total(pairs: Pairs, norm: Norm) -> Tensor:
    """Σ(θ-θ*)² or Σ|θ-θ*|, 0-d fp32; one reduction over the ranks for all shards of a mesh."""
    sums: dict[Any, list[Tensor]] = {}
    for parameter, start in pairs:
        difference = parameter.detach().float() - start.detach().float()
        part = difference.square().sum() if norm == "l2" else difference.abs().sum()
        sums.setdefault((getattr(part, "device_mesh", None), getattr(part, "placements", None)), []).append(part)
    device = local(pairs[0][0]).device
    whole = torch.zeros((), device=device)
    for parts in sums.values():
        total = parts[0]
        for part in parts[1:]:
            total = total + part.to(total.device)
        whole = whole + (total.full_tensor() if isinstance(total, DTensor) else total).to(device)
    return whole


def _rate(optimizer: Optimizer, rate: float | Tensor, device: torch.device) -> float | Tensor:
    """lr·λ, and 0 where a fused optimizer skips the step by itself, having been told of infinite gradients."""
    if isinstance(infinite := getattr(optimizer, "found_inf", None), Tensor):
        rate = (infinite.reshape(()) == 0).to(device, non_blocking=True) * rate
    return rate.to(device, torch.float32, non_blocking=True) if isinstance(rate, Tensor) else rate


def _buckets(pairs: Pairs) -> Iterator[Pairs]:
    """Neighbours of at most `_BUCKET` entries on one device, or one larger tensor alone."""
    bucket: Pairs = []
    size = 0
    for pair in pairs:
        entries = pair[0].numel()
        if bucket and (size + entries > _BUCKET or pair[0].device != bucket[0][0].device):
            yield bucket
            bucket, size = [], 0
        bucket.append(pair)
        size += entries
    if bucket:
        yield bucket


def _step(bucket: Pairs, norm: Norm, rate: float | Tensor) -> None:
    parameters = [parameter for parameter, _ in bucket]
    now = [parameter.float() for parameter in parameters]
    start = [start.float() for _, start in bucket]
    moved = torch._foreach_sub(now, start)
    if norm == "l2":
        torch._foreach_mul_(moved, rate)
        torch._foreach_copy_(parameters, torch._foreach_sub(now, moved))
        return
    for parameter, begin, difference in zip(parameters, start, moved, strict=True):
        # Not now - clamp(difference): rounding would leave entries beside θ*.
        parameter.copy_(torch.where(difference.abs() <= rate, begin, parameter.float() - rate * difference.sign()))


def _found_in(reference: nn.Module, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The reference's parameters of these names, sharing its memory."""
    reference = unwrapped(reference)
    held = {plain_name(name): p for name, p in reference.named_parameters(remove_duplicate=False)}
    for name, parameter in trained.items():
        if name not in held:
            raise ValueError(
                f"the reference, a {type(reference).__name__}, has no parameter {name!r}: give the frozen model of the "
                "same architecture, or leave `reference` out (as for adapters), and the start is copied"
            )
        if held[name].shape != parameter.shape:
            raise ValueError(
                f"{name!r} has shape {list(held[name].shape)} in the reference and {list(parameter.shape)} in the "
                "model: resize both alike, or leave `reference` out, and the start is copied"
            )
        ours, theirs = local(parameter), local(held[name])
        if ours is theirs or (ours.numel() and ours.device == theirs.device and ours.data_ptr() == theirs.data_ptr()):
            raise ValueError(
                f"{name!r} of the reference is the tensor that is trained, so that their distance is always 0: freeze "
                "a copy made before training, or leave `reference` out, and the start is copied"
            )
    return {name: held[name] for name in trained}
