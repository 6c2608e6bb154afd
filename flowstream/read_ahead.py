"""The queue of batches between the loader and the windows, and where the loader stood before each window."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flowstream.batch import num_samples
from flowstream.sources import Snapshot, Source

_logger = logging.getLogger("flowstream")


@dataclass(frozen=True, eq=False)
class Pulled:
    """A batch and its ordinal in the epoch, counted from 0."""

    batch: Any
    ordinal: int
    is_counted: bool = False
    """Whether its losses are in τ already: it was put back after them."""


@dataclass(frozen=True, eq=False)
class _Stand:
    """Where the loader stood."""

    ordinal: int
    """Batches it had delivered."""
    num_passed: int
    """Errors it had raised and that were passed over."""
    snapshot: Snapshot


class ReadAhead:
    """The queue of batches between the loader and the windows. It owns the position in the epoch.

    What the loader raises waits in the queue behind the batches that came before it, until `reraise`.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._queue: deque[Pulled] = deque()
        self._snapshots: deque[_Stand] = deque()
        self._legacy: Snapshot = {}
        self._num_pulled = 0
        self._error: Exception | None = None
        self._passed: list[int] = []
        self._to_pass: list[int] = []
        self._ended = False
        self.snapshot_every = 1
        """Batches between two snapshots of the loader: a window's."""
        self.seconds = 0.0
        """Time spent waiting for the loader."""

    def start(self) -> None:
        """Begin an epoch."""
        self._clear(0)
        self._source.start()

    def resume(self, state: dict[str, Any], ordinal: int) -> None:
        """Go to the batch `ordinal` of an epoch by a `state_for` some batch at or before it."""
        self._clear(state["ordinal"])
        self._passed = list(state["passed"])
        self._to_pass = self._passed[state["num_passed"] :]
        if state["kind"] == self._source.kind:
            self._source.restore(state["snapshot"])
        else:
            _logger.warning(
                "the state was taken over a loader that is resumed by %s, this one is resumed by %s: its batches are "
                "counted, which is exact if it delivers the same",
                state["kind"],
                self._source.kind,
            )
            self._clear(0)
            self._source.start()
            self._passed, self._to_pass = list(state["passed"]), list(state["passed"])
        while self._num_pulled < ordinal:
            if self.pull():
                self._queue.clear()
            else:
                self.reraise()
                raise RuntimeError(
                    f"the loader ended at batch {self._num_pulled}, but the state needs batch {ordinal}: resume with "
                    "the loader that the state was taken with"
                )

    def pull(self) -> bool:
        """Pull one batch into the queue; False at the end of the epoch, or while an error waits to be raised."""
        if self._ended or self._error is not None:
            return False
        if not self._snapshots or self._num_pulled - self._snapshots[-1].ordinal >= self.snapshot_every:
            self._snapshots.append(self._stand())
        started = time.perf_counter()
        try:
            batch = self._source.pull()
        except StopIteration:
            self._legacy = self._source.legacy()
            self._ended = True
            return False
        except Exception as error:
            if self._num_pulled in self._to_pass:  # it was raised before, and passed over
                self._to_pass.remove(self._num_pulled)
                return self.pull()
            self._error = error
            return False
        finally:
            self.seconds += time.perf_counter() - started
        self._queue.append(Pulled(batch, self._num_pulled))
        self._num_pulled += 1
        return True

    def take(self) -> Pulled | None:
        """The next batch, pulled now if none is queued; `None` where `pull` is False."""
        if not self._queue and not self.pull():
            return None
        return self._queue.popleft()

    def put_back(self, items: Sequence[Pulled]) -> None:
        """Queue again what was taken last, so that `take` gives it next."""
        self._queue.extendleft(reversed(items))

    def peek(self, place: int = 0) -> Any:
        """The batch at this place in the queue: 0 is what `take` gives next, -1 what was pulled last."""
        return self._queue[place].batch

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def num_queued_samples(self) -> int:
        return sum(num_samples(item.batch) for item in self._queue)

    @property
    def next_ordinal(self) -> int:
        """The ordinal of the batch that `take` gives next."""
        return self._num_pulled - len(self._queue)

    @property
    def stopped(self) -> bool:
        """Whether nothing more can be pulled: the epoch has ended, or an error waits."""
        return self._ended or self._error is not None

    @property
    def failed(self) -> bool:
        """Whether an error of the loader's waits to be raised."""
        return self._error is not None

    @property
    def exhausted(self) -> bool:
        """Whether the epoch has ended and nothing is queued."""
        return self._ended and not self._queue

    def reraise(self, where: str = "", *, at_once: bool = False) -> None:
        """Raise the loader's error, if one waits behind an empty queue. The next pull then goes on where it can.

        `at_once`: do not wait for the batches that came before it.
        """
        if self._error is not None and (at_once or not self._queue):
            error, self._error = self._error, None
            self._passed.append(self._num_pulled)
            error.add_note(f"raised by the loader at batch {self._num_pulled} of {where or 'the epoch'}")
            raise error

    def state_for(self, ordinal: int) -> dict[str, Any]:
        """From where the batch `ordinal` can be reached; older snapshots are let go."""
        while len(self._snapshots) > 1 and self._snapshots[1].ordinal <= ordinal:
            self._snapshots.popleft()
        stand = self._snapshots[0] if self._snapshots else self._stand()
        return {
            "kind": self._source.kind,
            "ordinal": stand.ordinal,
            "snapshot": stand.snapshot,
            "passed": list(self._passed),
            "num_passed": stand.num_passed,
        }

    def legacy(self) -> dict[str, Any]:
        """What the epochs that are over leave to the next one."""
        return {"kind": self._source.kind, "left": self._legacy}

    def inherit(self, legacy: dict[str, Any]) -> None:
        """Let the next `start` follow the epochs that left this."""
        if legacy["kind"] == self._source.kind and legacy["left"]:
            self._source.inherit(legacy["left"])
            self._legacy = legacy["left"]

    @property
    def caveat(self) -> str:
        """What a resume does not give back exactly; empty where it gives back everything."""
        return self._source.caveat

    def close(self) -> None:
        if self._num_pulled and not self._ended:
            self._legacy = self._source.legacy()
        self._clear(0)
        self._source.close()

    def _stand(self) -> _Stand:
        return _Stand(self._num_pulled, len(self._passed), self._source.snapshot())

    def _clear(self, ordinal: int) -> None:
        self._queue.clear()
        self._snapshots.clear()
        self._num_pulled = ordinal
        self._error = None
        self._passed = []
        self._to_pass = []
        self._ended = False
