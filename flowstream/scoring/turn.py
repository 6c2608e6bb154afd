"""One thread at a time in a model: while it is scored, its attention, modes and adapters are not the caller's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn


class InUse(RuntimeError):
    """The model may not be entered from here now, whatever it is asked."""


@dataclass
class _Turn:
    lock: threading.Lock = field(default_factory=threading.Lock)
    thread: int | None = None
    """The one inside."""


_turns: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()
_guard = threading.Lock()


@contextmanager
def turn(model: nn.Module, *, waits: bool) -> Iterator[None]:
    """The model is this thread's. Where it is another's, wait for it, or raise `InUse`."""
    with _guard:
        own = _turns.setdefault(model, _Turn())
    here = threading.get_ident()
    if own.thread == here:
        raise InUse("the model is being scored by this thread already: do not score within its forward")
    if not own.lock.acquire(blocking=waits):
        raise InUse(
            f"the shared model is being scored in another thread ({own.thread}), which has exchanged its attention "
            "meanwhile: pass copy=True, so that each scorer has a model of its own"
        )
    own.thread = here
    try:
        yield
    finally:
        own.thread = None
        own.lock.release()
