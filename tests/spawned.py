"""Real ranks: a function run in processes of a gloo group, which may be killed, stopped, or hang."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "flowstream", "pytest"])


@dataclass(frozen=True)
class Failure:
    type: str
    """Of the exception, without its module."""
    text: str

    def __str__(self) -> str:
        return f"{self.type}: {self.text}"


@dataclass(frozen=True)
class Outcome:
    """What came of a rank."""

    result: Any = None
    """What the function returned."""
    error: Failure | None = None
    """What it raised."""
    seconds: float = 0.0
    """What the function took."""
    exit_code: int | None = None
    """Of the process: minus the signal that ended it."""
    output: str = ""
    """What it printed."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    host_store: Literal["parent", "rank0"] = "parent",
    expect_death: Collection[int] = (),
) -> list[Outcome]:
    """Run `function(*args)` on every rank of a new gloo group, each a process, and see what comes of them.

    Args:
        function: of a module's top level; it may end or stop its own process with `os.kill(os.getpid(), …)`.
        timeout: after so many seconds all are killed, and TimeoutError tells what they printed and where they were.
        host_store: who keeps the store: this process, as torchrun does, or rank 0.
        expect_death: ranks that may end without a result, or be stopped; they are killed once the others are done.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) if host_store == "parent" else None
        ranks = [
            _Rank(rank, world_size, folder, function, args, timeout, store.port if store else None)
            for rank in range(world_size)
        ]
        try:
            return _watch(ranks, timeout, expect_death)
        finally:
            for rank in ranks:
                rank.process.kill()  # also where it is stopped
                rank.process.join()


class _Rank:
    """A process, and what it has sent so far."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        folder: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        timeout: float,
        port: int | None,
    ) -> None:
        self.rank = rank
        self.printed = Path(folder, f"rank-{rank}.txt")
        self.messages, sender = _context.Pipe(duplex=False)
        where = (function.__code__.co_filename, function.__qualname__)
        self.began = time.monotonic()
        self.process = _context.Process(
            target=_live, args=(sender, rank, world_size, folder, where, args, timeout, port), daemon=True
        )
        with _environment(OMP_NUM_THREADS="1"):  # the fork server starts with the first process
            self.process.start()
        sender.close()
        self.told: Outcome | None = None

    def listen(self) -> None:
        """Take what it has sent, if it has."""
        if self.told is None and self.messages.poll():
            with contextlib.suppress(EOFError):
                self.told = Outcome(*self.messages.recv())

    def outcome(self) -> Outcome:
        self.listen()
        told = self.told or Outcome(seconds=time.monotonic() - self.began)
        output = self.printed.read_text(errors="replace") if self.printed.exists() else ""
        return Outcome(told.result, told.error, told.seconds, self.process.exitcode, output)


def _watch(ranks: list[_Rank], timeout: float, expect_death: Collection[int]) -> list[Outcome]:
    deadline = time.monotonic() + timeout
    while True:
        missing = [rank for rank in ranks if rank.process.is_alive() and rank.rank not in expect_death]
        if not missing:
            break
        if time.monotonic() >= deadline:
            outputs = "\n".join(f"rank {rank.rank}: {rank.outcome()}\n{rank.outcome().output}" for rank in ranks)
            raise TimeoutError(f"ranks {[rank.rank for rank in missing]} ran for {timeout:g} s\n{outputs}")
        senders: list[Any] = [rank.messages for rank in missing if rank.told is None]
        wait([*senders, *(rank.process.sentinel for rank in missing)], timeout=0.5)
        for rank in ranks:
            rank.listen()
    outcomes = [rank.outcome() for rank in ranks]
    for rank, outcome in zip(ranks, outcomes, strict=True):
        if rank.told is None and rank.rank not in expect_death:
            raise RuntimeError(f"rank {rank.rank} ended with {outcome.exit_code} and no word:\n{outcome.output}")
    return outcomes


def _live(
    sender: Connection,
    rank: int,
    world_size: int,
    folder: str,
    where: tuple[str, str],
    args: tuple[Any, ...],
    timeout: float,
    port: int | None,
) -> None:
    """In the process of a rank."""
    _end_with_parent()
    printed = os.open(Path(folder, f"rank-{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    faulthandler.dump_traceback_later(max(timeout - 1, 0.5), file=sys.__stderr__)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    began = time.monotonic()
    try:
        store = _store(rank, world_size, folder, port)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=30))
        function = _function(*where)
        began = time.monotonic()
        result = function(*args)
        sender.send((result, None, time.monotonic() - began))
    except Exception as error:
        traceback.print_exc()
        sender.send((None, Failure(type(error).__name__, str(error)), time.monotonic() - began))
        raise SystemExit(1) from None


def _store(rank: int, world_size: int, folder: str, port: int | None) -> dist.TCPStore:
    """A client of the store at `port`; or the one that rank 0 keeps, at a port that it leaves in a file."""
    limit = timedelta(seconds=30)
    if port is None:
        ports = dist.FileStore(str(Path(folder, "port")), world_size)
        if rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, None, True, limit, wait_for_workers=False)
            ports.set("port", str(store.port))
            return store
        port = int(ports.get("port"))
    return dist.TCPStore("127.0.0.1", port, None, False, limit)


def _function(path: str, name: str) -> Callable[..., Any]:
    """By its file: under pytest a test module has no name to import it by."""
    module_name = f"spawned_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, name)
    return function


def _end_with_parent() -> None:
    """If pytest is killed, so are its ranks: Linux sees to it, also if they are stopped."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@contextlib.contextmanager
def _environment(**variables: str) -> Any:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
