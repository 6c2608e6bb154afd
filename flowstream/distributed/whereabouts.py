"""Where each rank is: the word that it leaves in the store, and who is missing when a meeting fails."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from typing import TypeVar

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # both are documented

from flowstream.distributed import blame
from flowstream.distributed.process import Process
from flowstream.distributed.rank_error import Verdict
from flowstream.distributed.store_line import StoreError, StoreGone, StoreLine

__all__ = ["Whereabouts"]

_logger = logging.getLogger("flowstream")

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
        self._host = f"host/{self._process.host}"
        process = json.dumps([own, asdict(self._process)]) + "\n"
        self._send(lambda store: store.append(self._host, process))  # type: ignore[attr-defined]  # it is documented

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
            store.set("any_closed", "")

        self._ask(tell, 2.0)

    # All ranks are called.

    def call(
        self,
        name: str,
        word: Mapping[str, str],
        patience: float,
        judge: Callable[[list[dict[str, str]]], Verdict | None],
        notice: float,
    ) -> Verdict | None:
        """Wait until all ranks have come to `name`. What one finds in their words, or who is missing, goes to all.

        A rank that waits sends a few requests a second; only rank 0, or who stands in for it, looks at each rank. It
        does so after `patience` seconds, or at once where a rank is seen to have died or closed. Who has not come after
        `notice` seconds is logged, once.
        """
        words = [f"{name}/word/{rank}" for rank in range(self._num_ranks)]
        verdict = f"{name}/verdict"
        deadline = time.monotonic() + patience
        try:
            self._ask(lambda store: store.set(words[self._own], json.dumps(dict(word))))
            if self._is_to_judge(name, words, patience, notice):
                self._decide(verdict, self._look_round(words, patience, judge))
            found = _verdict_from(self._ask(lambda store: store.get(verdict)))
            self._look_at_host()
            if found is not None:
                self._linger(f"{name}/num_read", found, max(deadline - time.monotonic(), patience / 4))
            return found
        except StoreError as error:
            return self._without_store(error, 1.0)

    def _is_to_judge(self, name: str, words: list[str], patience: float, notice: float) -> bool:
        """Wait until all are here, or it is plain that they will not be. Whether it is this rank that has to say so."""
        verdict = f"{name}/verdict"
        # Rank 0 waits for all, and is the first to lose patience; the others wait for what it says.
        keys, lag = (words, 0.0) if self._own == 0 else ([verdict], min(2.0, max(patience / 6, 0.5)))
        notices = [time.monotonic() + notice + lag]

        def is_in_vain() -> bool:
            if self._ask(lambda store: store.check([verdict])):
                return True
            self._look_at_host()
            if notices and time.monotonic() >= notices[0]:
                notices.clear()
                if self._is_first(f"{name}/noticed"):
                    _logger.warning("%s", blame.late(self._names, self._missing(words), notice, patience))
            return self._ask(lambda store: store.check(["any_closed"])) or _any_died(self.fates())

        if not is_in_vain() and self._await(keys, patience + lag, unless=is_in_vain):
            return self._own == 0
        if self._ask(lambda store: store.check([verdict])):
            return False
        return self._is_first(f"{name}/judge") or not self._await([verdict], 5.0 + self._num_ranks / 100)

    def _is_first(self, key: str) -> bool:
        """Whether no other rank has claimed this."""
        return self._ask(lambda store: store.compare_set(key, "", str(self._own))).decode() == str(self._own)

    def _look_at_host(self) -> None:
        """Find out which processes of this host take part, as far as they have built their stream."""
        told = self._ask(lambda store: store.get(self._host)).decode()
        processes = [json.loads(line) for line in told.splitlines()]
        self._on_host = {rank: Process(**process) for rank, process in processes if rank != self._own}

    def _await(
        self,
        keys: list[str],
        seconds: float,
        *,
        unless: Callable[[], bool] = lambda: False,
        patience: float = _PATIENCE,
    ) -> bool:
        """Whether all `keys` are there by then; they are not waited for once `unless` says so.

        Asked for now and then: where `store.wait` runs out of time, torch prints two warnings of its own.
        """
        deadline = time.monotonic() + seconds
        pause, look_at = 0.005, time.monotonic() + 1.0
        while not self._ask(lambda store: bool(store.check(keys)), patience):
            now = time.monotonic()
            if now >= deadline:
                return False
            if now >= look_at:
                look_at = now + 1.0
                if unless():
                    return False
            time.sleep(min(pause, deadline - now))
            pause = min(2 * pause, 0.25)
        return True

    def _missing(self, words: list[str]) -> list[int]:
        return self._ask(lambda store: [rank for rank, key in enumerate(words) if not store.check([key])], 60.0)

    def _look_round(
        self, words: list[str], patience: float, judge: Callable[[list[dict[str, str]]], Verdict | None]
    ) -> Verdict | None:
        missing = self._missing(words)
        if not missing:
            return judge(self._ask(lambda store: [json.loads(word) for word in store.multi_get(words)], 60.0))
        closed = self._ask(lambda store: {rank: _closed(store, rank) for rank in range(self._num_ranks)}, 60.0)
        # Who came and has died since is why the others are not waited for any longer.
        fates = {rank: fate for rank, fate in self.fates().items() if rank in missing or _any_died({rank: fate})}
        fates |= {rank: how for rank, how in closed.items() if how is not None}
        return blame.absent(self._names, missing, fates, patience)

    def _decide(self, key: str, verdict: Verdict | None) -> None:
        text = json.dumps(verdict and asdict(verdict))
        self._ask(lambda store: store.compare_set(key, "", text))

    def _linger(self, num_read: str, verdict: Verdict, seconds: float) -> None:
        """Who may keep the store does not leave before all who are not to blame have read, for 10 s at most."""
        blamed = () if verdict.is_configuration else verdict.ranks
        if self._own not in blamed:
            self._ask(lambda store: store.add(num_read, 1))
        deadline = time.monotonic() + min(seconds, 10.0)
        while self._own == self._keeper and time.monotonic() < deadline:
            if self._ask(lambda store: store.add(num_read, 0)) >= self._num_ranks - len(blamed):
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
        if _any_died(self.fates()):
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

    def find_missing(self, grace: float, timeout: float, reason: str, until: float) -> Verdict:
        """Who is to blame for a failed meeting. The first to ask looks round for at most `grace` seconds, for all.

        `until`: of `time.monotonic()`, when this rank's timeout is over.
        """
        patience = max(grace / 3, 1.0)

        def ask(question: Callable[[Store], _T]) -> _T:
            return self._ask(question, patience)

        try:
            first = ask(lambda store: store.compare_set("failed", "", str(self._own))).decode()
            if not ask(lambda store: store.check(["verdict"])):
                ask(lambda store: store.set(f"here/{self._own}", json.dumps(self.fates())))
                if first == str(self._own) or not self._await(["verdict"], 0.8 * grace, patience=patience):
                    self._decide("verdict", self._judge(0.6 * grace, timeout, reason))
            verdict = _verdict_from(ask(lambda store: store.get("verdict")))
            assert verdict is not None
            self._linger("num_read", verdict, until - time.monotonic())
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
                saw, how = self._ask(partial(_heard, rank=rank))
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
        places = {rank: self._ask(partial(_place, rank=rank)) for rank in fates}
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
        if is_gone and not _agent_keeps_store():
            fates |= {rank: "cannot be reached" for rank in keepers if rank not in (self._own, *self._on_host)}
        store = f"{'is gone' if is_gone else 'does not answer'} ({error})"
        return blame.storeless(self._names, fates, keepers, store)


def _any_died(fates: Mapping[int, str]) -> bool:
    return any("died" in fate for fate in fates.values())


def _agent_keeps_store() -> bool:
    """Whether torchrun's agent keeps the store, rather than global rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _closed(store: Store, rank: int) -> str | None:
    """How the rank closed its stream, if it did."""
    return store.get(f"closed/{rank}").decode() if store.check([f"closed/{rank}"]) else None


def _heard(store: Store, rank: int) -> tuple[dict[int, str] | None, str | None]:
    """(What the rank sees around it, if it has come here too; how it closed its stream, if it did.)"""
    seen = None
    if store.check([f"here/{rank}"]):
        seen = {int(at): fate for at, fate in json.loads(store.get(f"here/{rank}")).items()}
    return seen, _closed(store, rank)


def _place(store: Store, rank: int) -> tuple[str, str] | None:
    """Where the rank was last, and when."""
    if not store.check([f"at/{rank}"]):
        return None
    place, clock = json.loads(store.get(f"at/{rank}"))
    return place, clock


def _verdict_from(told: bytes) -> Verdict | None:
    found = json.loads(told)
    return found and Verdict(found["text"], tuple(found["ranks"]), found["is_configuration"])
