"""FLOW in Lightning: a module that weights the loss, beside the callback that keeps the stream in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from flowstream.integrations.lightning_callback import FlowCallback
from flowstream.integrations.task import Task, add_decoder_inputs, router_loss, task_of, weighted_loss

__all__ = ["FlowCallback", "FlowModule"]


class FlowModule(LightningModule):
    """Fine-tunes a Hugging Face model on the batches of a stream.

    >>> flow = FlowCallback(FlowStream(loader, CausalLMScorer(model)))  # doctest: +SKIP
    >>> trainer = Trainer(max_steps=1000, callbacks=[flow])  # doctest: +SKIP
    >>> trainer.fit(FlowModule(model, lr=1e-5), flow.loader, ckpt_path="last")  # doctest: +SKIP

    Causal language models, encoder-decoders and classifiers. Labels and what flowstream has attached are taken out of
    a training batch before the forward. The loss is Σ w·nll / N, in fp32: N counts this batch's labelled tokens (of a
    classifier its samples), and Lightning averages over the micro-batches of a step, and ranks. With
    `FlowStream(accumulate=k, include=("denominator",))` N counts all that share the step, so that its gradient is that
    of one large batch. Resampled batches have weights of 1. Validation has the model's own loss. Logged: `train_loss`,
    `val_loss`.

    A LightningModule of your own needs nothing but the callback: its `training_step` finds `flow_weight` in the batch.

    Args:
        model: what is trained. Build the scorer before a fine-tuned checkpoint is loaded.
        lr: of the default optimizer, AdamW.
        optimizer: from the parameters that require a gradient to an optimizer. For schedulers, override
            `configure_optimizers`.

    Raises:
        ValueError: a model whose samples flowstream does not know how to weight.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-5,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.lr = lr
        self._optimizer = optimizer
        self._task: Task | None = None
        if type(self).loss is FlowModule.loss:
            self._task = task_of(model)

    def forward(self, **inputs: Any) -> Any:
        """The model's outputs."""
        return self.model(**inputs)

    def loss(self, batch: dict[str, Any], weight: Tensor, denominator: Tensor | None) -> Tensor:
        """The weighted loss of a training batch, 0-d: override it for another.

        `batch` has the labels, and nothing of flowstream's; `denominator` is `None` where the stream gives none.
        """
        labels = batch.pop("labels", None)
        if labels is None:
            raise ValueError(
                f"a training batch has {sorted(batch)}: the weighted loss needs labels, -100 where nothing is to be "
                "predicted. Let the collate function make them, or override loss"
            )
        task = self._task or task_of(self.model)
        add_decoder_inputs(task, self.model, batch, labels)
        outputs = self(**batch)
        loss = weighted_loss(task, outputs, labels, weight, denominator=denominator)
        return loss + router_loss(self.model, outputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The weighted loss, which Lightning divides by the number of micro-batches."""
        batch = dict(batch)
        attached = {name: batch.pop(name) for name in list(batch) if name.startswith("flow_")}
        weight, denominator = attached.get("flow_weight"), attached.get("flow_denominator")
        if weight is None:  # resampled
            weight = torch.ones(len(next(iter(batch.values()))), device=self.device)
        loss = self.loss(batch, weight, denominator)
        if denominator is not None:  # it counts the whole step: what Lightning divides by is in it
            loss = loss * self.trainer.accumulate_grad_batches
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The model's own loss."""
        loss: Tensor = self(**batch).loss
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(next(iter(batch.values()))))
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, or what `optimizer` makes."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return AdamW(parameters, lr=self.lr) if self._optimizer is None else self._optimizer(parameters)

    def on_fit_start(self) -> None:
        """From `from_pretrained` a model comes in eval mode, in which Lightning would leave it."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, FlowCallback) for callback in callbacks):
            raise ValueError(
                "the Trainer has no FlowCallback, without which checkpoints lack the stream's state, and nothing "
                "checks that weights are used: Trainer(callbacks=[flow := FlowCallback(stream)])"
            )
        self.model.train()
