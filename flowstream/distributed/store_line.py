"""The line to the store of torch.distributed: one connection of this process' own, on which nobody waits too long."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]  # it is documented

__all__ = ["StoreError", "StoreGone", "StoreLine", "StoreSilent"]

_T = TypeVar("_T")

_Questions = queue.SimpleQueue[tuple[Callable[[Store], Any], Future[Any]] | None]

_MAX_UNSENT = 100
"""Words that nobody waits for are dropped beyond so many: the store may hang for as long as the ranks do without it."""


class StoreError(Exception):
    """The store has not answered."""


class StoreGone(StoreError):
    """The connection is broken: who keeps the store has ended, or cannot be reached."""


class StoreSilent(StoreError):
    """There was no answer in time: who keeps the store was stopped, or is slow."""


class StoreLine:
    """Owns a connection to the store, and the one thread that talks on it, for all streams of this process.

    A connection of its own: what hangs on it stops nobody else, nor does what hangs on torch's stop it. One for all:
    to accept a connection the store looks up its name, and where that lookup fails it answers nobody for 5 s.
    """

    def __init__(self, store: Store) -> None:
        self._process = os.getpid()
        self._questions: _Questions = queue.SimpleQueue()
        thread = threading.Thread(
            target=_answer,
            args=(store, self._questions),
            name="flowstream talks to the store",
            daemon=True,
        )
        thread.start()
        weakref.finalize(self, _hang_up, self._questions, thread)

    @classmethod
    def of_process(cls) -> StoreLine:
        """The line of this process to the store of the default process group, which must be there."""
        group = dist.group.WORLD
        assert group is not None
        line = _lines.get(group)
        if line is None or line._process != os.getpid():
            line = _lines[group] = cls(group.get_group_store())
        return line

    def send(self, question: Callable[[Store], _T]) -> Future[_T]:
        """What the store will have answered: the question is asked in the thread, after those before it."""
        answer: Future[_T] = Future()
        if self._process == os.getpid():
            self._questions.put((question, answer))
        else:  # a forked worker has the connection of its parent, and no thread
            answer.set_exception(StoreGone("in a process that was forked"))
        return answer

    def tell(self, word: Callable[[Store], object]) -> None:
        """Send a word that may get lost, without waiting."""
        if self._questions.qsize() < _MAX_UNSENT:
            self.send(word)

    def ask(self, question: Callable[[Store], _T], seconds: float = 10.0) -> _T:
        """What the store answers..

        Raises:
            StoreGone, StoreSilent: it does not, within `seconds`.
        """
        try:
            return self.send(question).result(seconds)
        except TimeoutError:
            raise StoreSilent(f"no answer within {seconds:g} s") from None
        except RuntimeError as error:
            raise StoreGone(str(error)) from error


_lines: weakref.WeakKeyDictionary[ProcessGroup, StoreLine] = weakref.WeakKeyDictionary()
"""The line for the default process group, for as long as that is not destroyed; streams keep theirs longer."""


def _answer(store: Store, questions: _Questions) -> None:
    """In the thread, until the line is gone."""
    line = _connect(store)
    del store
    while (asked := questions.get()) is not None:
        question, answer = asked
        try:
            if isinstance(line, Exception):
                raise RuntimeError(str(line))
            answer.set_result(question(line))
        except Exception as error:
            answer.set_exception(error)
        del asked, question, answer


def _connect(store: Store) -> Store | Exception:
    """A connection of its own, or why there is none. Where nobody keeps the store any more torch tries for minutes."""
    made: queue.SimpleQueue[Store | Exception] = queue.SimpleQueue()

    def connect() -> None:
        try:
            made.put(store.clone())  # type: ignore[attr-defined]
        except Exception as error:
            made.put(error)

    threading.Thread(target=connect, name="flowstream connects to the store", daemon=True).start()
    while True:
        try:
            return made.get(timeout=0.5)
        except queue.Empty:
            try:
                store.check(["flowstream"])  # torch's connection: at once an error, if the store is gone
            except RuntimeError as error:
                return error


def _hang_up(questions: _Questions, thread: threading.Thread) -> None:
    """Let the thread end: in the store while the interpreter goes down, it would take the process with it."""
    questions.put(None)
    if thread is not threading.current_thread():
        with contextlib.suppress(RuntimeError):
            thread.join(1.0)
