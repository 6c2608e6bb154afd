"""Pulls batches from any loader, ahead of their use, and remembers where it stood."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Source(Protocol):
    """A loader whose position can be told and taken up again."""

    def start(self) -> None:
        """Begin an epoch."""

    def pull(self) -> Any:
        """The next batch; `StopIteration` at the end of the epoch; whatever the loader raises."""

    def snapshot(self) -> dict[str, Any]:
        """Where the loader stands after the batches pulled so far: plain values that no later pull changes."""

    def restore(self, snapshot: dict[str, Any], passed: Sequence[int] = ()) -> None:
        """Begin an epoch at that place. `passed`: before which batches the loader raised, and was asked to go on."""

    def close(self) -> None: ...


class ReplaySource:
    """Any iterable, resumed by replaying: batches that were pulled before are pulled again and dropped.

    Exact where the loader delivers the same batches again in the same epoch.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader
        self._iterator: Iterator[Any] | None = None
        self._num_pulled = 0

    def start(self) -> None:
        self._iterator = iter(self._loader)
        self._num_pulled = 0

    def pull(self) -> Any:
        if self._iterator is None:
            self.start()
        assert self._iterator is not None
        batch = next(self._iterator)
        self._num_pulled += 1
        return batch

    def snapshot(self) -> dict[str, Any]:
        return {"num_batches": self._num_pulled}

    def restore(self, snapshot: dict[str, Any], passed: Sequence[int] = ()) -> None:
        self.start()
        rest = list(passed)
        while self._num_pulled < snapshot["num_batches"]:
            try:
                self.pull()
            except StopIteration:
                raise RuntimeError(
                    f"the loader ended after {self._num_pulled} batches, but the state was taken after "
                    f"{snapshot['num_batches']}: resume with the loader (data, batch size, shuffling seed) that the "
                    "state was taken with"
                ) from None
            except Exception as error:
                if self._num_pulled not in rest:
                    error.add_note(f"raised by the loader at batch {self._num_pulled}, which is replayed for a resume")
                    raise
                rest.remove(self._num_pulled)

    def close(self) -> None:
        self._iterator = None


@dataclass(frozen=True, eq=False)
class Pulled:
    """A batch and its ordinal in the epoch, counted from 0."""

    batch: Any
    ordinal: int


class ReadAhead:
    """The queue of batches between the loader and the windows. It owns the position in the epoch.

    What the loader raises waits in the queue behind the batches that came before it, until `reraise`.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._queue: deque[Pulled] = deque()
        self._snapshots: deque[tuple[int, dict[str, Any]]] = deque()
        self._num_pulled = 0
        self._error: Exception | None = None
        self._passed: list[int] = []
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
        self._source.restore(state["snapshot"], [at for at in self._passed if at <= state["ordinal"]])
        rest = [at for at in self._passed if at > state["ordinal"]]
        while self._num_pulled < ordinal:
            if self.pull():
                self._queue.clear()
            elif self._error is not None and self._num_pulled in rest:
                self._error = None  # it was raised before, and passed over
                rest.remove(self._num_pulled)
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
        if not self._snapshots or self._num_pulled - self._snapshots[-1][0] >= self.snapshot_every:
            self._snapshots.append((self._num_pulled, self._source.snapshot()))
        started = time.perf_counter()
        try:
            batch = self._source.pull()
        except StopIteration:
            self._ended = True
            return False
        except Exception as error:
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

    def peek(self) -> Any:
        """The batch that `take` gives next; one must be queued."""
        return self._queue[0].batch

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def next_ordinal(self) -> int:
        """The ordinal of the batch that `take` gives next."""
        return self._num_pulled - len(self._queue)

    @property
    def stopped(self) -> bool:
        """Whether nothing more can be pulled: the epoch has ended, or an error waits."""
        return self._ended or self._error is not None

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
        while len(self._snapshots) > 1 and self._snapshots[1][0] <= ordinal:
            self._snapshots.popleft()
        if not self._snapshots:
            return {"ordinal": self._num_pulled, "snapshot": self._source.snapshot(), "passed": list(self._passed)}
        at, snapshot = self._snapshots[0]
        return {"ordinal": at, "snapshot": snapshot, "passed": [before for before in self._passed if before <= ordinal]}

    def close(self) -> None:
        self._clear(0)
        self._source.close()

    def _clear(self, ordinal: int) -> None:
        self._queue.clear()
        self._snapshots.clear()
        self._num_pulled = ordinal
        self._error = None
        self._passed = []
        self._ended = False
