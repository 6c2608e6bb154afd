"""What a fine-tuned model has learnt and kept: its loss on the target, exact match, its loss on general text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowstream.finetune.encoding import IGNORED

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Measures:
    """Losses in nats a token; exact match as a share of the samples."""

    target_loss: float
    """Mean over all labelled tokens."""
    exact_match: float
    """Share of responses that greedy decoding would write token for token: each is the most likely one given those
    before it, which one forward pass tells."""
    retained_loss: float
    """Mean over the tokens of general text."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSplit:
    """One split to measure on, batched once: `input_ids`, `labels` [B, T], and `attention_mask` where rows differ."""

    target: Sequence[Batch]
    general: Sequence[Batch]

    @torch.no_grad()
    def measure(self, model: Any) -> Measures:
        """Losses and exact match of a model, by one pass over the split. It is left in eval mode."""
        model.eval()
        target, general = (_Sums.over(model, batches) for batches in (self.target, self.general))
        return Measures(
            target_loss=target.loss / target.num_tokens,
            exact_match=target.num_exact / target.num_samples,
            retained_loss=general.loss / general.num_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class _Sums:
    loss: float
    num_tokens: int
    num_exact: int
    num_samples: int

    @classmethod
    def over(cls, model: Any, batches: Sequence[Batch]) -> "_Sums":
        loss, num_tokens, num_exact, num_samples = 0.0, 0, 0, 0
        device = next(model.parameters()).device
        for batch in batches:
            read = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
            logits = model(**read, use_cache=False).logits[:, :-1].float()
            labels = batch["labels"][:, 1:].to(device)
            labelled = labels != IGNORED
            loss += float(F.cross_entropy(logits[labelled], labels[labelled], reduction="sum"))
            num_tokens += int(labelled.sum())
            num_exact += int(((logits.argmax(-1) == labels) | ~labelled).all(dim=1).sum())
            num_samples += len(labels)
        return cls(loss=loss, num_tokens=num_tokens, num_exact=num_exact, num_samples=num_samples)
