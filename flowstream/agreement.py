"""The meeting of the ranks: what each has to say goes to all, and who does not come is named."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import os
import pickle
import queue
import struct
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo  # type: ignore[attr-defined]  # both are documented

from flowstream.distributed import World
from flowstream.whereabouts import RankError, StoreGone, Verdict, Whereabouts

__all__ = ["Agreement", "Peers", "RankError"]

_num_places: Counter[str] = Counter()
"""Meeting places made in this process, by what they are for and their ranks: the same on all of these ranks."""

_NEVER = timedelta(days=30)
"""Gloo's own timeout. It names nobody, and runs from the start of a meeting: the clock of who waits is ours."""

_CAUSES = (
    "the stream is wrapped so that only one rank pulls from it (accelerator.prepare of a DataLoader over the stream "
    "makes a DataLoaderDispatcher: prepare the inner loader, then wrap it in a FlowStream); or it is iterated on some "
    "ranks only, as under `if rank == 0`; or these ranks have died, or do something long before their first next(); "
    "or they built another number of streams. All ranks must build the same streams and iterate them together"
)


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
        self._meeting: _Meeting | None = None
        self._alone: bytes | None = None
        self._place: _Place | None = None
        if world.world_size > 1:
            names = tuple(
                f"rank {rank}" if rank == global_rank else f"rank {rank} (global rank {global_rank})"
                for rank, global_rank in enumerate(world.ranks)
            )
            self._place = _Place("agreement", world.ranks, world.rank, names, timeout)
            weakref.finalize(self, self._place.close)

    def shake_hands(self, configuration: Mapping[str, str], *, patience: float = 45.0) -> None:
        """Make sure, before anything is pulled, that all ranks are here and configured alike.

        Raises:
            RankError: who did not come within `patience` seconds, and why that happens.
            ValueError: on every rank, the field in which they differ, with the values and whose they are.
        """
        if self._place is not None:
            self._place.call("configuration", configuration, patience, _compare)
            self._place.join("the first next()")

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

    def gather(self, value: int) -> list[int]:
        """The values of all ranks, in the order of `world.ranks`. Waits for them."""
        if self._place is None:
            return [value]
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


class Peers:
    """What tensor- and pipeline-parallel peers share: the losses of the first of them.

    Its errors name ranks of the default process group: peers are one data-parallel rank.
    """

    def __init__(self, world: World, *, timeout: float) -> None:
        self._place: _Place | None = None
        if len(world.peers) > 1:
            own = world.peers.index(world.global_rank)
            names = tuple(f"global rank {rank} (a tensor- or pipeline-parallel peer)" for rank in world.peers)
            self._place = _Place("peers", world.peers, own, names, timeout)
            weakref.finalize(self, self._place.close)

    def agree(self, losses: Tensor) -> Tensor:
        """The first peer's `losses` [N], float32 or float16, on all peers.

        Raises:
            RuntimeError: on every peer, that their N or dtype differ.
            RankError: a peer that does not come.
        """
        if self._place is None:
            return losses
        place = f"sharing {len(losses)} losses among peers"
        own = losses.detach().cpu().contiguous()
        header = torch.tensor([len(own), own.element_size()])
        told = [tuple(other.tolist()) for other in self._place.wait(self._place.gather(header, place))]
        if len(set(told)) > 1:
            each = ", ".join(f"{num} of {size} bytes" for num, size in told)
            raise RuntimeError(
                f"tensor- and pipeline-parallel peers have scored different samples: {each} losses, on global ranks "
                f"{list(self._place.ranks)}. They must read the same batches: shard the data by the data-parallel rank"
            )
        if not len(own):
            return losses
        (first,) = self._place.wait(self._place.broadcast(own.view(torch.uint8).clone(), 0, place))
        return first.view(own.dtype).to(losses.device)

    def close(self) -> None:
        """As `Agreement.close`."""
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


