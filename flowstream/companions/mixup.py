"""Mixup and CutMix before the stream, so that what the reference scores is what training sees."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowstream.batch import content_hash, fields, is_container, moved, with_fields
from flowstream.randomness import permutation

__all__ = ["mixup"]

_LABEL_KEYS = ("labels", "label", "targets", "target")


def mixup(
    batch: Any,
    *,
    alpha: float,
    num_classes: int,
    seed: int = 0,
    generator: torch.Generator | None = None,
    cutmix: bool = False,
) -> Any:
    """A batch with each sample mixed with another of it: x̃ = λx + (1-λ)x', soft targets [B, C] likewise.

    λ ~ Beta(alpha, alpha), one a batch (Zhang et al., arXiv 1710.09412); with `cutmix`, a box of x' of the area 1-λ is
    put into x (Yun et al., arXiv 1905.04899), and λ is what is left of x. The frozen loss of FLOW is then that of the
    mixed sample under its soft target.

    Put it into the loader, before the stream: `DataLoader(…, collate_fn=lambda rows: mixup(default_collate(rows), …))`.
    With `cache_key=` a name has one loss for all its mixtures, that of the first; without, each has its own.

    Args:
        batch: `(x, labels)`, `(mapping, labels)`, or a mapping, namedtuple or dataclass with `labels`, `label`,
            `targets` or `target`. All floating arrays of B rows but the labels are mixed. Labels are classes [B] or
            distributions [B, C].
        alpha: above 0; small ones mix little.
        seed: λ, partners and box are a function of it and of the batch's content, so that a resumed loader gives the
            same mixtures. For others in each epoch of a loader that does not shuffle, add the epoch to it.
        generator: what they are drawn from instead.

    Returns the batch anew, of the same type; labels are fp32 [B, C].

    >>> x, y = mixup((torch.eye(2), torch.tensor([0, 1])), alpha=1.0, num_classes=2)
    >>> torch.allclose(x, y)
    True
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"mixup(alpha={alpha}): give a finite number above 0, such as 0.2")
    found = fields(batch) if is_container(batch) else {}
    key = 1 if 0 in found else next((name for name in _LABEL_KEYS if found.get(name) is not None), None)
    if key is None or not isinstance(found.get(key), Tensor):
        shown = "(x, labels)" if key == 1 or not found else f"one of {', '.join(_LABEL_KEYS)} as a tensor"
        raise ValueError(f"mixup got a {type(batch).__name__} of {sorted(map(str, found))}: it takes {shown}")
    soft = _soft(found[key], num_classes)
    if generator is not None:
        draw = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    else:
        draw = int(content_hash(moved(batch, torch.device("cpu"))), 16)
    others = torch.from_numpy(permutation(len(soft), (seed, draw), use="mixup"))
    drawn = np.random.default_rng((seed, draw))
    mix = _Mix(share=float(drawn.beta(alpha, alpha)), others=others, corner=drawn.random(2) if cutmix else None)
    mixed = {name: _mixed(value, mix, name) if name != key else value for name, value in found.items()}
    if not mix.num_mixed:
        raise ValueError(f"mixup found no floating tensor of {len(soft)} rows to mix in {sorted(map(str, found))}")
    return with_fields(batch, mixed | {key: soft * mix.share + soft[others.to(soft.device)] * (1 - mix.share)})


class _Mix:
    """λ, each row's partner, and for CutMix where the box lies: λ follows the box once an image was seen."""

    def __init__(self, *, share: float, others: Tensor, corner: np.ndarray[Any, Any] | None) -> None:
        self.share, self.others, self.num_mixed = share, others, 0
        self._drawn, self._corner = share, corner

    def apply(self, value: Tensor, name: object) -> Tensor:
        self.num_mixed += 1
        partner = value[self.others.to(value.device)]
        if self._corner is None:
            return torch.lerp(partner, value, self.share)
        if value.ndim < 3:
            raise ValueError(f"cutmix cuts images [B, …, H, W], and {name!r} has shape {list(value.shape)}")
        height, width = value.shape[-2:]
        tall, wide = (round(size * math.sqrt(1 - self._drawn)) for size in (height, width))
        middle = [int(at * size) for at, size in zip(self._corner, (height, width), strict=True)]
        top, bottom = max(0, middle[0] - tall // 2), min(height, middle[0] - tall // 2 + tall)
        left, right = max(0, middle[1] - wide // 2), min(width, middle[1] - wide // 2 + wide)
        cut = value.clone()
        cut[..., top:bottom, left:right] = partner[..., top:bottom, left:right]
        self.share = 1 - max(0, bottom - top) * max(0, right - left) / (height * width)
        return cut


def _mixed(value: Any, mix: _Mix, name: object) -> Any:
    """The value, mixed where it is a floating tensor with the batch's rows, or a mapping with such."""
    if is_container(value):
        return with_fields(value, {inner: _mixed(child, mix, inner) for inner, child in fields(value).items()})
    if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != len(mix.others):
        return value
    if not value.is_floating_point():
        if value.dtype == torch.uint8:
            raise ValueError(f"{name!r} is uint8, and mixtures of bytes would be rounded: turn images to floats first")
        return value
    return mix.apply(value, name)


def _soft(labels: Tensor, num_classes: int) -> Tensor:
    """Distributions [B, C], fp32."""
    if labels.is_floating_point():
        if labels.ndim != 2 or labels.shape[1] != num_classes:
            raise ValueError(
                f"soft labels of shape {list(labels.shape)}: give [B, {num_classes}], num_classes being that"
            )
        return labels.float()
    if labels.ndim != 1:
        raise ValueError(f"labels of shape {list(labels.shape)}: give classes [B], or distributions [B, {num_classes}]")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())}, and there are {num_classes} classes: give "
            f"num_classes as it is, and leave out samples without a label, which mix with nothing"
        )
    return F.one_hot(labels.long(), num_classes).float()
