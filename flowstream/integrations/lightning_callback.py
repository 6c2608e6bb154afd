"""What keeps a stream in a Lightning Trainer: its loader, its state in checkpoints, and the check of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from flowstream.elastic import merge_states
from flowstream.guard import check_weights_used
from flowstream.integrations.lightning_loader import FlowLoader
from flowstream.stream import FlowStream

_KEY = "flowstream"
"""Of the states of all ranks in a checkpoint."""
_WEIGHT = "flow_weight"


class FlowCallback(Callback):
    """A stream in a Trainer, for any LightningModule: give `callback.loader` to `trainer.fit`.

    Each checkpoint has the stream's state of every rank, at the batch that was trained on last, however many Lightning
    has fetched, and `ckpt_path` goes on with the same samples and weights; on another number of ranks as
    `fs.merge_states` can. What `FlowStream.metrics` tells is logged every `log_every_n_steps`. The first step checks
    that the loss changes with the weights.

    Args:
        stream: or a function that builds it, which is called once Lightning has started torch.distributed: needed
            where several ranks train, each on its part of the data. Lightning cannot split what a stream reads:
            give the loader a sampler (`fs.ElasticDistributedSampler`), or `fs.split_by_rank`.
        check_weights: whether the first step is checked (`fs.check_weights_used`): `training_step` is then called twice
            more. Not under manual optimization.

    Raises:
        ValueError: in `trainer.fit`: a stream that does not fit the Trainer; weights that are not used; a checkpoint
            without a stream's state, or what `FlowStream.load_state_dict` refuses.
    """

    def __init__(self, stream: FlowStream | Callable[[], FlowStream], *, check_weights: bool = True) -> None:
        self.loader = FlowLoader()
        """What `trainer.fit` trains on."""
        self._make = stream
        self._to_check = check_weights
        self._was_alone = not _is_distributed()
        if isinstance(stream, FlowStream):
            self.loader.begin(stream)

    @property
    def stream(self) -> FlowStream:
        """The stream, once it is built."""
        return self.loader.stream

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build the stream, and see that it fits."""
        if stage != "fit":
            return
        if not isinstance(self._make, FlowStream):
            if not self.loader.has_begun:
                self.loader.begin(self._make())
        elif self._was_alone and trainer.world_size > 1:
            raise ValueError(
                f"the stream was built before Lightning started its {trainer.world_size} ranks, and knows of one: "
                "give a function that builds it, FlowCallback(lambda: fs.FlowStream(…))"
            )
        settings, accumulate = self.stream.settings, trainer.accumulate_grad_batches
        if "denominator" in settings.include and settings.accumulate != accumulate:
            raise ValueError(
                f"the Trainer has accumulate_grad_batches={accumulate}, and flow_denominator counts the labels of "
                f"{settings.accumulate}: build the stream with accumulate={accumulate}"
            )
        self.loader.has_callback = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that it is the stream that is trained on, and where Lightning goes on."""
        loaders = CombinedLoader(trainer.train_dataloader).flattened
        if not any(loader is self.loader for loader in loaders):
            found = ", ".join(type(loader).__name__ for loader in loaders)
            raise ValueError(f"trainer.fit was given {found}: give it the loader of the FlowCallback (callback.loader)")
        _begin_next_epoch(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """`ValueError` unless the loss of the first batch changes with its weights."""
        is_weighted = self.stream.settings.sampler is None
        if not (self._to_check and is_weighted and pl_module.automatic_optimization):
            return  # a step of manual optimization cannot be tried

        takes_number = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)

        def loss_of(batch: Any) -> Tensor:
            output: Any = trainer.strategy.training_step(batch, *([batch_idx] if takes_number else []))
            if output is None:  # which Lightning skips
                return torch.zeros(())
            loss: Tensor = output["loss"] if isinstance(output, dict) else output
            return loss

        with _unlogged(pl_module):
            was_checked = check_weights_used(
                loss_of,
                batch,
                key=_key_of_weights(self.stream, batch),
                model=pl_module,
                name=f"{type(pl_module).__name__}.training_step",
            )
        # Every rank runs as many forwards as the others, so one whose first batch cannot tell does not try again.
        self._to_check = not was_checked and trainer.world_size == 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and log."""
        self.loader.num_trained += 1
        if trainer.is_last_batch:
            self.loader.end()
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            metrics = self.stream.metrics()
            pl_module.log_dict({name: value for name, value in metrics.items() if math.isfinite(value)})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a hook of the module has skipped of the epoch is over, too."""
        if trainer.is_last_batch:
            self.loader.end()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning calls it on all ranks, and rank 0 writes."""
        if not self.loader.has_begun:
            return
        states = [self.loader.state()]
        if trainer.world_size > 1:
            own, states = states[0], [{}] * trainer.world_size
            torch.distributed.all_gather_object(states, own)
        checkpoint[_KEY] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Each rank takes up its own; what is only validated or tested trains on no data."""
        if not self.loader.has_begun or trainer.state.fn is not TrainerFn.FITTING:
            return
        states = checkpoint.get(_KEY)
        if states is None:
            raise ValueError(
                "the checkpoint has no state of flowstream: it was saved without a FlowCallback. To begin the data "
                "anew, with the model from there, load its state_dict into the module and give fit no ckpt_path"
            )
        if len(states) == trainer.world_size:
            own = states[trainer.global_rank]
        else:  # peers of a rank that read the same batches have the same state
            by_rank = {state["rank"]: state for state in states}
            own = merge_states([by_rank[rank] for rank in sorted(by_rank)])
        self.loader.load(own)


def _begin_next_epoch(trainer: Trainer) -> None:
    """Where a checkpoint was saved at the end of an epoch, let the next one begin, and numbers of batches with it.

    Lightning 2.6 does so by itself except for two cases, in which it counts on, and accumulates over other batches.
    """
    fit, progress = trainer.fit_loop, trainer.fit_loop.epoch_loop.batch_progress
    if not progress.is_last_batch:
        return
    if fit.restarted_on_epoch_end:  # saved in on_train_epoch_end, with max_steps
        fit.epoch_progress.increment_completed()
        fit.reset_restart_stage()
        progress.reset_on_run()
    elif progress.current.completed == progress.current.ready - 1 and trainer.num_training_batches == math.inf:
        # Saved in on_train_batch_end: Lightning counts that batch as soon as it goes on.
        progress.reset_on_run()
        progress.current.completed = -1


def _key_of_weights(stream: FlowStream, batch: Any) -> str | int:
    """Where `attach` has put the weights."""
    settings = stream.settings
    if settings.attach == "pair":
        return 1
    if isinstance(batch, tuple | list) and not hasattr(batch, "_fields"):
        return len(batch) - 1 - len(set(settings.include) - {"weight"})
    return _WEIGHT


@contextmanager
def _unlogged(module: LightningModule) -> Iterator[None]:
    """What a step logs while it is only tried is not logged."""
    silenced = {name: lambda *args, **kwargs: None for name in ("log", "log_dict")}
    vars(module).update(silenced)
    try:
        yield
    finally:
        for name in silenced:
            vars(module).pop(name)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
