"""FLOW in TRL's `SFTTrainer`, whose fused head gives log-probabilities in the place of logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.sft_trainer import SFTTrainer

from flowstream.integrations.step_loss import loss_scale
from flowstream.integrations.task import weighted_loss
from flowstream.integrations.transformers import FlowTrainerMixin
from flowstream.losses import next_tokens


@dataclass(frozen=True)
class LogProbsLoss:
    """From the log-probabilities of the labels, beside everything that TRL counts.

    TRL forms its loss from them, unweighted, with metrics and a router's loss; what the weights change in it is added:
    Σ (w - 1)·loss_t / N. Under label smoothing TRL reads logits, and so does this.
    """

    trainer: Any

    def __call__(
        self, own: Callable[..., Any], model: nn.Module, inputs: dict[str, Any], weight: Tensor, num_items: Any
    ) -> tuple[Tensor, Any]:
        seen: list[Any] = []

        def forward(**given: Any) -> Any:
            outputs = model(**given)
            if not seen:  # the first is the one that is trained on
                self._check(outputs, "log_probs" if given.get("fused_lm_head") else "logits")
            seen.append(outputs)
            return outputs

        trainer, labels = self.trainer, inputs["labels"]
        loss: Tensor = own(forward, inputs, num_items_in_batch=num_items)
        outputs, scale = seen[0], loss_scale(trainer, num_items)
        if getattr(outputs, "log_probs", None) is not None:
            weights = next_tokens(labels, weight)[1][:, :-1]
            return loss + scale * _added_by_weights(outputs, weights, num_items, trainer.args.loss_type), outputs
        smoothing = trainer.args.label_smoothing_factor
        smoothed = weighted_loss(
            "causal language model", outputs, labels, weight, denominator=num_items, label_smoothing=smoothing
        )
        return scale * smoothed, outputs

    def _check(self, outputs: Any, name: str) -> None:
        if getattr(outputs, name, None) is None:
            shown = ", ".join(outputs.keys()) if isinstance(outputs, dict) else type(outputs).__name__
            raise ValueError(
                f"the model of {type(self.trainer).__name__} shows no {name} of its labels (only {shown}), from which "
                "the loss of each sample would be weighted: leave its forward as SFTTrainer has made it, or take "
                'mode="resample", which needs no weights'
            )


def _added_by_weights(outputs: Any, weights: Tensor, num_items: Any, loss_type: str) -> Tensor:
    """Σ (w - 1)·loss_t / N over the labels of the batch; `weights` [B, T-1] stand where a label is predicted."""
    log_probs: Tensor = outputs.log_probs
    if log_probs.shape != weights.shape:
        raise ValueError(
            f"the model gives log-probabilities of shape {list(log_probs.shape)} for weights of {list(weights.shape)}: "
            "prompt tuning lengthens the rows, sequence parallelism cuts them. Take LoRA, and whole rows, or "
            'mode="resample", which needs no weights'
        )
    losses = -log_probs
    if loss_type == "dft":
        losses = losses * log_probs.exp().detach()
    number = outputs.label_mask.sum() if num_items is None else torch.as_tensor(num_items)
    return ((weights - 1) * losses).sum() / number.clamp(min=1)


class FlowSFTTrainer(FlowTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer` with `flow=FlowConfig(…)`: see `FlowTrainerMixin`.

    Padded batches have a weight a row; packed and padding-free ones one a document, at all its tokens.
    """
