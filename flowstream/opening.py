"""How an epoch begins: what each rank's first batch is like, and what follows from that on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flowstream.batch import num_bytes, num_rows, num_samples
from flowstream.distributed.meetings import Meetings
from flowstream.distributed.message import Message, UnevenError
from flowstream.distributed.rank_error import RankError
from flowstream.filling import Filling
from flowstream.padding_batches import from_portable, portable
from flowstream.read_ahead import ReadAhead
from flowstream.settings import Settings, window_size

_MAX_EMPTY = 32
"""Batches without a row that are passed over in search of the loader's batch size."""


def first_batch(reader: ReadAhead, settings: Settings, place: Message, where: str) -> Message:
    """What this rank tells of its first batch, which is pulled into the queue."""
    if not reader.num_queued and not reader.pull():
        reader.reraise(where)
        return place
    while not num_rows(reader.peek(-1)) and reader.num_queued < _MAX_EMPTY and reader.pull():
        pass
    first = reader.peek(-1)
    num, size = num_samples(first), num_bytes(first)
    return replace(
        place,
        has_batch=True,
        size=window_size(settings, num, size),
        num_rows=num_rows(first),
        num_first=num,
        num_first_bytes=size,
    )


def dry_ranks(opened: Sequence[Message]) -> tuple[int, ...]:
    """The ranks that have no batch."""
    return tuple(rank for rank, message in enumerate(opened) if not message.has_batch)


def is_over(opened: Sequence[Message], settings: Settings) -> bool:
    """Whether the epoch is over before it begins. `UnevenError` where `on_uneven="raise"` forbids to go on."""
    dry = dry_ranks(opened)
    if dry and settings.when_uneven == "raise" and len(dry) < len(opened):
        raise UnevenError(f"ranks {list(dry)} have no batch at all in epoch {opened[0].epoch}, others have")
    return len(dry) == len(opened) or (bool(dry) and settings.when_uneven == "stop")


def supply(opened: Sequence[Message], settings: Settings, meetings: Meetings, reader: ReadAhead, to: Filling) -> None:
    """Give ranks without a batch one to make batches of weight 0 from: the next of the first rank that has one."""
    dry = dry_ranks(opened)
    if len(dry) in (0, len(opened)) or settings.when_uneven != "pad":
        return
    donor = next(rank for rank in range(len(opened)) if rank not in dry)
    own = meetings.world.rank
    sent: bytes | Exception | None = None
    if own == donor:
        try:
            sent = portable(reader.peek() if reader.num_queued else to.model)
        except Exception as error:
            sent = error
    told = str(sent) if isinstance(sent, Exception) else sent
    received = meetings.from_rank(donor, told)
    if isinstance(sent, Exception):
        raise sent
    if isinstance(received, str):
        raise RankError(
            f"rank {donor} cannot lend ranks {list(dry)} a batch, of which they have none: {received}", (donor,)
        )
    if own in dry:
        to.remember(from_portable(received))
