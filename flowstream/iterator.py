"""The iterator that a stream hands out: lazily started, and over when a newer one has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from flowstream.epoch import Epoch, EpochEnd

if TYPE_CHECKING:
    from flowstream.stream import FlowStream


class FlowIterator:
    """Walks through one epoch of a stream, and ends where a newer iterator has started."""

    def __init__(self, stream: FlowStream) -> None:
        self._stream = stream
        self._epoch: Epoch | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if self._epoch is None:
            self._epoch = self._stream._begin(self)
        if self._stream._owner is not self:
            raise StopIteration
        try:
            return self._epoch.next()
        except EpochEnd:
            raise StopIteration from None
        except StopIteration as error:
            raise RuntimeError(
                f"a function called by flowstream raised StopIteration in {self._epoch.where}"
            ) from error
        except Exception as error:
            error.add_note(f"flowstream: in {self._epoch.where}")
            raise
        except BaseException:
            if not self._stream._is_one_pass:
                self._epoch.interrupt()
            raise
