"""The meeting place of some ranks: a gloo group of their own, and waits that end with who did not come."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo  # type: ignore[attr-defined]  # both are documented

from flowstream.distributed.gloo import NEVER, Meeting, keep, let_go, words
from flowstream.distributed.rank_error import Verdict
from flowstream.distributed.store_line import StoreError, StoreLine
from flowstream.distributed.whereabouts import Whereabouts

__all__ = ["MeetingPlace"]

_num_places: Counter[str] = Counter()
"""Meeting places made in this process, by what they are for and their ranks: the same on all of these ranks."""


class MeetingPlace:
    """Owns a gloo group and the ranks' whereabouts. Both are used when the ranks first meet, not before.

    The group is made from its parts rather than by `new_group`, whose name for it follows from the number of groups
    that this process has: another number on another rank, or a group that took the place of one destroyed, would
    meet in the wrong keys of the store. It is also in the order of `ranks`, and none of destroy_process_group's.

    Args:
        kind: what it is for; `ranks`: in the default process group, in their order; `own`: this one's place in them;
        names: of the ranks, for errors; `timeout`: seconds that a rank waits for the others.
    """

    def __init__(self, kind: str, ranks: tuple[int, ...], own: int, names: tuple[str, ...], timeout: float) -> None:
        self.ranks = ranks
        self._own, self._names, self._timeout = own, names, timeout
        # Of the timeout, what it takes to find out who is to blame: more than a store's hiccup of 5 s, if it may.
        self._grace = min(20.0, timeout / 4)
        self._nap = min(1.0, self._grace / 6)  # word of a failure is read after two: long before the grace is over
        digest = hashlib.sha256("_".join(map(str, ranks)).encode()).hexdigest()[:16]
        prefix = f"flowstream/{kind}/{digest}"
        _num_places[prefix] += 1
        self._prefix = f"{prefix}/{_num_places[prefix]}"
        keeper = ranks.index(0) if 0 in ranks else None
        self._whereabouts = Whereabouts(StoreLine.of_process(), self._prefix, own, names, keeper)
        assert dist.group.WORLD is not None
        self._store = dist.group.WORLD.get_group_store()
        self._group: ProcessGroupGloo | None = None
        self._num_meetings = 0
        self._unfinished: list[Meeting] = []
        self._verdict: tuple[Verdict, str] | None = None
        self._are_here = False
        self._is_closed = False
        self._process = os.getpid()

    def note(self, place: str) -> None:
        """Leave word where this rank is, at most once a second."""
        self._whereabouts.tell(place, every=1.0)

    def call(
        self,
        name: str,
        word: Mapping[str, str],
        patience: float,
        judge: Callable[[list[dict[str, str]]], Verdict | None] = lambda told: None,
        notice: float = 45.0,
    ) -> None:
        """Wait until all ranks have come to `name`; `judge` looks at the words of all. See `Whereabouts.call`."""
        self._check_open()
        patience = min(patience, self._timeout - self._grace)
        verdict = self._whereabouts.call(name, word, patience, judge, notice)
        if verdict is not None:
            raise self._give_up(verdict)
        self._are_here = True

    def join(self, place: str, notice: float = 45.0) -> ProcessGroupGloo:
        """The group, which is made once all ranks are known to be here. After `notice` seconds who is not is logged."""
        if self._group is None:
            if not self._are_here:
                self.call("group", {}, self._timeout, notice=notice)
            began = time.monotonic()
            made: queue.SimpleQueue[ProcessGroupGloo | RuntimeError] = queue.SimpleQueue()
            threading.Thread(target=self._make, args=(made,), name="flowstream makes a group", daemon=True).start()
            deadline = began + self._timeout - self._grace
            while self._group is None:
                try:
                    found = made.get(timeout=self._nap)
                except queue.Empty:
                    reason = self._whereabouts.trouble(1) or ("in vain" if time.monotonic() >= deadline else "")
                    if reason:
                        raise self._failure(place, f"while the group was made: {reason}", began) from None
                    continue
                if isinstance(found, RuntimeError):
                    raise self._failure(place, words(found), began) from found
                self._group = found
        return self._group

    def _make(self, made: queue.SimpleQueue[ProcessGroupGloo | RuntimeError]) -> None:
        """In a thread: gloo waits for the others, and cannot be told to stop."""
        try:
            store = PrefixStore(f"{self._prefix}/gloo", self._store)
            made.put(ProcessGroupGloo(store, self._own, len(self.ranks), NEVER))
        except RuntimeError as error:
            made.put(error)

    # A meeting.

    def gather(self, tensor: Tensor, place: str) -> Meeting:
        """Begin to gather the `tensor` of every rank, of one shape and dtype."""
        outputs = [torch.empty_like(tensor) for _ in self._names]
        return self._start(lambda group: group.allgather([outputs], [tensor]), outputs, tensor, place)

    def broadcast(self, tensor: Tensor, source: int, place: str) -> Meeting:
        """Begin to overwrite `tensor` by that of the rank `source`."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        return self._start(lambda group: group.broadcast([tensor], options), [tensor], tensor, place)

    def _start(self, begin: Callable[[Any], Any], outputs: list[Tensor], inputs: Tensor, place: str) -> Meeting:
        self._check_open()
        group = self.join(place)
        self._num_meetings += 1
        self._whereabouts.tell(place)
        self._unfinished = [meeting for meeting in self._unfinished if not meeting.is_over]
        try:
            meeting = Meeting(self._num_meetings, place, begin(group), outputs, inputs)
        except RuntimeError as error:  # the connection was lost before
            raise self._failure(place, words(error), time.monotonic()) from error
        self._unfinished.append(meeting)
        return meeting

    def wait(self, meeting: Meeting) -> list[Tensor]:
        """What was gathered. Looks up, every second or so, who has died, closed, or given up."""
        self._check_open()
        began = time.monotonic()
        deadline = began + self._timeout - self._grace
        reason = ""
        while not reason:
            error = meeting.finish(min(self._nap, deadline - time.monotonic()))
            if error is None:
                return meeting.outputs
            if meeting.is_over:
                reason = words(error)
            elif time.monotonic() >= deadline:
                reason = f"waited {time.monotonic() - began:.0f} s"
            else:
                reason = self._whereabouts.trouble(meeting.number)
        # What was on its way when somebody left may still come.
        if not meeting.is_over and meeting.finish(self._nap / 2) is None:
            return meeting.outputs
        raise self._failure(meeting.place, reason, began)

    # Errors, and the end.

    def _failure(self, place: str, reason: str, began: float) -> Exception:
        """Find out, with the others, who is to blame. `began`: when this rank began to wait."""
        verdict = self._whereabouts.find_missing(self._grace, self._timeout, reason, began + self._timeout)
        return self._give_up(verdict, f"at {place}, {self._names[self._own]} waited in vain: ")

    def _give_up(self, verdict: Verdict, where: str = "") -> Exception:
        self._verdict = verdict, where
        return verdict.error(where)

    def _check_open(self) -> None:
        if self._verdict is not None:
            verdict, where = self._verdict
            raise verdict.error(where)
        if self._is_closed:
            raise RuntimeError("the stream of this rank is closed: build another one, on every rank")

    def close(self) -> None:
        """Leave word that this rank comes no more, and let go of the group. Never raises, and takes seconds at most."""
        if self._is_closed:
            return
        self._is_closed = True
        left: list[object] = [self._group]
        self._group = None
        if os.getpid() != self._process:  # a forked worker: neither threads nor connections are its own
            keep(*left)
            return
        is_ending = not threading.main_thread().is_alive()
        if self._verdict is None:
            with contextlib.suppress(StoreError):
                self._whereabouts.tell_closed(self._num_meetings, _how_closed(is_ending))
            deadline = time.monotonic() + 3.0
            for meeting in self._unfinished:
                meeting.finish(deadline - time.monotonic())
        # Gloo can neither be told to stop, nor let go before it is done: its destructor would wait for the ranks.
        if is_ending or any(not meeting.is_over for meeting in self._unfinished):
            keep(*left, *self._unfinished)
        else:
            let_go(left)
        self._unfinished = []


def _how_closed(is_ending: bool) -> str:
    error = getattr(sys, "last_value", None) if is_ending else sys.exc_info()[1]
    how = "has ended without closing its stream" if is_ending else "has closed its stream"
    return how if error is None else f"{how} after {type(error).__name__}: {str(error)[:200]}"
