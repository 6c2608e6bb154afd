"""A loader with a state of its own: `state_dict` and `load_state_dict`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from flowstream.sources.base import Snapshot
from flowstream.sources.draws import Draws
from flowstream.sources.plain import from_plain, to_plain
from flowstream.sources.replay import replayed


class StatefulSource:
    """Keeps copies of the loader's state, each taken right after a batch: asked later, loaders tell another place.

    A state that cannot be kept is done without: then batches are counted, and replayed for a resume.

    Args:
        loader: has `state_dict()`, and `load_state_dict(state)` before `iter`.
        draws: generators that the loader's order is drawn from. They are put back to where they stood; at the end of an
            epoch, nothing else is kept.
        forget: lets the loader's next epoch begin anew, where a state that was loaded would come back.
        has_legacy: whether the loader's state at the end of an epoch tells how the next one begins, without `draws`.
    """

    kind = "state"

    def __init__(
        self,
        loader: Any,
        *,
        draws: Draws | None = None,
        forget: Callable[[], None] | None = None,
        has_legacy: bool = True,
    ) -> None:
        self.caveat = ""
        self._loader = loader
        self._draws = draws
        self._forget = forget
        self._has_legacy = has_legacy
        self._iterator: Iterator[Any] | None = None
        self._num_pulled = 0
        self._ended = False
        self._inherits = False
        self._stands: Snapshot | None = None

    def start(self) -> None:
        if self._forget is not None:
            self._forget()
            self._stands = {"num_batches": 0, "state": None, "draws": None}
        self._iterator = iter(self._loader)
        self._num_pulled = 0
        self._ended = False

    def pull(self) -> Any:
        if self._iterator is None:
            self.start()
        assert self._iterator is not None
        inherits, self._inherits = self._inherits, False
        self._stands = None
        try:
            batch = next(self._iterator)
        except StopIteration:
            if inherits:  # the end of the epoch before, resumed as an empty epoch
                self._iterator = iter(self._loader)
                return self.pull()
            self._ended = True
            raise
        self._num_pulled += 1
        return batch

    def snapshot(self) -> Snapshot:
        if self._stands is not None:
            return self._stands  # before its first batch, a loader may still tell the place that it stood at before
        draws = None if self._draws is None else self._draws.remember()
        return {"num_batches": self._num_pulled, "state": self._state(), "draws": draws}

    def restore(self, snapshot: Snapshot) -> None:
        self._ended = self._inherits = False
        if snapshot["state"] is None:
            self.start()
            if snapshot["num_batches"]:
                replay = replayed(_Rest(self))
                replay.restore(replay.snapshot() | {"num_batches": snapshot["num_batches"]})
            return
        self._loader.load_state_dict(from_plain(snapshot["state"]))
        self._iterator = iter(self._loader)
        if self._draws is not None:
            self._draws.recall(snapshot["draws"])
        self._num_pulled = snapshot["num_batches"]
        self._stands = snapshot

    def legacy(self) -> Snapshot:
        if self._draws is not None:
            return {"draws": self._draws.remember()}
        return {"state": self._state()} if self._has_legacy and self._ended else {}

    def inherit(self, legacy: Snapshot) -> None:
        if self._draws is not None:
            self._draws.recall(legacy["draws"])
        elif legacy["state"] is not None:
            self._loader.load_state_dict(from_plain(legacy["state"]))
            self._inherits = True

    def close(self) -> None:
        self._iterator = None

    def _state(self) -> Any:
        if self.caveat:
            return None
        try:
            return to_plain(self._loader.state_dict())
        except ValueError as error:
            self.caveat = (
                f"the state of {type(self._loader).__name__} cannot be kept ({error}): its batches are counted, and "
                "replayed for a resume. Let its state be plain values and tensors, or give flowstream.register_source "
                "a source for it"
            )
            return None


class _Rest:
    """A source that has been started, as an iterable."""

    def __init__(self, source: StatefulSource) -> None:
        self._source = source

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._source.pull()
