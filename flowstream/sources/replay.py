"""Any iterable: batches that were pulled before are pulled again and dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flowstream.sources.base import Snapshot
from flowstream.sources.counted import CountedSource
from flowstream.sources.draws import Draws


class FromTheBeginning:
    """Skips nothing. What generators the loader draws on is put back first, if `draws` knows them."""

    kind = "replay"

    def __init__(
        self, draws: Draws | None = None, caveat: str = "", described: Mapping[str, Any] | None = None
    ) -> None:
        self.caveat = caveat
        self._draws = Draws({}, shared=False) if draws is None else draws
        self._described = dict(described or {})

    def described(self) -> dict[str, Any]:
        return dict(self._described)

    def remember(self, *, own: bool = False) -> Snapshot:
        return self._draws.remember(own=own)

    def place(self) -> Snapshot:
        return {}

    @contextmanager
    def enter(self, memory: Snapshot | None, place: Snapshot, num_passed: int) -> Iterator[Callable[[], bool]]:
        with self._draws.as_in(memory):
            yield lambda: num_passed == 0


def replayed(loader: Iterable[Any]) -> CountedSource:
    """A source over any iterable. Exact where it delivers the same batches again in the same epoch."""
    return CountedSource(loader, FromTheBeginning())
