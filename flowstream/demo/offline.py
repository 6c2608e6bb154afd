"""FLOW as published: two offline passes, the exact median, weights looked up by sample. Nothing of flowstream is used.

This is the oracle that the online τ and the streamed weights are held against.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class OfflineFlow:
    """Losses and weights of the whole fine-tuning set, indexed by the number of the problem."""

    loss: Tensor
    """[num_problems], nats."""
    tau: float
    weight: Tensor
    """[num_problems], e^{-f/τ}."""

    @property
    def effective_fraction(self) -> float:
        """ESS/n of the weights: 1 where they are all alike."""
        return float(self.weight.sum() ** 2 / (self.weight**2).sum() / len(self.weight))


@torch.no_grad()
def score_offline(model: LlamaForCausalLM, batches: Iterable[dict[str, Tensor]], num_problems: int) -> OfflineFlow:
    """First pass: the mean answer-token loss of every problem. Then the median, then the weights."""
    loss = torch.full((num_problems,), torch.nan)
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["labels"][:, 1:]
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
        labelled = (labels >= 0).float()
        loss[batch["sample"]] = (nll * labelled).sum(dim=1) / labelled.sum(dim=1)
    if not loss.isfinite().all():
        raise ValueError(f"{int((~loss.isfinite()).sum())} of {num_problems} problems were not scored; read all shards")
    tau = float(loss.median())
    return OfflineFlow(loss, tau, torch.exp(-loss / tau))


@dataclass(frozen=True, kw_only=True)
class OfflineWeighted:
    """Second pass: the loader's batches, each with the weights of its samples."""

    loader: Iterable[dict[str, Tensor]]
    flow: OfflineFlow

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.loader:
            yield {**batch, "flow_weight": self.flow.weight[batch["sample"]]}
