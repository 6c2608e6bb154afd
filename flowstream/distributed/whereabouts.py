"""Where each rank is: the word that it leaves in the store, and who is missing when a meeting fails."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # both are documented

from flowstream.distributed import blame
from flowstream.distributed.process import Process
from flowstream.distributed.rank_error import Verdict
from flowstream.distributed.store_line import StoreError, StoreGone, StoreLine, StoreSilent

__all__ = ["Whereabouts"]

_T = TypeVar("_T")

_PATIENCE = 10.0
"""Seconds for an answer of the store: it may hang for 5 s when a rank connects (see `StoreLine`)."""


class Whereabouts:
    """Owns what the ranks of one stream tell each other in the store of torch.distributed, under a prefix of theirs.

    Nothing here waits on a rank without an end. Every rank takes a fixed number of steps; one of them, for all, looks
    at every rank. Nobody is blamed because the store does not answer this rank.

    Args:
        own: this rank, an index into `names`; `keeper`: the rank that keeps the store, unless the launcher does.
    """

    def __init__(
        self, line: StoreLine, prefix: str, own: int, names: tuple[str, ...], keeper: int | None = None
    ) -> None:
        self._line = line
        self._prefix = prefix
        self._own = own
        self._names = names
        self._num_ranks = len(names)
        self._keeper = keeper
        self._on_host: dict[int, Process] = {}
        self._told = float("-inf")
        self._looking: Future[bool] | None = None
        self._process = Process.own()
        process = json.dumps(asdict(self._process))
        line.tell(lambda store: PrefixStore(prefix, store).set(f"process/{own}", process))

    def _send(self, question: Callable[[Store], _T]) -> Future[_T]:
        return self._line.send(lambda store: question(PrefixStore(self._prefix, store)))

    def _ask(self, question: Callable[[Store], _T], seconds: float = _PATIENCE) -> _T:
        return self._line.ask(lambda store: question(PrefixStore(self._prefix, store)), seconds)

    # What a rank tells.

    def tell(self, place: str, *, every: float = 0.0) -> None:
        """Leave word that this rank is at `place`; no more often than `every` seconds. Waits for nothing."""
        now = time.monotonic()
        if now - self._told >= every:
            self._told = now
            word = json.dumps([place, time.strftime("%H:%M:%S")])
            self._line.tell(lambda store: PrefixStore(self._prefix, store).set(f"at/{self._own}", word))

    def tell_closed(self, meeting: int, how: str) -> None:
        """Leave word that this rank comes to no meeting after the `meeting`-th, and how that came to be."""

        def tell(store: Store) -> None:
            store.set(f"closed/{self._own}", how)
            store.set(f"closed_after/{meeting}", str(self._own))

        self._ask(tell, 2.0)

    # All ranks are called.

    def call(
        self,
        name: str,
        word: Mapping[str, str],
        patience: float,
        judge: Callable[[list[dict[str, str]]], Verdict | None],
    ) -> Verdict | None:
        """Wait until all ranks have come to `name`. What rank 0 finds in their words, or who is missing, goes to all.

        A rank that waits sends a handful of requests; only rank 0, or who stands in for it, reads what each has said.
        """
        words = [f"{name}/word/{rank}" for rank in range(self._num_ranks)]
        verdict = f"{name}/verdict"
        try:
            own = json.dumps([asdict(self._process), dict(word)])
            self._ask(lambda store: store.set(words[self._own], own))
            if self._own == 0:
                self._await(words, patience, unless=verdict)
                self._decide(verdict, self._look_round(name, words, patience, judge))
            elif not self._await([verdict], patience + min(3.0, max(patience / 4, 0.5))):
                deputy = self._ask(lambda store: store.compare_set(f"{name}/deputy", "", str(self._own)))
                if deputy.decode() == str(self._own):
                    self._decide(verdict, self._look_round(name, words, patience, judge))
                elif not self._await([verdict], _PATIENCE + self._num_ranks / 100):
                    raise StoreSilent(f"{deputy.decode()} looks round in place of rank 0, and has not said what it saw")
            found = _verdict_from(self._ask(lambda store: store.get(verdict)))
            if found is not None:
                num_here = self._num_ranks - (0 if found.is_configuration else len(found.ranks))
                self._linger(f"{name}/num_read", lambda store: num_here)
                return found
            on_host = json.loads(self._ask(lambda store: store.get(f"{name}/host/{self._process.host}")))
            self._on_host = {int(at): Process(**other) for at, other in on_host.items() if int(at) != self._own}
        except StoreError as error:
            return self._without_store(error, 1.0)
        return None

    def _await(self, keys: list[str], seconds: float, *, unless: str = "", patience: float = _PATIENCE) -> bool:
        """Whether all `keys` are there by then; once `unless` is there, they are not waited for.

        In slices, since the line is shared.
        """

        def wait(store: Store, slice_: float) -> bool:
            try:
                store.wait(keys, timedelta(seconds=slice_))
            except RuntimeError:
                return bool(store.check(keys))  # it raises if it was not the time that ran out
            return True

        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            slice_ = min(max(left, 0.01), 1.0)
            if self._ask(lambda store, slice_=slice_: wait(store, slice_), patience + slice_):  # type: ignore[misc]
                return True
            if left <= 0 or (unless and self._ask(lambda store: store.check([unless]))):
                return False

    def _look_round(
        self, name: str, words: list[str], patience: float, judge: Callable[[list[dict[str, str]]], Verdict | None]
    ) -> Verdict | None:
        missing = self._ask(lambda store: [rank for rank, key in enumerate(words) if not store.check([key])], 60.0)
        if missing:
            fates = self._ask(lambda store: {rank: _fate(store, rank, self._process.host) for rank in missing[:8]})
            return blame.absent(self._names, missing, fates, patience)
        told = self._ask(lambda store: [json.loads(word) for word in store.multi_get(words)], 60.0)
        hosts: dict[str, dict[int, Any]] = {}
        for rank, (process, _) in enumerate(told):
            hosts.setdefault(process["host"], {})[rank] = process
        for host, processes in hosts.items():
            key, value = f"{name}/host/{host}", json.dumps(processes)
            self._ask(lambda store, key=key, value=value: store.set(key, value))  # type: ignore[misc]
        return judge([word for _, word in told])

    def _decide(self, key: str, verdict: Verdict | None) -> None:
        text = json.dumps(verdict and asdict(verdict))
        self._ask(lambda store: store.compare_set(key, "", text))

    def _linger(self, num_read: str, num_here: Callable[[Store], int]) -> None:
        """Who may keep the store does not leave before the others have read, or for 3 s."""
        self._ask(lambda store: store.add(num_read, 1))
        deadline = time.monotonic() + 3.0
        while self._own == self._keeper and time.monotonic() < deadline:
            if self._ask(lambda store: store.add(num_read, 0) >= num_here(store)):
                return
            time.sleep(0.02)

    # A meeting has failed.

    def fates(self) -> dict[int, str]:
        """What is wrong with the processes of this host."""
        fates = {rank: process.fate() for rank, process in self._on_host.items()}
        return {rank: fate for rank, fate in fates.items() if fate is not None}

    def trouble(self, meeting: int) -> str:
        """Why this meeting will not come about; empty while nothing is known. Never waits for the store.

        What another rank has said is known a call later.
        """
        if any("died" in fate for fate in self.fates().values()):
            return "its process is gone"
        if self._looking is not None and not self._looking.done():
            return ""
        answer = self._looking
        keys = ["failed", f"closed_after/{meeting - 1}"]
        self._looking = self._send(lambda store: any(store.check([key]) for key in keys))
        if answer is None:
            return ""
        if answer.exception() is not None:
            return "the store does not answer"
        return "told by another rank" if answer.result() else ""

    def find_missing(self, grace: float, timeout: float, reason: str) -> Verdict:
        """Who is to blame for a failed meeting. The first to ask looks round for at most `grace` seconds, for all."""
        patience = max(grace / 3, 1.0)

        def ask(question: Callable[[Store], _T]) -> _T:
            return self._ask(question, patience)

        try:
            first = ask(lambda store: store.compare_set("failed", "", str(self._own))).decode()
            if not ask(lambda store: store.check(["verdict"])):
                ask(lambda store: store.set(f"here/{self._own}", json.dumps(self.fates())))
                ask(lambda store: store.add("num_here", 1))
                if first == str(self._own) or not self._await(["verdict"], 0.8 * grace, patience=patience):
                    self._decide("verdict", self._judge(0.6 * grace, timeout, reason))
                self._linger("num_read", lambda store: store.add("num_here", 0))
            verdict = _verdict_from(ask(lambda store: store.get("verdict")))
            assert verdict is not None
            return verdict
        except StoreError as error:
            return self._without_store(error, min(grace, 2.0))

    def _judge(self, grace: float, timeout: float, reason: str) -> Verdict:
        deadline = time.monotonic() + grace
        settled = time.monotonic() + min(grace, 2.5)
        silent = {rank for rank in range(self._num_ranks) if rank != self._own}
        seen, closed = self.fates(), dict[int, str]()
        while True:
            for rank in sorted(silent):
                saw, how = self._ask(lambda store, rank=rank: _heard(store, rank))  # type: ignore[misc]
                if how is not None:
                    closed[rank] = how
                if saw is not None:
                    silent.discard(rank)
                    seen |= saw
            fates = seen | self.fates() | closed  # who has ended has also died: what it said of itself tells more
            now = time.monotonic()
            if silent <= fates.keys() or now >= deadline or (fates and now >= settled):
                break
            time.sleep(0.05)
        fates = fates or dict.fromkeys(silent, blame.SILENT)
        places = {rank: self._ask(lambda store, rank=rank: _place(store, rank)) for rank in fates}  # type: ignore[misc]
        return blame.lost(self._names, fates, places, reason, timeout)

    def _without_store(self, error: StoreError, seconds: float) -> Verdict:
        """The verdict where the store does not answer, and with it what the others have said."""
        is_gone = isinstance(error, StoreGone)
        # The connections of a process break a moment before it is gone.
        deadline = time.monotonic() + (seconds if is_gone else 0.0)
        while True:
            fates = self.fates()
            is_seen = self._keeper in fates or (fates and self._keeper not in self._on_host)
            if is_seen or time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        keepers = () if self._keeper is None else (self._keeper,)
        store = f"{'is gone' if is_gone else 'does not answer'} ({error})"
        return blame.storeless(self._names, fates, keepers, store)


def _fate(store: Store, rank: int, host: str) -> str | None:
    """What is wrong with the process of a rank that has built its stream, if it is on this host."""
    if not store.check([f"process/{rank}"]):
        return None
    process = Process(**json.loads(store.get(f"process/{rank}")))
    return process.fate() if process.host == host else None


def _heard(store: Store, rank: int) -> tuple[dict[int, str] | None, str | None]:
    """(What the rank sees around it, if it has come here too; how it closed its stream, if it did.)"""
    seen = closed = None
    if store.check([f"here/{rank}"]):
        seen = {int(at): fate for at, fate in json.loads(store.get(f"here/{rank}")).items()}
    if store.check([f"closed/{rank}"]):
        closed = store.get(f"closed/{rank}").decode()
    return seen, closed


def _place(store: Store, rank: int) -> tuple[str, str] | None:
    """Where the rank was last, and when."""
    if not store.check([f"at/{rank}"]):
        return None
    place, clock = json.loads(store.get(f"at/{rank}"))
    return place, clock


def _verdict_from(told: bytes) -> Verdict | None:
    found = json.loads(told)
    return found and Verdict(found["text"], tuple(found["ranks"]), found["is_configuration"])
