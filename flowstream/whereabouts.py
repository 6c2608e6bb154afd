"""Where each rank is: the word that it leaves in the store, and who is missing when a meeting fails."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed import Store  # type: ignore[attr-defined]  # it is documented

_T = TypeVar("_T")

_SILENT = "has not called next()"
_RESTART = "restart all ranks from their last checkpoint"


class RankError(RuntimeError):
    """A rank that the others wait for has died, stalled, failed or gone another way."""

    ranks: tuple[int, ...]
    """The ranks that it is about, as far as can be told."""

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)

    def __reduce__(self) -> tuple[type[RankError], tuple[str, tuple[int, ...]]]:
        return type(self), (str(self), self.ranks)


@dataclass(frozen=True)
class Process:
    """A process, as another one on its host can look it up."""

    host: str
    """Equal only where a pid means the same: the machine, since its last boot, and the namespace of pids."""
    pid: int
    born: str
    """When it began, so that another one with its pid is not taken for it; empty where the system does not tell."""

    @classmethod
    def own(cls) -> Process:
        boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
        host = platform.node()
        with contextlib.suppress(OSError):
            host = f"{host} {boot.read_text().strip()} {namespace.stat().st_ino}"
        return cls(host, os.getpid(), _state_and_birth(os.getpid())[1])

    def fate(self) -> str | None:
        """What is wrong with a process of this host, in words; nothing, as far as can be seen, if `None`."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return "has died"
        except OSError:
            return None
        state, born = _state_and_birth(self.pid)
        if born != self.born or state in ("Z", "X"):
            return "has died"
        return "was stopped (by SIGSTOP or a debugger)" if state in ("T", "t") else None


