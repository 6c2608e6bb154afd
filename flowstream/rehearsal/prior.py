"""The prior data as the frozen model sees them: asked once, by all ranks together, and kept."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from flowstream.batch import num_rows
from flowstream.distributed.meetings import Meetings
from flowstream.distributed.rank_error import RankError
from flowstream.rehearsal.asking import ask
from flowstream.rehearsal.bins import Bins, partition
from flowstream.rehearsal.kept import Columns, path_of, read, write
from flowstream.rehearsal.spec import Rehearsal

_logger = logging.getLogger("flowstream")


_T = TypeVar("_T")


class _Failure(str):
    """Why a rank has no part."""


@dataclass(frozen=True, eq=False)
class Prior:
    """What is known of each prior sample, alike on all ranks."""

    bins: Bins
    width: NDArray[np.int32]
    """[N] padded tokens of the sample in a batch of its own; 1 for what is no sequence."""
    loss: NDArray[np.float32]
    """[N] nats; NaN where no loss was taken."""
    was_correct: NDArray[np.bool_]
    """[N]"""
    packs: bool
    """Whether the collate function puts samples into one row."""

    def cost(self, samples: Sequence[int]) -> int:
        """What a batch of these samples makes a model read: rows x padded width."""
        widths = self.width[list(samples)].tolist()
        return sum(widths) if self.packs else max(widths, default=0) * len(widths)

    def expected_cost(self, room: float) -> float:
        """What a batch costs where a loader's takes `room`: of samples as wide as each other, all that fit, or one.

        0 without room.
        """
        if not room > 0:
            return 0.0
        width = np.maximum(self.width, 1)
        num = np.maximum(room / width if self.packs else math.ceil(room) // width, 1)
        return float(width.sum() / (1 / num).sum())


def prepared(rehearsal: Rehearsal, meetings: Meetings) -> Prior:
    """The prior data, asked now unless they were before: a collective of all ranks.

    Raises:
        ValueError: samples that cannot be rehearsed, or ranks with different prior data.
        RankError: another rank has failed.
    """
    found: Prior | None = rehearsal.measured.get("prior")
    if found is None if not meetings.are_several else min(meetings.lengths(int(found is not None))) == 0:
        packs = _parts(meetings, lambda: _packs(rehearsal))[meetings.world.rank]
        found = _of(rehearsal, _measured(rehearsal, meetings), packs)
    assert found is not None
    if meetings.are_several:
        told = meetings.lengths(int(hashlib.blake2b(found.bins.fingerprint.encode(), digest_size=7).hexdigest(), 16))
        if len(set(told)) > 1:
            raise ValueError(
                "the ranks' prior data differ, or what they know of them: all ranks must rehearse the same data set, "
                "in the same order, with the same cache"
            )
    rehearsal.measured["prior"] = found
    return found


def _of(rehearsal: Rehearsal, columns: Columns, packs: bool) -> Prior:
    num = len(rehearsal.prior)
    is_random = rehearsal.strategy == "random"
    labels = None if is_random or rehearsal.label is None else columns["label"].tolist()
    bins = partition(columns["loss"], labels, 1 if is_random else rehearsal.bins, num)
    if not is_random and not columns["was_correct"].any():
        _logger.warning(
            "the prior model gets none of the %d prior samples right (criterion %s): nothing can be damaged, and all "
            "bins are drawn alike. Try another criterion or threshold",
            num,
            rehearsal.measure,
        )
    return Prior(bins, columns["width"], columns["loss"], columns["was_correct"], packs)


def _packs(rehearsal: Rehearsal) -> bool:
    num = min(2, len(rehearsal.prior))
    batch = rehearsal.collate_fn([rehearsal.prior[i] for i in range(num)])
    return num_rows(batch) == 1 < num


def _measured(rehearsal: Rehearsal, meetings: Meetings) -> Columns:
    """What was found on the disk by any rank, or all ranks' shares; and from now on it is on the disk."""
    path = _parts(meetings, lambda: path_of(rehearsal))[meetings.world.rank]
    stored = read(path)
    holders = meetings.lengths(int(stored is not None)) if meetings.are_several else [int(stored is not None)]
    if not any(holders) and rehearsal.strategy == "mix-cd" and meetings.world.speaks:
        _logger.info("asking the prior model about %d prior samples, once", len(rehearsal.prior))
    if any(holders):
        columns = meetings.from_rank(holders.index(1), stored) if meetings.are_several else stored
    elif not meetings.are_several:
        columns = ask(rehearsal, range(len(rehearsal.prior)), meetings)
    else:
        columns = _shared(rehearsal, meetings)
    assert columns is not None
    if stored is None and path is not None and meetings.world.local_rank == 0:
        write(path, columns)
    return columns


def _shared(rehearsal: Rehearsal, meetings: Meetings) -> Columns:
    """Each rank asks for its share."""
    world, num = meetings.world, len(rehearsal.prior)
    parts = _parts(meetings, lambda: ask(rehearsal, list(world.shard(range(num))), meetings))
    columns: Columns = {}
    for name in parts[0]:
        # Of the widest type: labels are strings of different lengths.
        columns[name] = np.empty(num, dtype=np.result_type(*(part[name].dtype for part in parts)))
        for rank, part in enumerate(parts):
            columns[name][rank :: world.world_size] = part[name]
    return columns


def _parts(meetings: Meetings, make: Callable[[], _T]) -> list[_T]:
    """What each rank makes. Where one fails all do, since they wait for its part."""
    if not meetings.are_several:
        return [make()]
    own: _T | _Failure
    failure: Exception | None = None
    try:
        own = make()
    except Exception as error:
        own, failure = _Failure(f"{type(error).__name__}: {error}"), error
    parts: list[_T] = []
    for rank in range(meetings.world.world_size):
        part = meetings.from_rank(rank, own)
        if isinstance(part, _Failure) and failure is None:
            failure = RankError(f"rank {rank} cannot prepare its share of the prior data: {part}", (rank,))
        parts.append(part)
    if failure is not None:
        raise failure
    return parts