class _Meeting:
    """What gloo works on, and all that must not go before it is done."""

    def __init__(self, number: int, place: str, work: Any, outputs: list[Tensor], inputs: Tensor) -> None:
        self.number = number
        self.place = place
        self.work = work
        self.outputs = outputs
        self.inputs = inputs


class _Place:
    """A gloo group and the word in the store, of some ranks, in their order: made when they first meet.

    The group is made from its parts rather than by `new_group`, whose name for it follows from the number of groups
    that this process has: another number on another rank, or a group that took the place of one destroyed, would
    meet in the wrong keys of the store. It is also in the order of `ranks`, and none of destroy_process_group's.
    """

    def __init__(self, kind: str, ranks: tuple[int, ...], own: int, names: tuple[str, ...], timeout: float) -> None:
        self.ranks = ranks
        self._own, self._names, self._timeout = own, names, timeout
        self._grace = min(10.0, timeout / 4)
        digest = hashlib.sha256("_".join(map(str, ranks)).encode()).hexdigest()[:16]
        prefix = f"flowstream/{kind}/{digest}/"
        _num_places[prefix] += 1
        assert dist.group.WORLD is not None
        self._store = PrefixStore(f"{prefix}{_num_places[prefix]}/", dist.group.WORLD.get_group_store())
        # A connection of its own: what hangs on it stops nobody else, nor does what hangs on the other stop it.
        self._whereabouts = Whereabouts(self._store.clone(), own, names)  # type: ignore[attr-defined]
        self._group: ProcessGroupGloo | None = None
        self._num_meetings = 0
        self._unfinished: list[_Meeting] = []
        self._error: tuple[type[Exception], str, tuple[int, ...]] | None = None
        self._are_here = False
        self._is_closed = False
        self._process = os.getpid()

    def note(self, place: str) -> None:
        self._whereabouts.tell(self._num_meetings, place, every=1.0)

    def call(
        self,
        name: str,
        word: Mapping[str, str],
        patience: float,
        judge: Callable[[list[dict[str, str]]], Verdict | None] = lambda told: None,
    ) -> None:
        self._check_open()
        verdict = self._whereabouts.call(name, word, patience, _CAUSES, judge)
        if verdict is not None:
            self._give_up(verdict)
        self._are_here = True

    def gather(self, tensor: Tensor, place: str) -> _Meeting:
        outputs = [torch.empty_like(tensor) for _ in self._names]
        return self._start(lambda group: group.allgather([outputs], [tensor]), outputs, tensor, place)

    def broadcast(self, tensor: Tensor, source: int, place: str) -> _Meeting:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        return self._start(lambda group: group.broadcast([tensor], options), [tensor], tensor, place)

    def _start(self, begin: Callable[[Any], Any], outputs: list[Tensor], inputs: Tensor, place: str) -> _Meeting:
        self._check_open()
        group = self.join(place)
        self._num_meetings += 1
        self._whereabouts.tell(self._num_meetings, place)
        self._unfinished = [meeting for meeting in self._unfinished if not meeting.work.is_completed()]
        try:
            meeting = _Meeting(self._num_meetings, place, begin(group), outputs, inputs)
        except RuntimeError as error:  # the connection was lost before
            raise self._failure(place, _words(error)) from error
        self._unfinished.append(meeting)
        return meeting

    def wait(self, meeting: _Meeting) -> list[Tensor]:
        """What was gathered. Looks up, every second or so, who has died, closed, or given up."""
        self._check_open()
        began = time.monotonic()
        deadline = began + self._timeout - self._grace
        nap = min(1.0, self._grace / 3)
        reason = ""
        while not reason:
            error = _finish(meeting.work, max(min(nap, deadline - time.monotonic()), 0.001))
            if meeting.work.is_completed() and error is None:
                return meeting.outputs
            if error is not None and meeting.work.is_completed():
                reason = _words(error)
            elif time.monotonic() >= deadline:
                reason = f"waited {time.monotonic() - began:.0f} s"
            else:
                reason = self._look_up(meeting)
        # What was on its way when somebody left may still come.
        if not meeting.work.is_completed() and _finish(meeting.work, nap / 2) is None:
            return meeting.outputs
        raise self._failure(meeting.place, reason)

    def _look_up(self, meeting: _Meeting) -> str:
        if self._whereabouts.has_seen_death():
            return "its process is gone"
        try:
            if self._whereabouts.has_failed(meeting.number, min(5.0, self._grace)):
                return "told by another rank"
        except StoreGone:
            return "the store does not answer" if self._whereabouts.is_gone else ""
        return ""

    def join(self, place: str) -> ProcessGroupGloo:
        """The group, which is made once all ranks are known to be here."""
        if self._group is None:
            if not self._are_here:
                self.call("group", {}, self._timeout - self._grace)
            made: queue.SimpleQueue[Any] = queue.SimpleQueue()

            def make() -> None:
                try:
                    store = PrefixStore("gloo/", self._store)
                    made.put(ProcessGroupGloo(store, self._own, len(self.ranks), _NEVER))
                except RuntimeError as error:
                    made.put(error)

            threading.Thread(target=make, name="flowstream makes a group", daemon=True).start()
            try:
                group = made.get(timeout=self._timeout - self._grace)
            except queue.Empty:
                raise self._failure(place, "while the group was made") from None
            if isinstance(group, RuntimeError):
                raise self._failure(place, _words(group)) from group
            self._group = group
        return self._group

    def _failure(self, place: str, reason: str) -> Exception:
        """Find out, with the others, who is to blame."""
        verdict = self._whereabouts.find_missing(self._grace, self._timeout, reason)
        self._error = (RankError, f"at {place}, {self._names[self._own]} waited in vain: {verdict.text}", verdict.ranks)
        return self._again()

    def _give_up(self, verdict: Verdict) -> None:
        self._error = (ValueError if verdict.is_configuration else RankError, verdict.text, verdict.ranks)
        raise self._again()

    def _again(self) -> Exception:
        assert self._error is not None
        kind, text, ranks = self._error
        return RankError(text, ranks) if kind is RankError else kind(text)

    def _check_open(self) -> None:
        if self._error is not None:
            raise self._again()
        if self._is_closed:
            raise RuntimeError("the stream of this rank is closed: build another one, on every rank")

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if (
            os.getpid() != self._process
        ):  # a worker that was forked: neither the threads nor the connections are its own
            _keep(self._group)
            return
        with contextlib.suppress(Exception):
            if self._error is None:
                self._whereabouts.tell_closed(self._num_meetings, _how_closed())
                deadline = time.monotonic() + 3.0
                for meeting in self._unfinished:
                    _finish(meeting.work, max(deadline - time.monotonic(), 0.001))
        group, self._group = self._group, None
        if any(not meeting.work.is_completed() for meeting in self._unfinished):
            # Gloo can neither be told to stop, nor let go before it is done: its destructor would wait for the ranks.
            _keep(group, *self._unfinished)
        self._unfinished = []


def _keep(*kept: object) -> None:
    """Let go of them never, not even when the process ends."""
    for one in kept:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))


def _finish(work: Any, seconds: float) -> Exception | None:
    """Wait so long for what gloo works on. What it says, also that it is not done yet."""
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError as error:
        return error
    return None


def _words(error: Exception) -> str:
    """The first sentence of what gloo says, without where in its source it says so."""
    return str(error).strip().split("\n")[0].rpartition("] ")[2].split(". This is")[0][:200] or type(error).__name__


def _how_closed() -> str:
    is_ending = not threading.main_thread().is_alive()
    error = getattr(sys, "last_value", None) if is_ending else sys.exc_info()[1]
    how = "has ended without closing its stream" if is_ending else "has closed its stream"
    return how if error is None else f"{how} after {type(error).__name__}: {str(error)[:200]}"
