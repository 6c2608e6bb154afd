"""What gloo is asked for and how it is left: waits that end, its words, and groups that are let go of."""

from __future__ import annotations

import atexit
import ctypes
import threading
import time
import weakref
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import Tensor

__all__ = ["NEVER", "Meeting", "keep", "let_go", "words"]

NEVER = timedelta(days=30)
"""Gloo's own timeout. It names nobody, and runs from the start of a meeting: the clock of who waits is ours."""


@dataclass(frozen=True, eq=False)
class Meeting:
    """What gloo works on, and all that must not go before it is done."""

    number: int
    place: str
    work: Any
    outputs: list[Tensor]
    inputs: Tensor

    @property
    def is_over(self) -> bool:
        return bool(self.work.is_completed())

    def finish(self, seconds: float) -> Exception | None:
        """Wait so long. What gloo says, also that it is not done yet; nothing once the outputs are there."""
        try:
            self.work.wait(timedelta(seconds=max(seconds, 0.001)))
        except RuntimeError as error:
            return error
        return None


def words(error: Exception) -> str:
    """The first sentence of what gloo says, without where in its source it says so."""
    return str(error).strip().split("\n")[0].rpartition("] ")[2].split(". This is")[0][:200] or type(error).__name__


def keep(*kept: object) -> None:
    """Let go of them never, not even when the process ends: the destructor of a group waits for its meetings."""
    for one in kept:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))


def let_go(left: list[object]) -> None:
    """Destroy a group without meetings in a thread: it may take 20 s. `left` holds the only reference to it."""
    thread = threading.Thread(target=left.clear, name="flowstream lets go of a group", daemon=True)
    _leaving.add(thread)
    thread.start()


_leaving: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _await_leaving() -> None:
    """A thread that comes back from gloo while the interpreter goes down would take the process with it."""
    deadline = time.monotonic() + 1.0
    for thread in list(_leaving):
        thread.join(max(deadline - time.monotonic(), 0.0))
