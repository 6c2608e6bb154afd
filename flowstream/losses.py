"""Weighted losses: Σ w·nll over the labelled positions, in fp32, over a denominator of one's choice.

A loss that divides by its own batch's tokens, samples or weights does not average, over ranks or micro-batches, to that
of the whole batch. It does with a *given* denominator: the `flow_denominator` of a stream with `accumulate=k` and
`include=("denominator",)` counts over all k micro-batches and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["weighted_cross_entropy", "weighted_lm_loss"]

_IGNORED = -100


def weighted_lm_loss(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    denominator: str | float | Tensor = "tokens",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Weighted next-token loss, Σ_i w_i Σ_t nll_it / denominator: a 0-d fp32 tensor, in nats.

    logits [B, T, V] of any float dtype; labels [B, T] integer, -100 where ignored, not shifted (position t predicts
    label t + 1); weight [B], or [B, T] aligned with the labels by index, which gets no gradient. Only rows with a label
    and a weight other than 0 are read: what stands elsewhere cannot spoil the loss, and without any it is exactly 0,
    with a gradient of 0.

    denominator: `"tokens"`, the unweighted number of labelled tokens of this batch, as in the official code of arXiv
    2502.02797; `"weights"`, Σ w_i n_i with n_i those of sample i; `"samples"`, the rows with a labelled token; or a
    number or 0-d tensor. All are clamped above 0. **The mean over ranks or micro-batches is exact only with a given
    denominator**: `flow_denominator`, from `accumulate=k` and `include=("denominator",)`.

    label_smoothing: the share ε of a target that is spread evenly over all classes, as in `F.cross_entropy`. It is the
    training's; the reference scores without.

    Raises ValueError for shapes that do not fit and, where labels are on the CPU, for labels outside the vocabulary.
    Labels on a GPU cost one synchronisation; left on the CPU, with the weight, they cost none. Where logits are too
    large to hold, `weighted_linear_cross_entropy` takes hidden states and the head.

    >>> logits, labels = torch.zeros(2, 3, 4), torch.tensor([[-100, 1, 2], [-100, -100, 3]])
    >>> weighted_lm_loss(logits, labels, torch.tensor([0.5, 0.2]))  # (0.5 · 2 + 0.2) · log 4 / 3
    tensor(0.5545)
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits have shape {list(logits.shape)} and labels {list(labels.shape)}; give [B, T, V] and [B, T]"
        )
    # Labels move to the logits that predict them: cutting the logits instead would copy them all.
    following, weights = next_tokens(labels, weight)
    return _weighted_loss(logits, following, weights, denominator, label_smoothing)


def weighted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    denominator: str | float | Tensor = "samples",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Weighted cross-entropy without a shift, Σ w·nll / denominator: a 0-d fp32 tensor, in nats.

    logits [B, C] with target [B] and weight [B]; or logits [B, T, C] (decoder labels, token classification) with target
    [B, T] and weight [B] or [B, T]. Targets are integers, -100 where ignored, or probabilities of the logits' shape.
    What is read, dtypes, gradients and `label_smoothing` are as in `weighted_lm_loss`.

    denominator: `"samples"`, the samples with a target: for target [B], none ignored, this is mean(w·ℓ), as in the
    official vision code of arXiv 2502.02797; `"tokens"`, the targets not ignored; `"weights"`, the sum of their
    weights; or a number or 0-d tensor. All are clamped above 0. **The mean over ranks or micro-batches is exact only
    with a given denominator**: `flow_denominator`, from `accumulate=k` and `include=("denominator",)`.

    Raises ValueError for shapes that do not fit and, where targets are on the CPU, for targets outside the classes.

    >>> weighted_cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3]), torch.tensor([0.5, 0.2]))  # .35 · log 4
    tensor(0.4852)
    """
    if logits.ndim not in (2, 3) or target.shape != logits.shape[: target.ndim] or target.ndim < logits.ndim - 1:
        raise ValueError(
            f"logits have shape {list(logits.shape)} and target {list(target.shape)}; give logits [B, C] or [B, T, C] "
            "with integer targets [B] or [B, T], or with probabilities of the logits' shape"
        )
    soft = target.ndim == logits.ndim
    if soft != target.is_floating_point():
        raise ValueError(
            f"target has shape {list(target.shape)} and dtype {target.dtype} for logits {list(logits.shape)}; class "
            "numbers are integers without the last dimension, probabilities are floating with it"
        )
    weights = _spread(weight, target[..., 0] if soft else target)
    return _weighted_loss(logits, target, weights, denominator, label_smoothing)


