"""The agreement of the ranks: what each has to say goes to all, once all are there and configured alike."""

from __future__ import annotations

import itertools
import pickle
import struct
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from flowstream.distributed.gloo import Meeting
from flowstream.distributed.meeting_place import MeetingPlace
from flowstream.distributed.rank_error import Verdict
from flowstream.distributed.world import World

__all__ = ["Agreement"]


class Agreement:
    """Owns the ranks' meeting place: a gloo group of this stream's own, and the store in which each leaves word.

    Every rank builds its agreements in the same order, and takes part in every meeting. A rank that waits longer than
    `timeout`, or for one that has died or closed, gets an error that names it. In a world of one nothing is made.

    Args:
        timeout: seconds that a rank waits for the others. They may do something long in the meantime, if it is less.
        num_bytes: of every message.

    Raises:
        RankError: from every method that waits; and again from then on.
    """

    def __init__(self, world: World, *, timeout: float, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._rank, self._world_size = world.rank, world.world_size
        self._meeting: Meeting | None = None
        self._alone: bytes | None = None
        self._place: MeetingPlace | None = None
        if world.world_size > 1:
            names = tuple(
                f"rank {rank}" if rank == global_rank else f"rank {rank} (global rank {global_rank})"
                for rank, global_rank in enumerate(world.ranks)
            )
            self._place = MeetingPlace("agreement", world.ranks, world.rank, names, timeout)
            weakref.finalize(self, self._place.close)

    def shake_hands(self, configuration: Mapping[str, str], *, patience: float = 45.0) -> None:
        """Make sure, before anything is pulled, that all ranks are here and configured alike.

        Raises:
            RankError: who did not come within `patience` seconds (or `timeout`, if it is less), and why that happens;
                at once, where it is seen that a rank has died or closed.
            ValueError: on every rank, the field in which they differ, with the values and whose they are.
        """
        if self._place is not None:
            self._place.call("configuration", configuration, patience, _compare)
            self._place.join("the first next()")

    def resize(self, num_bytes: int) -> None:
        """From the next meeting on messages are so long: on all ranks."""
        self._num_bytes = num_bytes

    def note(self, place: str) -> None:
        """Leave word where this rank is, at most once a second, for the others to tell if it is missed."""
        if self._place is not None:
            self._place.note(place)

    def start(self, message: bytes, place: str) -> None:
        """Begin a meeting, without waiting for anybody. One that was not awaited is given up, though not on others.

        Args:
            message: of exactly `num_bytes`.
            place: where this rank is, for the others to tell.
        """
        if len(message) != self._num_bytes:
            raise ValueError(f"a message of {len(message)} bytes was given to an agreement on {self._num_bytes}")
        if self._place is None:
            self._alone = message
        else:
            self._meeting = self._place.gather(torch.frombuffer(bytearray(message), dtype=torch.uint8), place)

    def wait(self) -> list[bytes]:
        """The messages of all ranks, in the order of `world.ranks`, of the meeting that was started."""
        if not self.started:
            raise RuntimeError("no meeting was started")
        meeting, message = self._meeting, self._alone
        self._meeting = self._alone = None
        if self._place is None or meeting is None:
            assert message is not None
            return [message]
        return [tensor.numpy().tobytes() for tensor in self._place.wait(meeting)]

    @property
    def started(self) -> bool:
        """Whether a meeting was started that nobody has waited for."""
        return self._meeting is not None or self._alone is not None

    def gather(self, value: int, *, notice: float = 45.0) -> list[int]:
        """The values of all ranks, in the order of `world.ranks`. Waits for them.

        The first time that may take long, while a rank loads its model: after `notice` seconds it is logged once who
        has not come. A rank that is seen to have died ends it at once.
        """
        if self._place is None:
            return [value]
        self._place.join("gathering a number", notice)
        meeting = self._place.gather(torch.tensor([value]), "gathering a number")
        return [int(tensor) for tensor in self._place.wait(meeting)]

    def broadcast(self, value: Any | None, source: int) -> Any:
        """What `value` is on the data-parallel rank `source`, on all. It is pickled. Waits for them.

        Raises:
            RuntimeError: on every rank, that it cannot be pickled.
        """
        if self._place is None:
            return value
        payload, failure = b"", ""
        if self._rank == source:
            try:
                payload = pickle.dumps(value)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
                payload = pickle.dumps(failure)
        header = struct.pack("<q?", len(payload), bool(failure))
        headers = self._place.wait(
            self._place.gather(torch.frombuffer(bytearray(header), dtype=torch.uint8), "sharing a value")
        )
        num_bytes, is_failure = struct.unpack("<q?", headers[source].numpy().tobytes())
        buffer = bytearray(payload) if self._rank == source else bytearray(num_bytes)
        sent = torch.frombuffer(buffer, dtype=torch.uint8)
        (received,) = self._place.wait(self._place.broadcast(sent, source, "sharing a value"))
        found = pickle.loads(received.numpy().tobytes())
        if is_failure:
            raise RuntimeError(f"what rank {source} has to share cannot be pickled: {found}")
        return found

    def close(self) -> None:
        """Leave word that this rank comes no more, and let go of the group. Never raises, and takes seconds at most."""
        self._meeting = self._alone = None
        if self._place is not None:
            self._place.close()


def _compare(told: list[dict[str, str]]) -> Verdict | None:
    """The first field in which configurations differ, with every value and who has it."""
    for field in dict.fromkeys(itertools.chain.from_iterable(told)):
        ranks_with: dict[str, list[int]] = {}
        for rank, configuration in enumerate(told):
            ranks_with.setdefault(configuration.get(field, "missing"), []).append(rank)
        if len(ranks_with) > 1:
            values = "; ".join(f"{value} on {_ranks(ranks)}" for value, ranks in ranks_with.items())
            fewest = sorted(ranks_with.values(), key=lambda ranks: len(ranks))[0]
            text = f"the ranks' streams differ in {field}: {values}. Build the same stream on every rank"
            return Verdict(text, tuple(fewest), is_configuration=True)
    return None


def _ranks(ranks: list[int]) -> str:
    """In words; a long list is cut."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
