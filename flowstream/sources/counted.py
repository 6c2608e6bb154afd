"""A loader that is resumed by a count: passed batches are skipped where its entrance can, pulled again where not."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from flowstream.sources.base import Snapshot

_logger = logging.getLogger("flowstream")

_TELL_EVERY = 10.0
"""Seconds between two lines about a replay."""


class Entrance(Protocol):
    """How a loader is entered: from its beginning, or, where it can be, behind batches that are not loaded again."""

    @property
    def kind(self) -> str: ...

    @property
    def caveat(self) -> str: ...

    def described(self) -> dict[str, Any]:
        """How the loader is built, as far as its order follows from it: must be the same for a resume."""

    def remember(self, *, own: bool = False) -> Snapshot:
        """What the order of an epoch depends on that is entered now, such as the states of generators.

        `own`: only what belongs to the loader, and to nobody else.
        """

    def place(self) -> Snapshot:
        """Where the loader stands now, beyond the count, if there is more to tell."""

    def enter(
        self, memory: Snapshot | None, place: Snapshot, num_passed: int
    ) -> AbstractContextManager[Callable[[], bool]]:
        """While the iterator and its first batch are asked for. What it gives tells whether `num_passed` are skipped.

        `memory`: what was remembered, for an epoch that is entered again; `None` for one that begins now. On leaving,
        the loader is what it was.
        """


class CountedSource:
    """Counts what was pulled. Owns the loader's iterator, and what the order of its epoch depends on.

    Exact where the loader, entered under the same conditions, delivers the same batches.
    """

    def __init__(self, loader: Iterable[Any], entrance: Entrance) -> None:
        self._loader = loader
        self._entrance = entrance
        self._iterator: Iterator[Any] | None = None
        self._first: list[Callable[[], Any]] = []
        self._memory: Snapshot = {}
        self._inherited: Snapshot | None = None
        self._place: Snapshot = {}
        self._num_pulled = 0
        self._raised: list[int] = []

    @property
    def kind(self) -> str:
        return self._entrance.kind

    @property
    def caveat(self) -> str:
        return self._entrance.caveat

    def start(self) -> None:
        inherited, self._inherited = self._inherited, None
        self._begin(self._entrance.remember() | (inherited or {}))
        if inherited is not None:
            self._enter(inherited, {}, 0)

    def pull(self) -> Any:
        if self._iterator is None:
            self._enter(None, {}, 0)
        assert self._iterator is not None
        try:
            if self._first:
                batch = self._first.pop()()
            else:
                batch = next(self._iterator)
                self._place = self._entrance.place()
        except StopIteration:
            raise
        except Exception:
            self._raised.append(self._num_pulled)
            raise
        self._num_pulled += 1
        return batch

    def snapshot(self) -> Snapshot:
        return {
            "described": self._entrance.described(),
            "num_batches": self._num_pulled,
            "raised": list(self._raised),
            "memory": self._memory,
            "place": self._place,
        }

    def restore(self, snapshot: Snapshot) -> None:
        for name, ours in self._entrance.described().items():
            theirs = snapshot["described"].get(name)
            if theirs != ours:
                raise ValueError(
                    f"the state was taken with a loader of {name}={theirs}, this one has {name}={ours}: its batches "
                    "would be others. Build the loader as it was"
                )
        self._begin(snapshot["memory"])
        num_batches, raised = snapshot["num_batches"], snapshot["raised"]
        if self._enter(snapshot["memory"], snapshot["place"], num_batches + len(raised)):
            self._num_pulled, self._raised = num_batches, list(raised)
        else:
            self._replay(num_batches, raised)

    def legacy(self) -> Snapshot:
        return {"described": self._entrance.described(), "memory": self._entrance.remember(own=True)}

    def inherit(self, legacy: Snapshot) -> None:
        self._inherited = legacy["memory"]

    def close(self) -> None:
        self._iterator = None
        self._first = []

    def _begin(self, memory: Snapshot) -> None:
        self.close()
        self._memory, self._place, self._num_pulled, self._raised = memory, {}, 0, []

    def _enter(self, memory: Snapshot | None, place: Snapshot, num_passed: int) -> bool:
        """Ask for the iterator and the first batch. True if `num_passed` batches were skipped."""
        with self._entrance.enter(memory, place, num_passed) as skipped:
            self._iterator = iter(self._loader)
            batch: Any = None
            error: Exception | None = None
            try:
                batch = next(self._iterator)
            except Exception as caught:
                error = caught
            has_skipped = skipped()
        after = self._entrance.place()
        self._place = place if has_skipped else {}

        def first() -> Any:
            if error is not None:
                raise error
            self._place = after
            return batch

        self._first = [first]
        return has_skipped

    def _replay(self, num_batches: int, raised: list[int]) -> None:
        """Pull so many batches again, and drop them."""
        began = told = time.monotonic()
        rest = list(raised)
        while self._num_pulled < num_batches or rest:
            try:
                self.pull()
            except StopIteration:
                raise RuntimeError(
                    f"the loader ended after {self._num_pulled} batches, but the state was taken after {num_batches}: "
                    "resume with the loader (data, batch size, shuffling seed) that the state was taken with"
                ) from None
            except Exception as error:
                if self._num_pulled not in rest:
                    error.add_note(f"raised by the loader at batch {self._num_pulled}, which is replayed for a resume")
                    raise
                rest.remove(self._num_pulled)
            now = time.monotonic()
            if now - told >= _TELL_EVERY:
                told, rate = now, self._num_pulled / (now - began)
                _logger.warning(
                    "resuming by replaying the loader: %d of %d batches, %.3g a second, %.0f s to go",
                    self._num_pulled,
                    num_batches,
                    rate,
                    (num_batches - self._num_pulled) / max(rate, 1e-9),
                )
        if num_batches:
            _logger.info("resumed by replaying %d batches in %.1f s", num_batches, time.monotonic() - began)
