"""A list of batches: resumed by index, nothing is read twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowstream.sources.base import Snapshot


class SequenceSource:
    """Batches that are numbered. Owns the number of the next one."""

    kind = "index"
    caveat = ""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches
        self._next = 0

    def start(self) -> None:
        self._next = 0

    def pull(self) -> Any:
        if self._next >= len(self._batches):
            raise StopIteration
        batch = self._batches[self._next]
        self._next += 1
        return batch

    def snapshot(self) -> Snapshot:
        return {"next": self._next}

    def restore(self, snapshot: Snapshot) -> None:
        if snapshot["next"] > len(self._batches):
            raise RuntimeError(
                f"the loader has {len(self._batches)} batches, but the state was taken after {snapshot['next']}: "
                "resume with the loader (data, batch size) that the state was taken with"
            )
        self._next = snapshot["next"]

    def legacy(self) -> Snapshot:
        return {}

    def inherit(self, legacy: Snapshot) -> None: ...

    def close(self) -> None: ...
