"""What a rank tells the others of a window, in a message of fixed size; and what all know once they have all."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from flowstream.digest import Digest
from flowstream.digest_message import MAX_VALUES
from flowstream.metrics import WeightSums

OnUneven = Literal["pad", "stop", "raise"]

MAX_STEPS = 1_790
"""Optimizer steps of a window whose label counts fit in a message."""

MERGED_CENTROIDS = 16_000
"""Of all ranks' digests in one: in small worlds the losses themselves. It never travels, and does not stay."""

_MAX_FAILURE = 400
_PLAIN = struct.Struct("<4sB??xIqqqQQd IIIIQ QQQ 7d H")
_NAMES = (
    *("phase", "has_batch", "ended", "generation", "epoch", "window", "position", "configuration", "past", "tau"),
    *("size", "num_batches", "num_rows", "num_first", "num_first_bytes"),
    *("num_seen", "num_kept", "content"),
)
_MAGIC = b"fsm1"


class Phase(IntEnum):
    """What a message is about."""

    OPENING = 1
    """An epoch begins, or goes on from a state: where, and what the first batch is like."""
    LOSSES = 2
    """A window's digest, for a window whose own losses give its τ."""
    WINDOW = 3
    """A window: all that it brings."""
    FAILURE = 4
    """This rank cannot go on."""
    REHEARSED = 5
    """A window's label counts, once it is known what is rehearsed in it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Message:
    """What one rank brings to a meeting. What its phase does not ask for stays as it is here."""

    phase: Phase
    generation: int = 0
    """How many iterators the stream has started."""
    epoch: int = 0
    window: int = 0
    position: int = 0
    """Batches of the window that were delivered before."""
    configuration: int = 0
    """Hash of what all ranks must have alike."""
    past: int = 0
    """Hash of what was learned before an opening: ranks that go on together have the same."""
    tau: float = math.nan
    """The window's τ, in nats, where it is settled: to the bit the same on all ranks."""
    has_batch: bool = False
    """Whether the rank has a batch to begin with."""
    size: int = 0
    """Batches that this rank wants a window to have."""
    num_rows: int = 0
    """Of its first batch, whose …"""
    num_first: int = 0
    """… samples, …"""
    num_first_bytes: int = 0
    """… and its bytes."""
    num_batches: int = 0
    """Batches that it can deliver of the window."""
    ended: bool = False
    """Whether it has nothing to deliver after this window."""
    num_seen: int = 0
    num_kept: int = 0
    content: int = 0
    """Hash of the window's samples in their order; 0 where it was not taken."""
    sums: WeightSums = field(default_factory=WeightSums)
    counts: tuple[int, ...] = ()
    """Labelled tokens (or samples) of each optimizer step, where denominators are asked for."""
    tallies: tuple[int, ...] = ()
    """Where prior samples are rehearsed: of each bin samples with feedback, then damaged ones; cost of the loader's
    batches, and of the rehearsed ones of the window before."""
    digest: Digest = field(default_factory=Digest)
    """Of the window's finite losses. A received one is what `Digest.to_bytes` says of it, the rank's own too."""
    failure: str = ""

    @staticmethod
    def num_bytes(max_steps: int, num_tallies: int = 0) -> int:
        """Length of `to_bytes`: 8.6 KB, and 4 bytes a step; at most 16 KB. And 8 bytes a tally."""
        return _PLAIN.size + _MAX_FAILURE + 4 * max_steps + Digest.num_bytes() + 8 * num_tallies

    def to_bytes(self, max_steps: int, max_values: int = MAX_VALUES, num_tallies: int = 0) -> bytes:
        """The message, little-endian, `max_values` in its digest. `ValueError` for more `counts` than `max_steps`."""
        if len(self.counts) > max_steps:
            raise ValueError(f"a window of {len(self.counts)} optimizer steps, but a message holds {max_steps}")
        counts: NDArray[np.uint32] = np.zeros(max_steps, dtype="<u4")
        counts[: len(self.counts)] = self.counts
        sums = self.sums.state_dict().values()
        plain = _PLAIN.pack(_MAGIC, *(getattr(self, name) for name in _NAMES), *sums, len(self.counts))
        failure = self.failure.encode()[:_MAX_FAILURE].ljust(_MAX_FAILURE, b"\0")
        tallies: NDArray[np.int64] = np.zeros(num_tallies, dtype="<i8")
        tallies[: len(self.tallies)] = self.tallies
        return plain + failure + counts.tobytes() + self.digest.to_bytes(max_values) + tallies.tobytes()

    @classmethod
    def from_bytes(cls, message: bytes, max_steps: int, num_tallies: int = 0) -> Self:
        """The message in the bytes of `to_bytes`. `ValueError` for bytes that are none."""
        if len(message) != cls.num_bytes(max_steps, num_tallies) or message[:4] != _MAGIC:
            raise ValueError(f"these {len(message)} bytes are no message of flowstream's")
        _, *values, num_counts = _PLAIN.unpack_from(message)
        named = dict(zip(_NAMES, values, strict=False))
        named["phase"] = Phase(named["phase"])
        at, end = _PLAIN.size + _MAX_FAILURE, len(message) - 8 * num_tallies
        counts = np.frombuffer(message, dtype="<u4", count=num_counts, offset=at)
        return cls(
            **named,
            sums=WeightSums(*values[len(_NAMES) :]),
            counts=tuple(counts.tolist()),
            tallies=tuple(np.frombuffer(message, dtype="<i8", offset=end).tolist()) if num_tallies else (),
            digest=Digest.from_bytes(message[at + 4 * max_steps : end]),
            failure=message[_PLAIN.size : at].rstrip(b"\0").decode(errors="replace"),
        )


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What all ranks know of a window, alike to the bit."""

    world_size: int = 1
    digest: Digest = field(default_factory=Digest)
    """Of the losses of all ranks."""
    sums: WeightSums = field(default_factory=WeightSums)
    num_seen: int = 0
    num_kept: int = 0
    counts: tuple[int, ...] = ()
    """Labelled tokens (or samples) of each optimizer step, over all ranks."""
    steps: tuple[int, ...] = ()
    """The step of each of the window's own batches, where rehearsed ones stand between them."""
    tallies: tuple[int, ...] = ()
    """Sums of the ranks' `Message.tallies`."""
    num_deliveries: int = 0
    """Batches that every rank delivers."""
    num_padded: int = 0
    """How many of those, over all ranks, have no samples."""
    last: bool = False
    """Whether the epoch ends after this window."""
    ended: tuple[int, ...] = ()
    """The ranks that have nothing to deliver after this window."""


