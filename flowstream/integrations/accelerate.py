"""FLOW in one's own loop under accelerate: the loader is prepared first, then wrapped, and saved with `save_state`."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from weakref import WeakSet

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, IterableDataset

from flowstream.checkpoint import load_state, save_state
from flowstream.elastic_sampler import ElasticDistributedSampler
from flowstream.integrations.stream_loader import StreamLoader
from flowstream.scoring.base import Scorer
from flowstream.stream import FlowStream

__all__ = ["prepare"]

_logger = logging.getLogger("flowstream")

_SAVING: WeakSet[Accelerator] = WeakSet()
"""Those that save and load their streams."""


def prepare(
    accelerator: Accelerator, loader: Iterable[Any], scorer: Scorer, *, is_split: bool | None = None, **options: Any
) -> StreamLoader:
    """A stream over a loader, in the place of what `accelerator.prepare` would make of it.

    >>> model, optimizer = accelerator.prepare(model, optimizer)  # doctest: +SKIP
    >>> loader = prepare(accelerator, loader, scorer, include=("denominator",))  # doctest: +SKIP
    >>> for batch in loader:  # doctest: +SKIP
    ...     labels, weight, num = (batch.pop(key) for key in ("labels", "flow_weight", "flow_denominator"))
    ...     with accelerator.accumulate(model):
    ...         loss = weighted_lm_loss(model(**batch).logits, labels, weight, denominator=num)
    ...         accelerator.backward(loss * accelerator.gradient_accumulation_steps)
    ...         optimizer.step()
    ...         optimizer.zero_grad()

    Batches wait on the CPU, where they are read for scoring, and come on the accelerator's device. The optimizer steps
    after every `gradient_accumulation_steps` batches and at the end of an epoch, however far the stream has read ahead.
    `flow_denominator` is that of the whole step, and `accelerator.backward` divides once more: multiply, as above, and
    the step's gradient is that of one large batch over all its micro-batches and ranks.

    `accelerator.save_state` and `load_state` have the stream of every rank in them, in `flowstream_0` for the first
    that was prepared. A resumed loader goes on with the same samples and weights. Save after a step of the optimizer:
    what was accumulated of a step is in no checkpoint.

    Args:
        loader: a `DataLoader`, which is prepared here, and so split over the ranks; one that accelerate has prepared;
            or any other iterable of batches (`wds.WebLoader`, …), of which each rank has its own part.
        scorer: as in `FlowStream`: build it before a checkpoint is loaded.
        is_split: whether each rank's `DataLoader` reads a part of its own already, and is only wrapped. By default that
            is found out for a distributed sampler and for `fs.split_by_rank` of a Hugging Face `IterableDataset`.
        options: those of `FlowStream`; `accumulate` is by default the accelerator's.

    Returns:
        what is iterated over; its `stream` has `metrics()`, `epoch` and the rest of `FlowStream`.

    Raises:
        ValueError: a loader that pulls on one rank only, or is a stream already; what `FlowStream` raises.
    """
    _refuse(accelerator, loader, options)
    inner = loader
    if isinstance(loader, DataLoader) and not _is_taken_as_it_is(loader, is_split):
        _refuse_whole_batches(accelerator, loader)
        inner = accelerator.prepare_data_loader(loader, device_placement=False)
    # The inner loader is the stream's to save and load: accelerate would tell how far it was read ahead.
    accelerator._dataloaders = [one for one in accelerator._dataloaders if one is not inner]
    options.setdefault("accumulate", accelerator.gradient_accumulation_steps)
    stream = FlowStream(inner, scorer, **options)
    prepared = StreamLoader(stream, inner, place=_placing(accelerator))
    accelerator._dataloaders.append(prepared)
    if accelerator not in _SAVING:
        accelerator.register_save_state_pre_hook(functools.partial(_save, accelerator))
        accelerator.register_load_state_pre_hook(functools.partial(_load, accelerator))
        _SAVING.add(accelerator)
    return prepared


def _refuse(accelerator: Accelerator, loader: Any, options: dict[str, Any]) -> None:
    if isinstance(loader, FlowStream | StreamLoader) or isinstance(
        getattr(loader, "dataset", None), FlowStream | StreamLoader
    ):
        raise ValueError(f"the loader ({type(loader).__name__}) is a stream already: give prepare the loader inside it")
    if accelerator.dispatch_batches:
        raise ValueError(
            "dispatch_batches=True makes rank 0 pull for all, and the others would wait for it in the stream's "
            "meetings: leave it out of the DataLoaderConfiguration; where only one rank can read, let each read all "
            "and keep its part (fs.split_by_rank, fs.webdataset_splitters)"
        )
    if "denominator" in options.get("include", ()) and not accelerator.gradient_state.sync_with_dataloader:
        raise ValueError(
            "sync_with_dataloader=False lets an optimizer step go on into the next epoch, and flow_denominator is that "
            "of a step within one: leave sync_with_dataloader=True in the GradientAccumulationPlugin"
        )


def _refuse_whole_batches(accelerator: Accelerator, loader: DataLoader[Any]) -> None:
    """Raise for what accelerate would fail to split only when it is iterated over."""
    if accelerator.num_processes == 1 or loader.batch_size is not None or loader.batch_sampler is not None:
        return
    can_shard = getattr(loader.dataset, "n_shards", 0) >= accelerator.num_processes  # Hugging Face's can
    if not can_shard and isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"the loader's data set ({type(loader.dataset).__name__}) gives whole batches (batch_size=None), which "
            "accelerate cannot split over the ranks: let each rank read its own part (fs.webdataset_splitters, "
            "fs.split_by_rank), and say so with is_split=True"
        )


def _is_taken_as_it_is(loader: DataLoader[Any], is_split: bool | None) -> bool:
    """Whether accelerate has prepared the loader, or shall not split it: each rank reads a part of its own."""
    if isinstance(loader, DataLoaderStateMixin):
        return True
    if is_split is not None:
        return is_split
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    return (
        any(isinstance(one, ElasticDistributedSampler) or getattr(one, "num_replicas", 1) > 1 for one in samplers)
        or getattr(loader.dataset, "_distributed", None) is not None  # of Hugging Face
    )


def _placing(accelerator: Accelerator) -> Callable[[Any], Any] | None:
    """What moves a batch to the accelerator's device, if it is to."""
    if not accelerator.device_placement:
        return None
    return functools.partial(send_to_device, device=accelerator.device, non_blocking=accelerator.non_blocking)


