"""FLOW in transformers' `Trainer`, and in trainers built on it: `class MyTrainer(FlowTrainerMixin, Trainer)`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from flowstream.checkpoint import HasState, load_state, save_state
from flowstream.guard import check_weights_used
from flowstream.integrations.config import FlowConfig
from flowstream.integrations.step_loss import StepLoss, step_loss_of
from flowstream.integrations.stream_loader import StreamLoader
from flowstream.integrations.task import scorer_of
from flowstream.scoring.base import Scorer
from flowstream.stream import FlowStream

if TYPE_CHECKING:  # what it is mixed into
    _Base = Trainer
else:
    _Base = object

_WEIGHT = "flow_weight"
_REHEARSED = "flow_rehearsed"
_BEFORE_STEP = ("training_step", "get_batch_samples", "get_train_dataloader")
"""What has a training batch in hand before `_prepare_inputs`."""
_LEAVE = "Leave them as they were, or begin the data anew: ignore_data_skip=True"


class FlowTrainerMixin(_Base):
    """Weights or resamples the training data of a Hugging Face trainer by FLOW.

    >>> class MyTrainer(FlowTrainerMixin, Trainer): ...  # doctest: +SKIP
    >>> trainer = MyTrainer(model, args, train_dataset=dataset, flow=FlowConfig(mode="weight"))  # doctest: +SKIP

    The trainer's own loader is wrapped. In weight mode weights and labels are taken out of the batch before the
    forward, and the loss is Σ w·nll / N, with N the `num_items_in_batch` of the trainer: right under accumulation, over
    ranks with `average_tokens_across_devices`, and with label smoothing, which scoring leaves out. The first step
    checks that the loss changes with the weights. In resample mode nothing but the loader changes; an epoch then has no
    length: give `max_steps`. Evaluation is left alone. A checkpoint has the stream's state of every rank, and
    `resume_from_checkpoint` goes on with the same samples and weights. What `FlowStream.metrics` tells is logged with
    the loss.

    Args:
        flow: a `FlowConfig`; all else as in the trainer.

    Raises:
        ValueError: a model or loss whose samples cannot be weighted, with the remedy; what a `FlowStream` raises.
    """

    flow_stream: FlowStream | None = None
    """The stream of the training in hand."""

    def __init__(self, *args: Any, flow: FlowConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._flow = flow or FlowConfig()
        assert self.model is not None  # or Trainer would have raised
        self._flow_scorer: Scorer | None = self._new_scorer(self.model)
        self._flow_loss: StepLoss | None = None
        if self._flow.is_weighted:
            _refuse_data_parallel(self.args)
            self._flow_loss = step_loss_of(self, FlowTrainerMixin)
        self._flow_loader: StreamLoader | None = None
        self._flow_begins = False
        self._flow_to_check = self._flow.is_weighted and self._flow.check_weights
        self._flow_has_stepped = False
        self._flow_step_began: tuple[int, dict[str, Any]] | None = None
        self._flow_rehearsed: Tensor | None = None
        self.add_callback(_Watch(self))

    # -- the reference -----------------------------------------------------------------------------

    def call_model_init(self, trial: Any = None) -> Any:
        """The trainer's; the new model, or its base, is the new reference."""
        model = super().call_model_init(trial)
        if getattr(self, "_flow_scorer", None) is not None:  # when `train` begins, not when the trainer is made
            self._flow_scorer = None  # two of them need not fit
            if self.place_model_on_device:
                model = model.to(self.args.device)
            self._flow_scorer = self._new_scorer(model)
        return model

    def _new_scorer(self, model: nn.Module) -> Scorer:
        """Before a checkpoint is loaded: the reference is what fine-tuning begins with."""
        flow = self._flow
        if flow.scorer is not None:
            return flow.scorer
        device = self.args.device
        return scorer_of(model, flow.reference, device=device, trained_adapters=flow.trained_adapters)

    # -- the loader --------------------------------------------------------------------------------

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._flow_begins = True  # the loader that is asked for next is the training's, others are a callback's
        return super()._inner_training_loop(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """The trainer's own loader, with a stream around it."""
        accelerator = self.accelerator
        # Batches wait on the CPU, where they are read for scoring; the trainer moves them when it trains on them.
        placement, accelerator.device_placement = accelerator.device_placement, False
        try:
            inner = super().get_train_dataloader()
        finally:
            accelerator.device_placement = placement
        assert self._flow_scorer is not None
        stream = self._flow.stream(inner, self._flow_scorer, accumulate=self.args.gradient_accumulation_steps)
        loader = StreamLoader(stream, inner, is_endless=_length(stream) is None)
        if self._flow_begins or not self.is_in_train:
            if self.flow_stream is not None:
                self.flow_stream.close()
            self.flow_stream, self._flow_loader, self._flow_begins = stream, loader, False
        return loader

    def num_examples(self, dataloader: Any) -> int:
        """The trainer's, of the loader within."""
        return super().num_examples(dataloader.inner if isinstance(dataloader, StreamLoader) else dataloader)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The trainer's, after a look at the stream's position: a step that is not finished begins there again."""
        if self.flow_stream is not None and getattr(self.args, "enable_jit_checkpoint", False):
            self._flow_step_began = self.state.global_step, self.flow_stream.state_dict()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    # -- the loss ----------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The trainer's, after the first step's check of the weights. What `include` has added goes no further."""
        rehearsed = inputs.get(_REHEARSED)
        inputs = {name: value for name, value in inputs.items() if name == _WEIGHT or not name.startswith("flow_")}
        self._flow_has_stepped = True
        if self._flow_to_check:
            self._check_weights(model, inputs, num_items_in_batch)
        self._flow_rehearsed = rehearsed
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted loss of a training batch; the trainer's own loss of any other."""
        is_training = self.is_in_train and model.training and torch.is_grad_enabled()
        rehearsed, self._flow_rehearsed = (self._flow_rehearsed if is_training else None), None
        if self._flow_loss is None or (_WEIGHT not in inputs and not is_training):
            if rehearsed is None:
                return super().compute_loss(
                    model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
                )
            labels = inputs.get("labels")
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        else:
            if _WEIGHT not in inputs:
                self._refuse_dropped(inputs, "_prepare_inputs", *_BEFORE_STEP)
            inputs = dict(inputs)
            weight, labels = inputs.pop(_WEIGHT), inputs.get("labels")
            loss, outputs = self._flow_loss(super().compute_loss, model, inputs, weight, num_items_in_batch)
        if rehearsed is not None:
            self._feed_back(rehearsed, outputs, labels)
        return (loss, outputs) if return_outputs else loss

    def _feed_back(self, rehearsed: Tensor, outputs: Any, labels: Tensor | None) -> None:
        """Tell the stream what the tuned model had right of what was rehearsed."""
        rehearsal = self._flow.rehearsal
        if self.flow_stream is None or rehearsal is None:
            raise ValueError(
                f"{_definer(self, 'get_train_dataloader').__name__}.get_train_dataloader gives a stream of its own, "
                "which rehearses: the trainer makes the stream itself, so give it FlowConfig(rehearsal=…)"
            )
        if rehearsal.strategy == "random" or not bool((rehearsed >= 0).any()):
            return
        logits = outputs.get("logits") if isinstance(outputs, dict) else outputs[0]
        if logits is None or labels is None:
            raise ValueError(
                f"the outputs of {type(self).__name__}'s model have no logits, or its batches no labels, which tell "
                "what of the rehearsed samples was right: take a trainer whose loss is formed from logits "
                "(FlowTrainer), or Rehearsal(…, strategy='random')"
            )
        self.flow_stream.feedback(rehearsed, logits=logits, labels=labels)

    def _check_weights(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> None:
        """`ValueError`, with who dropped them, unless the loss of the first batch changes with its weights."""
        if _WEIGHT not in inputs:
            self._refuse_dropped(inputs, *_BEFORE_STEP)
        model.train()
        prepared = self._prepare_inputs(inputs)
        if _WEIGHT not in prepared:
            self._refuse_dropped(prepared, "_prepare_inputs")
        with self.compute_loss_context_manager(), _uncounted(self):
            was_checked = check_weights_used(
                lambda batch: self.compute_loss(model, batch, num_items_in_batch=num_items_in_batch),
                prepared,
                key=_WEIGHT,
                model=model,
                name=f"{_definer(self, 'compute_loss').__name__}.compute_loss",
            )
        # Every rank runs as many forwards as the others, so one whose first batch cannot tell does not try again.
        self._flow_to_check = not was_checked and self.accelerator.num_processes == 1

    def _refuse_dropped(self, found: Any, *methods: str) -> None:
        """`ValueError` for a training batch without weights: one of these `methods` has dropped them."""
        kinds = type(self).__mro__
        own = kinds.index(FlowTrainerMixin)
        owners = [(_definer(self, method), method) for method in methods]
        # What a class behind this one overrides comes before the weights, but for `_prepare_inputs`.
        named = [f"{kind.__name__}.{method}" for kind, method in owners if kinds.index(kind) < own]
        named = named or [f"{kind.__name__}.{method}" for kind, method in owners if method == "_prepare_inputs"]
        raise ValueError(
            f"a training batch has lost its {_WEIGHT} on the way to the loss, and has only {sorted(found)}: "
            f"{' or '.join(named) or type(self).__name__} has dropped it. Let it pass {_WEIGHT} on, as it does labels; "
            'or take mode="resample", which needs no weights'
        )

    def _refuse_unproven(self) -> None:
        """`ValueError` before the first optimizer step, if a `training_step` has gone round the check."""
        if not self._flow_to_check or self._flow_has_stepped:
            return
        raise ValueError(
            f"{_definer(self, 'training_step').__name__}.training_step does not call super().training_step, where the "
            "first step proves that the loss changes with the weights: call it, or, if the loss is weighted all the "
            "same, say so with FlowConfig(check_weights=False)"
        )

    # -- checkpoints and logs ----------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.flow_stream is not None:
            step, rank, world_size = self.state.global_step, self.args.process_index, self.args.world_size
            began = self._flow_step_began
            stream: HasState = self.flow_stream
            if began is not None and began[0] == step:  # the step's batches were pulled, but not trained on
                stream = _Position(began[1])
            save_state(stream, output_dir, step=step, rank=rank, world_size=world_size)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        loader, args = self._flow_loader, self.args
        if checkpoint is None or loader is None or args.ignore_data_skip:
            return
        was, now = self.state.train_batch_size, self._train_batch_size
        if was is not None and was != now:
            raise ValueError(f"{checkpoint} was saved with batches of {was}, and they are of {now} now. {_LEAVE}")
        if load_state(loader.stream, checkpoint, rank=args.process_index, world_size=args.world_size) is None:
            raise ValueError(
                f"{checkpoint} has no state of flowstream: it was saved by another trainer, or with save_only_model. "
                "To begin the data anew, with the model from there, set ignore_data_skip=True"
            )
        step, num_delivered = self.state.global_step, loader.stream.state_dict()["num_delivered"]
        num_before, loader.num_skipped = _num_batches(step, args.gradient_accumulation_steps, _length(loader))
        if num_before != num_delivered:
            raise ValueError(
                f"{checkpoint} is of step {step}, where {num_delivered} batches had been delivered on this rank, and "
                f"now it would be {num_before}: the data, the batch size, the accumulation or the number of ranks has "
                f"changed. {_LEAVE}"
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's, with the stream's metrics beside the training loss."""
        if self.flow_stream is not None and "loss" in logs:
            logs |= {name: value for name, value in self.flow_stream.metrics().items() if math.isfinite(value)}
        super().log(logs, *args, **kwargs)


class FlowTrainer(FlowTrainerMixin, Trainer):
    """transformers' `Trainer` with `flow=FlowConfig(…)`: see `FlowTrainerMixin`."""


class _Watch(TrainerCallback):
    """Stands where a trainer has no method to override: before the optimizer steps, and at the end."""

    def __init__(self, trainer: FlowTrainerMixin) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._refuse_unproven()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Let go of the loader's workers and of what was read ahead; metrics and state can still be asked for."""
        if self._trainer.flow_stream is not None:
            self._trainer.flow_stream.close()


@dataclass(frozen=True)
class _Position:
    """A stream's position, taken before."""

    state: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        return self.state


def _refuse_data_parallel(args: Any) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"one process with {args.n_gpu} GPUs trains with DataParallel, which tears batches apart: start a process "
            "for each (torchrun --nproc-per-node, accelerate launch), or show it one (CUDA_VISIBLE_DEVICES=0)"
        )


def _length(loader: FlowStream | StreamLoader) -> int | None:
    """Batches an epoch; `None` where nobody can tell."""
    try:
        return len(loader)
    except TypeError:
        return None


def _num_batches(step: int, accumulate: int, length: int | None) -> tuple[int, int]:
    """Batches before a step: in all epochs, and in its own, of `length` batches. The last step of one may have fewer.

    >>> _num_batches(5, accumulate=4, length=11)  # an epoch of 3 steps, and 2 steps
    (19, 8)
    """
    if length is None:
        return step * accumulate, step * accumulate
    epoch, steps = divmod(step, -(-length // accumulate))
    return epoch * length + steps * accumulate, steps * accumulate


def _definer(trainer: object, method: str) -> type:
    """The class whose method is called."""
    return next(kind for kind in type(trainer).__mro__ if method in vars(kind))


@contextmanager
def _uncounted(trainer: object) -> Iterator[None]:
    """What a trainer counts for its log while it computes a loss (TRL's does) is put back."""
    counts = vars(trainer).keys() & {"_metrics", "_total_train_tokens"}
    kept = {name: copy.deepcopy(getattr(trainer, name)) for name in counts}
    try:
        yield
    finally:
        vars(trainer).update(kept)