class UnevenError(RuntimeError):
    """`on_uneven="raise"`, and the ranks do not have the same number of batches."""


def agree(messages: Sequence[Message], *, on_uneven: OnUneven, accumulate: int = 1) -> Agreed:
    """What follows from the messages of all ranks, in rank order. Pure: every rank comes to the same.

    "pad": as many batches as the rank that has most; "stop": as many as the one that has fewest, and the epoch ends
    once any rank has no more; "raise": `UnevenError` unless all have equally many.
    """
    batches = [message.num_batches for message in messages]
    fewest, most = min(batches), max(batches)
    ended = [message.ended for message in messages]
    if on_uneven == "pad":
        num, last = most, all(ended)
    elif on_uneven == "stop":
        num, last = fewest, any(is_over and own == fewest for is_over, own in zip(ended, batches, strict=True))
        if fewest < most or not last:  # an optimizer step has all its batches, on all ranks
            num -= num % accumulate
    else:
        if fewest < most:
            short = [rank for rank, num in enumerate(batches) if num < most]
            raise UnevenError(
                f"in window {messages[0].window} of epoch {messages[0].epoch} ranks {short} have "
                f"{[batches[rank] for rank in short]} batches where others have {most}: give all ranks equally many "
                '(drop_last, equal shards), or on_uneven="pad" or "stop"'
            )
        num, last = most, all(ended)
    step_counts = [0] * max(len(message.counts) for message in messages)
    for message in messages:
        for step, count in enumerate(message.counts):
            step_counts[step] += count
    return Agreed(
        world_size=len(messages),
        digest=messages[0].digest if len(messages) == 1 else merged(messages),
        sums=sum((message.sums for message in messages), WeightSums()),
        num_seen=sum(message.num_seen for message in messages),
        num_kept=sum(message.num_kept for message in messages),
        counts=tuple(step_counts),
        tallies=tuple(map(sum, zip(*(message.tallies for message in messages), strict=True))),
        num_deliveries=num,
        num_padded=sum(max(num - batches_of_rank, 0) for batches_of_rank in batches),
        last=last,
        ended=tuple(rank for rank, own in enumerate(batches) if ended[rank] and own <= max(num, fewest)),
    )


def merged(messages: Sequence[Message]) -> Digest:
    """The digest of the losses of all ranks."""
    return Digest.merged([message.digest for message in messages], MERGED_CENTROIDS)


def failed(message: Message, error: BaseException) -> Message:
    """In place of `message`: that this rank cannot go on, and why."""
    return replace(message, phase=Phase.FAILURE, failure=f"{type(error).__name__}: {error}")
