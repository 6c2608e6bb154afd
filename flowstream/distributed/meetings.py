"""The meetings of a stream's ranks: called at fixed places, one at a time, and checked before they are believed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from flowstream.digest import Digest
from flowstream.distributed.agreement import Agreement
from flowstream.distributed.message import MAX_STEPS, Message, Phase, failed, merged
from flowstream.distributed.peers import Peers
from flowstream.distributed.rank_error import RankError
from flowstream.distributed.world import World
from flowstream.settings import Settings

_HEADER = ("generation", "epoch", "window", "position", "phase", "configuration", "past")
MAX_MERGED = 2**19
"""Values that a merge may have to sort, in some 40 ms: from 263 ranks on a message holds fewer, …"""
MIN_VALUES = 500
"""… but so many in any world."""


class Meetings:
    """Owns the order in which the ranks of a stream meet. With a single rank every meeting is its own message.

    A rank that fails before it is to meet says so at that meeting: it raises its own error, all others `RankError`.
    """

    def __init__(self, world: World, settings: Settings, *, timeout: float) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout!r}: give a number of seconds above 0, such as 1800")
        has_denominator = "denominator" in settings.include
        if world.world_size > 1 and has_denominator and settings.window != "auto":
            num_steps = settings.window // settings.accumulate
            if num_steps > MAX_STEPS:
                raise ValueError(
                    f"a window of {num_steps} optimizer steps, but ranks share counts of {MAX_STEPS} at most: "
                    f"give a window of {MAX_STEPS * settings.accumulate} batches or fewer"
                )
        self.world = world
        self.seconds = 0.0
        """Time spent waiting for the others."""
        self.generation = 0
        self._max_steps = MAX_STEPS if has_denominator else 0
        self._num_tallies = 0
        self._max_values = max(world.share(MAX_MERGED), MIN_VALUES)
        self._agreement = Agreement(world, timeout=timeout, num_bytes=Message.num_bytes(self._max_steps))
        self._peers = Peers(world, timeout=timeout)
        self._configuration = 0
        self._has_met = False
        self.has_compared = False
        """Whether the ranks' samples were compared, once."""
        self.has_told_unlike = False
        self._lost: RankError | None = None
        self._called: Message | None = None
        self._failure: Exception | None = None

    @property
    def are_several(self) -> bool:
        return self.world.world_size > 1

    @property
    def peers(self) -> Peers:
        return self._peers

    def shake_hands(self, configuration: Callable[[], Mapping[str, str]]) -> None:
        """Once, before anything is pulled: see `Agreement.shake_hands`."""
        if self._has_met or not self.are_several:
            return
        described = dict(configuration())
        self._agreement.shake_hands(described)
        hashed = hashlib.blake2b(repr(sorted(described.items())).encode(), digest_size=8).digest()
        self._configuration = int.from_bytes(hashed, "little")
        self._has_met = True

    def count_tallies(self, num: int) -> None:
        """From now on messages hold so many tallies: on all ranks."""
        self._num_tallies = num
        self._agreement.resize(Message.num_bytes(self._max_steps, num))

    def begin(self) -> None:
        """An iterator starts, or starts anew after an interrupt."""
        self.generation += 1
        self._called = self._failure = None

    def note(self, place: str) -> None:
        """Leave word where this rank is."""
        if self.are_several:
            self._agreement.note(place)

    # -- a meeting ---------------------------------------------------------------------------------

    def call(self, place: Message, build: Callable[[], Message]) -> None:
        """Start a meeting with what `build` gives, or with the news that it failed.

        `place`: phase, epoch, window and position of the meeting, which all ranks must have alike.
        """
        if self._lost is not None:  # ranks that were lost once do not meet again
            raise RankError(str(self._lost), self._lost.ranks)
        place = replace(place, generation=self.generation, configuration=self._configuration)
        self._failure = None
        try:
            message = build()
            named = {name: getattr(place, name) for name in _HEADER}
            self._called = replace(message, **named)
        except RankError:
            raise
        except Exception as error:
            self._peers.fail()
            if not self.are_several:
                raise
            self._failure = error
            self._called = failed(place, error)
        if self.are_several:
            message_bytes = self._called.to_bytes(self._max_steps, self._max_values, self._num_tallies)
            self._agreement.start(message_bytes, _told(self._called))

    @property
    def is_called(self) -> bool:
        """Whether a meeting was started and its outcome is still to be asked for."""
        return self._called is not None

    def outcome(self) -> list[Message]:
        """The messages of all ranks, in rank order. Waits for them.

        Raises:
            RankError: a rank has died, stalled, failed, or is elsewhere; `build`'s own error on the rank that failed.
        """
        assert self._called is not None
        own, self._called = self._called, None
        if not self.are_several:
            return [own]
        started = time.perf_counter()
        try:
            raw = self._agreement.wait()
        except RankError as lost:
            self._lost = lost
            raise
        self.seconds += time.perf_counter() - started
        if self._failure is not None:
            error, self._failure = self._failure, None
            raise error
        messages = [Message.from_bytes(message, self._max_steps, self._num_tallies) for message in raw]
        self._check(own, messages)
        return messages

    def meet(self, place: Message, build: Callable[[], Message]) -> list[Message]:
        """`call`, and wait for the outcome."""
        self.call(place, build)
        return self.outcome()

    def merged(self, place: Message, digest: Digest) -> Digest:
        """The digest over all ranks, for a window whose own losses give its τ."""
        if not self.are_several:
            return digest
        place = replace(place, phase=Phase.LOSSES)
        return merged(self.meet(place, lambda: replace(place, digest=digest)))

    def _check(self, own: Message, messages: list[Message]) -> None:
        told = [rank for rank, message in enumerate(messages) if message.phase is Phase.FAILURE]
        if told:
            failures = "; ".join(f"rank {rank} failed with {messages[rank].failure}" for rank in told[:4])
            raise RankError(
                f"{failures}; this rank waits for it ({_told(own)}). If it can go on, all may call next() again",
                tuple(told),
            )
        for name in _HEADER:
            values = [getattr(message, name) for message in messages]
            others = tuple(rank for rank, value in enumerate(values) if value != getattr(own, name))
            if others:
                where = f"at {_told(messages[others[0]])}" if name != "past" else "there after another past"
                self._part(
                    f"rank {self.world.rank} meets the others at {_told(own)}, but rank {others[0]} {where}: all ranks "
                    "must take the same number of batches, break out of a loop at the same batch, begin iterators "
                    "together, and resume from the same step",
                    others,
                )
        different = tuple(rank for rank, message in enumerate(messages) if repr(message.tau) != repr(own.tau))
        if different:
            self._part(
                f"τ is {own.tau!r} on rank {self.world.rank} and {messages[different[0]].tau!r} on rank {different[0]} "
                f"at {_told(own)}: ranks must load states of the same step, and have the same versions of numpy",
                different,
            )

    def _part(self, text: str, ranks: tuple[int, ...]) -> NoReturn:
        """Ranks at different places do not meet again: one that is a meeting ahead shall not wait to learn that."""
        self._agreement.close()
        raise RankError(text, ranks)

    # -- once --------------------------------------------------------------------------------------

    def lengths(self, own: int) -> list[int]:
        """A number of every rank's."""
        return self._agreement.gather(own)

    def from_rank(self, source: int, value: Any) -> Any:
        """What the rank `source` has as `value`."""
        return self._agreement.broadcast(value, source)

    def close(self) -> None:
        self._agreement.close()
        self._peers.close()


def _told(message: Message) -> str:
    place = f"window {message.window} of epoch {message.epoch}"
    if message.position:
        place += f", batch {message.position}"
    return f"{place} ({message.phase.name.lower()}, iterator {message.generation})"
