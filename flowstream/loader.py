"""What a stream asks of the user's loader: that it is one, how long it is, and what in it shuffles by epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import Any

from flowstream.distributed.meetings import Meetings
from flowstream.settings import Settings

_DISPATCHER = "accelerate.data_loader.DataLoaderDispatcher"


def check_loader(loader: object) -> None:
    """Raise `ValueError` for what is no loader, or what delivers on one rank only."""
    if not isinstance(loader, Iterable):
        raise ValueError(f"loader is a {type(loader).__name__}, which cannot be iterated over: give a data loader")
    if _DISPATCHER in (f"{kind.__module__}.{kind.__qualname__}" for kind in type(loader).__mro__):
        raise ValueError(
            "loader is accelerate's DataLoaderDispatcher, which pulls on rank 0 only and sends parts of its batches to "
            "the others: prepare the loader with DataLoaderConfiguration(dispatch_batches=False), or split the data "
            "over the ranks (fs.split_by_rank, fs.webdataset_splitters) and wrap the loader unprepared"
        )


def length_of(loader: object) -> int:
    """Batches an epoch. `TypeError` where the loader has no length."""
    if not isinstance(loader, Sized):
        raise TypeError(f"the loader ({type(loader).__name__}) has no length, so the stream has none")
    return len(loader)


def agreed_length(loader: object, settings: Settings, meetings: Meetings) -> int | None:
    """Batches an epoch on every rank; `None` where a rank has no length. Meets the other ranks."""
    try:
        own = length_of(loader) if settings.sampler is None else -1
    except TypeError:
        own = -1
    lengths = meetings.lengths(own)
    if min(lengths) < 0:
        return None
    return min(lengths) if settings.when_uneven == "stop" else max(lengths)


def epoch_listeners(loader: Any) -> list[Callable[[int], None]]:
    """Every `set_epoch` within reach: the loader's own, or those of its parts."""
    own = getattr(loader, "set_epoch", None)
    if callable(own):
        return [own]
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    parts.append(getattr(loader, "dataset", None))
    unique = {id(part): part for part in parts if part is not None}
    return [part.set_epoch for part in unique.values() if callable(getattr(part, "set_epoch", None))]