def _streams(accelerator: Accelerator, directory: str) -> list[tuple[FlowStream, Path]]:
    """Those prepared since `free_memory`, and where each is saved."""
    loaders = [one for one in accelerator._dataloaders if isinstance(one, StreamLoader)]
    return [(one.stream, Path(directory, f"flowstream_{number}")) for number, one in enumerate(loaders)]


def _save(accelerator: Accelerator, models: Any, weights: Any, directory: str | os.PathLike[str]) -> None:
    streams = _streams(accelerator, str(directory))
    if streams and not accelerator.sync_gradients and accelerator.is_main_process:
        _logger.warning(
            "%s is saved within an optimizer step, whose gradients so far are in no checkpoint: a resumed run steps "
            "without them. Save where accelerator.sync_gradients is true",
            directory,
        )
    rank, world_size = accelerator.process_index, accelerator.num_processes
    for stream, folder in streams:
        step = stream.state_dict()["num_delivered"]
        save_state(stream, folder, step=step, rank=rank, world_size=world_size, keep_last=1)


def _load(accelerator: Accelerator, models: Any, directory: str | os.PathLike[str]) -> None:
    for stream, folder in _streams(accelerator, str(directory)):
        if load_state(stream, folder, rank=accelerator.process_index, world_size=accelerator.num_processes) is None:
            raise ValueError(
                f"{directory} has no state of this stream ({folder.name}), whole on all ranks: it was saved without "
                "it, or with fewer streams. To take the model from there and begin the data anew, call "
                "accelerator.load_state before flowstream's prepare"
            )
