"""From a window's scores to its weights: what is weighed, what is left out, and where each weight stands.

Pure: functions of (scores, τ, policy, seed).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowstream.metrics import WeightSums
from flowstream.policies import Permuted, Policy, check_weight
from flowstream.scoring.base import Level, Scores


@dataclass(frozen=True)
class Losses:
    """The losses of several batches, flat, in the stream's order: a sample each, or a labelled token each."""

    loss: Tensor
    """[N] float32, nats; as they came where not finite."""

    count: Tensor
    """[N] int64: labelled tokens of each; 0 for a sample without a label."""

    sample: Tensor
    """[N] int64: the sample that each belongs to, counted from 0."""

    sizes: list[int]
    """How many of the N belong to each batch."""

    num_empty: int
    """Samples without a label."""

    def of_first(self, num_batches: int) -> Losses:
        """Those of the first batches. Samples without a label are known at the level of samples only."""
        return self.of([i < num_batches for i in range(len(self.sizes))])[0]

    def of(self, batches: Sequence[bool]) -> tuple[Losses, Tensor]:
        """Those of some of the batches, and which of all they are: [N] bool."""
        which = torch.repeat_interleave(torch.tensor(batches, dtype=torch.bool), torch.tensor(self.sizes))
        count = self.count[which]
        sizes = [size for size, is_in in zip(self.sizes, batches, strict=True) if is_in]
        return Losses(self.loss[which], count, self.sample[which], sizes, int((count == 0).sum())), which

    @property
    def labelled(self) -> Tensor:
        """[N] bool."""
        return self.count > 0

    @property
    def usable(self) -> Tensor:
        """[N] bool: labelled, and of finite loss."""
        return self.labelled & self.loss.isfinite()


def flatten(scores: Sequence[Scores], level: Level) -> Losses:
    """What is weighed at a level, of all batches."""
    num_empty = sum(int((score.count == 0).sum()) for score in scores)
    if level == "token":
        parts = [_tokens(score) for score in scores]
        loss = _cat(parts, torch.float32)
        count = torch.ones_like(loss, dtype=torch.int64)
        first = [0, *itertools.accumulate(len(score.loss) for score in scores)]
        sample = _cat([_owners(score) + at for score, at in zip(scores, first, strict=False)], torch.int64)
    else:
        parts = [score.loss for score in scores]
        loss = _cat(parts, torch.float32)
        count = _cat([score.count for score in scores], torch.int64)
        sample = torch.arange(len(loss))
    return Losses(loss, count, sample, [len(part) for part in parts], num_empty)


def weigh(losses: Losses, tau: float | Sequence[float], policy: Policy, seed: tuple[int, ...]) -> Tensor:
    """Weights [N] float32 of `losses`: 0 where there is no label or the loss is not finite.

    `tau`: in nats, for all or one a batch; `seed`: (seed, epoch, window, rank), which only `Permuted` reads.
    """
    if isinstance(tau, float | int):
        temperature: float | Tensor = float(tau)
    else:
        temperature = torch.repeat_interleave(
            torch.tensor(tau, dtype=torch.float64), torch.tensor(losses.sizes, dtype=torch.int64)
        )
    usable = losses.usable
    safe = torch.where(usable, losses.loss, 0.0)
    weight = torch.where(usable, check_weight(policy(safe, temperature), safe), 0.0)
    return policy.permute([weight], [usable], seed)[0] if isinstance(policy, Permuted) else weight


def sum_up(losses: Losses, weight: Tensor) -> WeightSums:
    """The sums of a window's weights, and how many samples (tokens, at that level) were left out."""
    usable = losses.usable
    finite = losses.loss.isfinite() | ~losses.labelled
    sums = WeightSums.of(weight[usable].numpy(), losses.count[usable].numpy())
    nonfinite = int((~finite).sum())
    return sums + WeightSums(nonfinite=float(nonfinite), empty=float(losses.num_empty))


def place(values: Tensor, scores: Scores, level: Level) -> Tensor:
    """One batch's `values` (a sample or a labelled token each) where its loss function reads them.

    Returns [B]; or [B, T], aligned with the labels by index: for tokens, with 0 where nothing is labelled; for packed
    rows, the document's own value at all its positions, and 0 outside of documents.
    """
    if level == "token":
        assert scores.token_mask is not None
        placed = torch.zeros(scores.token_mask.shape, dtype=values.dtype)
        placed[scores.token_mask] = values
        return placed
    if scores.segment is None:
        return values
    if len(values) == 0:
        return torch.zeros(scores.segment.shape, dtype=values.dtype)
    inside = scores.segment >= 0
    return torch.where(inside, values[scores.segment.clamp(min=0)], 0)


def num_rows(scores: Scores) -> int:
    """Rows of the batch that was scored."""
    return len(scores.loss if scores.segment is None else scores.segment)


def num_labelled(scores: Scores) -> int:
    """Labelled tokens of a batch (labelled samples, for a classifier): what an unweighted mean divides by."""
    return int((scores.count if scores.row_targets is None else scores.row_targets).sum())


def _tokens(scores: Scores) -> Tensor:
    assert scores.token_loss is not None
    assert scores.token_mask is not None
    return scores.token_loss[scores.token_mask].float()


def _owners(scores: Scores) -> Tensor:
    """[N] the sample of each labelled token of a batch."""
    assert scores.token_mask is not None
    if scores.segment is not None:
        return scores.segment[scores.token_mask]
    return scores.token_mask.nonzero()[:, 0]


def _cat(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.to(dtype) for part in parts]) if parts else torch.empty(0, dtype=dtype)
