"""Distributionally robust optimisation: the worst case near the batch, on the losses of the model that is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from flowstream.companions.wrapped import check_number
from flowstream.losses import keep, next_tokens

__all__ = ["Dro"]


@dataclass(frozen=True)
class Dro:
    """KL-DRO: sup_π Σ_i π_i f_i - τ KL(π ‖ uniform) = τ log mean_i e^{f_i/τ}, with f the *current* losses.

    Its gradient weights sample i by e^{+f_i/τ} / Σ_j e^{f_j/τ}: hard samples first. That is the opposite of FLOW,
    e^{-f_i(θ*)/τ} of *frozen* losses (arXiv 2502.02797, which compares the two). A large τ gives the plain mean, a
    small one the largest loss.

        loss = fs.Dro(1.0).lm_loss(model(**batch).logits, labels)

    The value is that of the samples it is given. As the logarithm of a mean it is biased over mini-batches: small
    batches understate the worst case, and neither accumulation nor averaging over ranks makes one large batch of them.
    Over ranks the mean of their values is group DRO within each rank's batch; with `group`, the normaliser is shared.
    """

    temperature: float
    """τ, in the losses' unit (nats), above 0."""
    group: torch.distributed.ProcessGroup | None = None
    """Ranks that share the normaliser, such as `torch.distributed.group.WORLD`: the value is then that of all their
    samples, equal on each, and the *mean* of the ranks' gradients, as DDP forms it, is its gradient. Every rank calls
    it equally often; one exchange of two numbers a call."""

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, least=0.0, most=math.inf, above=True)
        if self.temperature == math.inf:
            raise ValueError("temperature is inf, which is the plain mean of the losses: give a finite number")

    def __call__(self, losses: Tensor) -> Tensor:
        """The loss of losses [B], floating, of this batch: 0-d fp32. Without any, 0 with a gradient of 0.

        >>> Dro(0.5)(torch.tensor([1.0, 2.0]))  # 0.5 · log((e² + e⁴) / 2)
        tensor(1.7169)
        """
        if losses.ndim != 1 or not losses.is_floating_point():
            raise ValueError(f"losses have shape {list(losses.shape)} and dtype {losses.dtype}; give floats [B]")
        losses = losses.float()
        if self.group is not None:
            return self._over_ranks(losses, self.group)
        if not len(losses):
            return losses.sum()
        # In fp64: a large τ multiplies the small difference of two logarithms.
        mean = torch.logsumexp(losses.double() / self.temperature, 0) - math.log(len(losses))
        return (self.temperature * mean).float()

    def lm_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of the samples' mean next-token losses; arguments as in `fs.weighted_lm_loss`. Rows without a label are
        left out.

        logits [B, T, V]; labels [B, T], -100 where ignored, not shifted. Raises ValueError as that does.
        """
        if logits.ndim != 3 or labels.shape != logits.shape[:2]:
            raise ValueError(
                f"logits have shape {list(logits.shape)} and labels {list(labels.shape)}; give [B, T, V] and [B, T]"
            )
        following, weights = next_tokens(labels, torch.ones(len(labels)))
        index, nll = _losses(logits, following, weights)
        rows = index // labels.shape[1]
        count = torch.zeros(len(labels), device=nll.device).index_add(0, rows, torch.ones_like(nll))
        sums = torch.zeros(len(labels), device=nll.device).index_add(0, rows, nll)
        labelled = count.nonzero().squeeze(1)
        return self(sums.index_select(0, labelled) / count.index_select(0, labelled))

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Of the samples' cross-entropies. logits [B, C]; target [B] integer, -100 where ignored, or probabilities
        [B, C]. Raises ValueError for shapes that do not fit and, on the CPU, for targets outside the classes.
        """
        soft = target.ndim == 2
        if logits.ndim != 2 or target.shape != logits.shape[: target.ndim] or soft != target.is_floating_point():
            raise ValueError(
                f"logits have shape {list(logits.shape)}, and target {list(target.shape)} of {target.dtype}; give "
                "logits [B, C] with class numbers [B], or with probabilities [B, C]"
            )
        return self(_losses(logits, target, torch.ones(len(target), device=target.device))[1])

    def _over_ranks(self, losses: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        own = torch.empty(2, dtype=torch.float64, device=losses.device)
        own[0] = torch.logsumexp(losses.detach().double() / self.temperature, 0) if len(losses) else -math.inf
        own[1] = len(losses)
        size = torch.distributed.get_world_size(group)
        found = [torch.empty_like(own) for _ in range(size)]
        torch.distributed.all_gather(found, own, group=group)
        normaliser, count = torch.stack(found).unbind(1)
        normaliser, count = normaliser.logsumexp(0), count.sum()
        value = torch.where(count > 0, self.temperature * (normaliser - count.log()), 0.0).float()
        weight = torch.exp(losses.detach().double() / self.temperature - normaliser).float()
        tied = size * (weight * losses).sum()
        return value + tied - tied.detach()


def _losses(logits: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of the entries with a target: their places among all, and their cross-entropy in fp32."""
    kept = keep(target, weight, 1.0, logits.shape[-1], logits)
    rows = logits.reshape(-1, logits.shape[-1]).index_select(0, kept.index)
    return kept.index, F.cross_entropy(rows.float(), kept.target, reduction="none")