def _spread(weight: Tensor, like: Tensor) -> Tensor:
    """The weight, a number a sample or an entry, as fp32 of the shape and on the device of `like` [B] or [B, T]."""
    if weight.shape != like.shape and weight.shape != like.shape[:1]:
        either = "[B]" if like.ndim == 1 else "[B] or [B, T]"
        raise ValueError(
            f"weight has shape {list(weight.shape)} for targets of {list(like.shape)}; give {either}, one a sample"
            f"{'' if like.ndim == 1 else ' or one a token'}"
        )
    weight = weight.detach().to(like.device, torch.float32)
    return weight if weight.ndim == like.ndim else weight[:, None].expand_as(like)


def next_tokens(labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [B, T] and the weight, fp32 [B, T], where they are predicted: entry t is that of label t + 1."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels have dtype {labels.dtype}; give integer token ids, -100 where ignored")
    weights = _spread(weight, labels)
    return F.pad(labels[:, 1:], (0, 1), value=_IGNORED), F.pad(weights[:, 1:], (0, 1))


@dataclass(frozen=True)
class Kept:
    """The entries with a target and a weight other than 0; on the logits' device, but for the divisor."""

    index: Tensor
    """[n] among the entries of the target, flattened."""
    target: Tensor
    """[n] int64, or [n, C] fp32 probabilities."""
    weight: Tensor
    """[n] fp32."""
    divisor: Tensor
    """0-d fp32 above 0, on the device of the target: being 0-d it may divide what lies elsewhere."""


def keep(target: Tensor, weight: Tensor, denominator: str | float | Tensor, num_classes: int, like: Tensor) -> Kept:
    """target [...] integer, or [..., C] probabilities; weight [...] fp32 on its device; `like` is where logits are."""
    soft = target.is_floating_point()
    labelled = torch.ones_like(weight, dtype=torch.bool) if soft else target != _IGNORED
    kept = (labelled & (weight != 0)).flatten().nonzero().squeeze(1)
    picked = target.reshape(-1, target.shape[-1])[kept].float() if soft else target.flatten()[kept].long()
    if not soft and target.is_cpu:  # on a GPU this would be one more synchronisation
        _check_classes(picked, num_classes)
    divisor = _divisor(denominator, labelled, weight)
    return Kept(_place(kept, like), _place(picked, like), _place(weight.flatten()[kept], like), divisor)


def _weighted_loss(
    logits: Tensor, target: Tensor, weight: Tensor, denominator: str | float | Tensor, label_smoothing: float
) -> Tensor:
    """logits [..., C]; target [...] integer, or [..., C] probabilities; weight [...] fp32 on the target's device."""
    kept = keep(target, weight, denominator, logits.shape[-1], logits)
    rows = logits.reshape(-1, logits.shape[-1]).index_select(0, kept.index)
    nll = F.cross_entropy(rows.float(), kept.target, reduction="none", label_smoothing=label_smoothing)
    return (kept.weight * nll).sum() / kept.divisor


def _place(entries: Tensor, like: Tensor) -> Tensor:
    if entries.is_cpu and like.is_cuda:
        entries = entries.pin_memory()  # from pageable memory the copy would wait for its staging
    return entries.to(like.device, non_blocking=entries.is_cpu)  # towards the CPU it would not be safe


def _check_classes(target: Tensor, num_classes: int) -> None:
    outside = (target < 0) | (target >= num_classes)
    if bool(outside.any()):
        raise ValueError(
            f"label {int(target[outside][0])} is outside the {num_classes} classes of the logits "
            f"({int(outside.sum())} such); what is to be ignored is {_IGNORED}"
        )


def _divisor(denominator: str | float | Tensor, labelled: Tensor, weight: Tensor) -> Tensor:
    """The denominator as a 0-d fp32 tensor above 0; `labelled` and `weight` are [B] or [B, T]."""
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator has shape {list(denominator.shape)}; give one number, a 0-d tensor")
        value = denominator.detach().reshape(()).float()
    elif denominator == "tokens":
        value = labelled.sum().float()
    elif denominator == "samples":
        value = labelled.flatten(1).any(dim=1).sum().float() if labelled.ndim > 1 else labelled.sum().float()
    elif denominator == "weights":
        value = torch.where(labelled, weight, 0.0).sum()
    elif isinstance(denominator, str):
        raise ValueError(f"denominator {denominator!r}; give 'tokens', 'samples', 'weights', a number or a 0-d tensor")
    else:
        value = torch.tensor(float(denominator))
    return value.clamp(min=torch.finfo(torch.float32).tiny)