def _state_and_birth(pid: int) -> tuple[str, str]:
    """As Linux tells; empty elsewhere, and of a process that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # its name may hold anything
    except OSError:
        return "", ""
    return fields[0], fields[19]


class StoreGone(Exception):
    """The store does not answer: who keeps it has ended, or was stopped."""


@dataclass(frozen=True)
class Verdict:
    """What one rank found out for all of them."""

    text: str
    ranks: tuple[int, ...] = ()
    is_configuration: bool = False
    """Whether the ranks are all there, but configured differently."""


class Whereabouts:
    """Owns what the ranks of one stream tell each other in the store of torch.distributed, under a prefix of theirs.

    Nothing here waits on a rank without an end: what the store is asked is asked in a thread, which is left behind if
    the store does not answer. Every rank takes a fixed number of steps; one of them, for all, looks at every rank.
    """

    def __init__(self, store: Store, own: int, names: tuple[str, ...]) -> None:
        self._store = store
        self._own = own
        self._names = names
        self._num_ranks = len(names)
        self._on_host: dict[int, Process] = {}
        self._asking: threading.Thread | None = None
        self.is_gone = False
        self._told = float("-inf")

    # What a rank tells, at no more than the cost of a send.

    def tell(self, meeting: int, place: str, *, every: float = 0.0) -> None:
        """Leave word that this rank is at `place`, after `meeting` meetings; no more often than `every` seconds."""
        now = time.monotonic()
        if now - self._told >= every:
            self._told = now
            self._set(f"at/{self._own}", json.dumps([meeting, place, time.strftime("%H:%M:%S")]))

    def tell_closed(self, meeting: int, how: str) -> None:
        """Leave word that this rank comes to no meeting after the `meeting`-th, and how that came to be."""
        self._set(f"closed/{self._own}", how)
        self._set(f"closed_after/{meeting}", str(self._own))

    def _set(self, key: str, value: str) -> None:
        if self.is_gone or (self._asking is not None and self._asking.is_alive()):
            return  # it would wait for the store, or for the thread that asks it
        try:
            self._store.set(key, value)
        except RuntimeError:
            self.is_gone = True

    # What a rank asks.

    def ask(self, question: Callable[[Store], _T], seconds: float = 5.0) -> _T:
        """What the store answers. Raises StoreGone if it does not within `seconds`."""
        if self.is_gone or (self._asking is not None and self._asking.is_alive()):
            raise StoreGone
        answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        store = self._store

        def ask() -> None:
            try:
                answers.put((True, question(store)))
            except Exception as error:
                answers.put((False, error))

        self._asking = threading.Thread(target=ask, name="flowstream asks the store", daemon=True)
        self._asking.start()
        try:
            is_answer, answer = answers.get(timeout=seconds)
        except queue.Empty:
            raise StoreGone from None
        self._asking.join()
        if not is_answer:
            self.is_gone = True
            raise StoreGone from answer
        return answer  # type: ignore[no-any-return]

    def is_told(self, key: str, seconds: float = 5.0) -> bool:
        return self.ask(lambda store: bool(store.check([key])), seconds)

    def has_failed(self, meeting: int, seconds: float) -> bool:
        """Whether another rank has given a meeting up, or will not come to this one."""
        return self.is_told("failed", seconds) or self.is_told(f"closed_after/{meeting - 1}", seconds)

    def fates(self) -> dict[int, str]:
        """What is wrong with the processes of this host."""
        fates = {rank: process.fate() for rank, process in self._on_host.items()}
        return {rank: fate for rank, fate in fates.items() if fate is not None}

    def has_seen_death(self) -> bool:
        return any("died" in fate for fate in self.fates().values())

    # All ranks are called.

    def call(
        self,
        name: str,
        word: Mapping[str, str],
        patience: float,
        causes: str,
        judge: Callable[[list[dict[str, str]]], Verdict | None] = lambda words: None,
    ) -> Verdict | None:
        """Wait until all ranks have come to `name`. What rank 0 finds in their words, or who is missing, goes to all.

        A rank that waits sends a handful of requests; only rank 0, or who stands in for it, reads what each has said.
        """
        process = Process.own()
        self._set(f"{name}/word/{self._own}", json.dumps([asdict(process), dict(word)]))
        verdict = f"{name}/verdict"
        try:
            self.ask(lambda store: store.add(f"{name}/count", 1))
            if self._own == 0:
                self._await_all(name, patience)
                self._decide(verdict, self._look_round(name, patience, causes, judge))
            elif not self._await(verdict, patience + min(3.0, max(patience / 4, 0.5)), self.has_seen_death):
                deputy = self.ask(lambda store: store.compare_set(f"{name}/deputy", "", str(self._own)))
                if deputy.decode() == str(self._own):
                    self._decide(verdict, self._look_round(name, patience, causes, judge))
                elif not self._await(verdict, 10 + self._num_ranks / 100):
                    raise StoreGone
            found = json.loads(self.ask(lambda store: store.get(verdict)))
            if found:
                self._linger(f"{name}/num_read", f"{name}/count")
                return _verdict_from(found)
            host = self.ask(lambda store: store.get(f"{name}/host/{process.host}"))
            self._on_host = {int(at): Process(**other) for at, other in json.loads(host).items()}
            self._on_host.pop(self._own, None)
        except StoreGone:
            return self._without_store()
        return None

    def _await_all(self, name: str, patience: float) -> None:
        deadline, nap = time.monotonic() + patience, 1e-3
        while self.ask(lambda store: store.add(f"{name}/count", 0)) < self._num_ranks and time.monotonic() < deadline:
            if self.has_seen_death() or self.is_told(f"{name}/verdict"):
                return
            time.sleep(nap)
            nap = min(2 * nap, 0.1)

    def _await(self, key: str, seconds: float, is_in_vain: Callable[[], bool] = lambda: False) -> bool:
        """Whether `key` is there by then. In slices, so that a thread that is left behind ends soon."""

        def wait(store: Store, slice_: float) -> bool:
            try:
                store.wait([key], timedelta(seconds=slice_))
            except RuntimeError:
                return bool(store.check([key]))  # it raises if it was not the time that ran out
            return True

        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            slice_ = min(max(left, 0.01), 1.0)
            if self.ask(lambda store, slice_=slice_: wait(store, slice_), 5.0 + slice_):  # type: ignore[misc]
                return True
            if left <= 0 or is_in_vain():
                return False

    def _look_round(
        self, name: str, patience: float, causes: str, judge: Callable[[list[dict[str, str]]], Verdict | None]
    ) -> Verdict | None:
        keys = [f"{name}/word/{rank}" for rank in range(self._num_ranks)]
        missing = self.ask(lambda store: [at for at, key in enumerate(keys) if not store.check([key])], 60.0)
        if missing:
            fates = self.fates()
            which = ", ".join(self._names[rank] + f" ({fates[rank]})" * (rank in fates) for rank in missing[:8])
            which += f" and {len(missing) - 8} more" * (len(missing) > 8)
            text = f"{which} did not come, of {self._num_ranks} ranks that wait {patience:g} s for each other: {causes}"
            return Verdict(text, tuple(missing))
        told = self.ask(lambda store: [json.loads(word) for word in store.multi_get(keys)], 60.0)
        hosts: dict[str, dict[int, Any]] = {}
        for rank, (process, _) in enumerate(told):
            hosts.setdefault(process["host"], {})[rank] = process
        for host, processes in hosts.items():
            self._set(f"{name}/host/{host}", json.dumps(processes))
        return judge([word for _, word in told])

    def _decide(self, key: str, verdict: Verdict | None) -> None:
        text = json.dumps(verdict and asdict(verdict))
        self.ask(lambda store: store.compare_set(key, "", text))

    def _linger(self, num_read: str, num_ranks: str) -> None:
        """Rank 0 may keep the store: it does not leave before the others have read, or for 3 s."""
        self.ask(lambda store: store.add(num_read, 1))
        deadline = time.monotonic() + 3.0
        while self._own == 0 and time.monotonic() < deadline:
            if self.ask(lambda store: store.add(num_read, 0) >= store.add(num_ranks, 0)):
                return
            time.sleep(0.02)

    # A meeting has failed.

    def find_missing(self, grace: float, timeout: float, reason: str) -> Verdict:
        """Who is to blame for a failed meeting. The first to ask looks round for at most `grace` seconds, for all."""
        patience = max(grace / 2, 0.5)
        try:
            first = self.ask(lambda store: store.compare_set("failed", "", str(self._own)), patience).decode()
            if not self.is_told("verdict", patience):
                self.ask(lambda store: store.set(f"here/{self._own}", json.dumps(self.fates())), patience)
                self.ask(lambda store: store.add("num_here", 1), patience)
                if first == str(self._own) or not self._await("verdict", grace):
                    self._decide("verdict", self._judge(0.7 * grace, timeout, reason))
                self._linger("num_read", "num_here")
            return _verdict_from(json.loads(self.ask(lambda store: store.get("verdict"), patience)))
        except StoreGone:
            return self._without_store()

    def _judge(self, grace: float, timeout: float, reason: str) -> Verdict:
        deadline = time.monotonic() + grace
        settled = time.monotonic() + min(grace, 2.5)
        silent = {rank for rank in range(self._num_ranks) if rank != self._own}
        fates: dict[int, str] = {}
        while True:
            fates |= self.fates()
            for rank in sorted(silent):
                seen, closed = self.ask(lambda store, rank=rank: self._heard(store, rank), 60.0)  # type: ignore[misc]
                if closed is not None:
                    fates[rank] = closed
                if seen is not None:
                    silent.discard(rank)
                    fates |= seen
            now = time.monotonic()
            if silent <= fates.keys() or now >= deadline or (fates and now >= settled):
                break
            time.sleep(0.05)
        if not fates and not silent:
            return Verdict(f"all ranks are here, but the connection between them failed ({reason}): {_RESTART}")
        remedies = []
        if not fates:
            fates = dict.fromkeys(silent, _SILENT)
            remedies.append(
                f"it has died with its node, is stuck, or does what takes longer than timeout={timeout:g} s, such as an "
                f"evaluation on one rank (give a larger timeout); else {_RESTART}"
            )
        if any("closed" in fate for fate in fates.values()):
            remedies.append("if no error closed it, let all ranks take as many batches, and close together")
        if any("died" in fate or "ended" in fate or "after" in fate for fate in fates.values()):
            remedies.append(f"look into its output for the cause (an exception, out of memory, ...), then {_RESTART}")
        if any("stopped" in fate for fate in fates.values()):
            remedies.append(f"find out who stopped it, then {_RESTART}")
        told = [f"{self._names[rank]} {self._with_place(rank, fates[rank])}" for rank in sorted(fates)]
        return Verdict(f"{'; '.join(told)} ({reason}): {'; '.join(remedies)}", tuple(sorted(fates)))

    def _heard(self, store: Store, rank: int) -> tuple[dict[int, str] | None, str | None]:
        """(What the rank sees around it, if it has come here too; how it closed its stream, if it did.)"""
        seen = closed = None
        if store.check([f"here/{rank}"]):
            seen = {int(at): fate for at, fate in json.loads(store.get(f"here/{rank}")).items()}
        if store.check([f"closed/{rank}"]):
            closed = store.get(f"closed/{rank}").decode()
        return seen, closed

    def _with_place(self, rank: int, fate: str) -> str:
        at = self.ask(lambda store: store.get(f"at/{rank}") if store.check([f"at/{rank}"]) else None)
        if at is None:
            return f"{fate} (it has not called next() at all)"
        _, place, clock = json.loads(at)
        return f"{fate} since {clock} ({place})" if fate == _SILENT else f"{fate} (last seen at {clock}: {place})"

    def _without_store(self) -> Verdict:
        """The verdict where the store is gone, and with it what the others have said: who kept it is the first cause.

        Others whose process is gone may have left because of that.
        """
        fates = self.fates()
        fate = fates.pop(0, "has ended, or the launcher that keeps the store has")
        others = "".join(f"; {self._names[rank]} {fates[rank]}" for rank in sorted(fates))
        text = f"{self._names[0]} {fate}, and the store of torch.distributed does not answer{others}"
        return Verdict(f"{text}: look into its output for the cause, then {_RESTART}", (0,))


def _verdict_from(found: dict[str, Any]) -> Verdict:
    return Verdict(found["text"], tuple(found["ranks"]), found["is_configuration"])
