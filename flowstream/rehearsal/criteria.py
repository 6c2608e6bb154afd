"""When a model's output is right: one answer a sample, the same for the prior model and the tuned one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

IGNORED = -100
Criterion = Literal["token_accuracy", "exact_match", "class"]


@dataclass(frozen=True)
class Judge:
    """Owns the criterion."""

    criterion: Criterion | Callable[[Tensor, Tensor], Tensor]
    threshold: float = 0.5
    shifts: bool = True
    """Whether the label at t is predicted at t - 1, as a causal language model does."""

    def right(self, logits: Tensor, labels: Tensor, owner: Tensor | None = None, num: int | None = None) -> Tensor:
        """[S] bool, on the CPU: which samples are right. Without a label, none is; of logits that are NaN, none.

        Args:
            logits: [B, T, V], or of a classifier [B, C].
            labels: [B, T]; of a classifier classes [B] or distributions [B, C].
            owner: of packed rows [B, T] int64: the sample that each position belongs to, from 0, or -1.
            num: S, of packed rows.

        Raises:
            ValueError: shapes that do not go together.
        """
        with torch.no_grad():
            if callable(self.criterion):
                return self._asked(self.criterion, logits, labels, owner)
            if self.criterion == "class":
                return _classes(logits, labels)
            hits, counts = self._tokens(logits, labels.to(logits.device), owner, num)
        wanted = 1.0 if self.criterion == "exact_match" else self.threshold
        # In whole tokens: a threshold of .7 of ten is seven, whatever .7 x 10 is in floating point.
        return (counts > 0) & (hits >= wanted * counts - 1e-9)

    def _asked(
        self, criterion: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor, owner: Tensor | None
    ) -> Tensor:
        if owner is not None:
            raise ValueError("a criterion of your own judges rows, and these are packed: choose 'token_accuracy'")
        right = torch.as_tensor(criterion(logits, labels)).detach().cpu()
        if right.shape != (len(labels),):
            raise ValueError(f"the criterion gave {list(right.shape)} for {len(labels)} rows: give one bool a row")
        return right.bool()

    def _tokens(self, logits: Tensor, labels: Tensor, owner: Tensor | None, num: int | None) -> tuple[Tensor, Tensor]:
        """[S] int64 each: labelled tokens that are the likeliest ones, and labelled tokens."""
        if logits.ndim != 3 or logits.shape[:2] != labels.shape:
            raise ValueError(
                f"logits have shape {list(logits.shape)} beside labels {list(labels.shape)}: {self.criterion!r} takes "
                "[B, T, V] and [B, T]; for a classifier choose criterion='class'"
            )
        if owner is None:
            owner, num = torch.arange(len(labels))[:, None].expand(labels.shape), len(labels)
        owner = owner.to(labels.device)
        if self.shifts:
            is_inside = owner[:, 1:] == owner[:, :-1]  # nothing predicts the first token of a document
            logits, labels, owner = logits[:, :-1], labels[:, 1:], owner[:, 1:]
        else:
            is_inside = torch.ones_like(owner, dtype=torch.bool)
        counted = (labels != IGNORED) & (owner >= 0) & is_inside
        likeliest = logits.max(-1)
        hit = counted & (likeliest.indices == labels) & ~likeliest.values.isnan()
        both = torch.stack([hit.flatten(), counted.flatten()]).cpu()
        at = owner.flatten().clamp(min=0).cpu()
        assert num is not None
        sums = torch.zeros(2, num, dtype=torch.int64).index_add_(1, at, both.long())
        return sums[0], sums[1]


def _classes(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.ndim != 2 or labels.shape not in (logits.shape[:1], logits.shape):
        raise ValueError(
            f"logits have shape {list(logits.shape)} beside labels {list(labels.shape)}: 'class' takes [B, C] and "
            "classes [B] or distributions [B, C]; for a language model choose criterion='token_accuracy'"
        )
    wanted = labels if labels.ndim == 1 else labels.argmax(-1)
    likeliest = logits.detach().max(-1)
    return (likeliest.indices.cpu() == wanted.cpu()) & ~likeliest.values.isnan().cpu()
