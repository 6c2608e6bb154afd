"""The weighted loss of a training step, formed where a Hugging Face trainer would form its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import Trainer

from flowstream.integrations.task import Task, add_decoder_inputs, router_loss, task_of, weighted_loss

_RESAMPLE = 'mode="resample" needs no weights'


class StepLoss(Protocol):
    """(own, model, inputs, weight, num_items) → (loss, the model's outputs).

    `own` is the trainer's `compute_loss`; `inputs` still have the labels, no more the weight; `num_items` are the
    labels of all batches that share the step, or `None` where the trainer does not count them.
    """

    def __call__(
        self, own: Callable[..., Any], model: nn.Module, inputs: dict[str, Any], weight: Tensor, num_items: Any
    ) -> tuple[Tensor, Any]: ...


def step_loss_of(trainer: Any, before: type) -> StepLoss:
    """How the samples of this trainer's batches are weighted; `before` is the class that overrides its loss.

    Raises:
        ValueError: a trainer that forms a loss of its own, or is given one, which never sees the weights.
    """
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func never sees the batch, nor its weights: override compute_loss in a subclass, taking "
            f'"flow_weight" out of the inputs there, or leave it out ({_RESAMPLE})'
        )
    kinds = type(trainer).__mro__
    owner = next(kind for kind in kinds[kinds.index(before) + 1 :] if "compute_loss" in vars(kind))
    if owner is Trainer:
        return LogitsLoss(trainer, task_of(trainer.model))
    if owner.__module__ == "trl.trainer.sft_trainer":
        from flowstream.integrations.trl import LogProbsLoss

        return LogProbsLoss(trainer)
    raise ValueError(
        f"{owner.__name__} forms a loss of its own, in which flowstream does not know the samples: override "
        f'compute_loss in a subclass before it, taking "flow_weight" out of the inputs there, or take another mode '
        f"({_RESAMPLE})"
    )


@dataclass(frozen=True)
class LogitsLoss:
    """From the model's logits. Labels are kept from the model, which would form a loss that nobody needs."""

    trainer: Any
    task: Task

    def __call__(
        self, own: Callable[..., Any], model: nn.Module, inputs: dict[str, Any], weight: Tensor, num_items: Any
    ) -> tuple[Tensor, Any]:
        trainer = self.trainer
        labels = inputs.pop("labels", None)
        if labels is None or "shift_labels" in inputs:
            found = sorted([*inputs, *(["labels"] if labels is not None else [])])
            raise ValueError(
                f"a training batch has {found}: the weighted loss needs labels, and no shift_labels. Let the collate "
                f"function make labels, -100 where nothing is to be predicted ({_RESAMPLE})"
            )
        add_decoder_inputs(self.task, trainer.model, inputs, labels)
        outputs = model(**inputs)
        loss = weighted_loss(
            self.task,
            outputs,
            labels,
            weight,
            denominator=num_items,
            label_smoothing=trainer.args.label_smoothing_factor,
        )
        if trainer.label_smoother is None:  # whose loss, in the trainer, is all there is
            loss = loss + router_loss(trainer.model, outputs)
        return loss * loss_scale(trainer, num_items), outputs


def loss_scale(trainer: Any, num_items: Any) -> int:
    """Where the labels of all ranks are the denominator: the number of ranks, over which gradients are averaged."""
    if num_items is None or not trainer.args.average_tokens_across_devices:
        return 1
    return int(trainer.accelerator.num_processes // trainer.get_tp_size())
