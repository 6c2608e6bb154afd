"""A stream as accelerate knows its prepared loaders: it says itself where an epoch ends, though it has read ahead."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from torch.utils.data import IterableDataset

from flowstream.integrations.epoch_end import check_ended
from flowstream.stream import FlowStream


class StreamLoader(DataLoaderStateMixin, IterableDataset[Any]):
    """Owns accelerate's `GradientState.end_of_dataloader` while its stream is iterated over.

    accelerate steps the optimizer at the end of a loader, however many micro-batches are accumulated, and a prepared
    loader that a stream has wrapped reaches its end a window before training does. So the inner loader is silenced, and
    this one tells.

    Args:
        stream: over the loader that accelerate has prepared, or any other.
        is_endless: begin the next epoch where one ends: of a loader without a length, trainers that count steps know
            no epochs, and would leave what is accumulated at an end for later.
        place: what is done to a batch as it is delivered: moved to a device.
    """

    def __init__(
        self, stream: FlowStream, inner: Any, *, is_endless: bool = False, place: Callable[[Any], Any] | None = None
    ) -> None:
        self.stream = stream
        self.inner = inner
        self.gradient_state = GradientState()
        self.num_skipped = 0
        """Placeholders that stand, once, for the batches before the position resumed."""
        self._drop_last = True  # nothing is repeated to fill up a batch: metrics are gathered as they are
        self._is_endless = is_endless
        self._place = place
        if hasattr(inner, "gradient_state"):
            inner.gradient_state = _Silent()

    def __iter__(self) -> Iterator[Any]:
        num_skipped, self.num_skipped = self.num_skipped, 0
        yield from itertools.repeat(None, num_skipped)
        self.begin()
        try:
            while True:
                is_empty = True
                for batch in self._epoch():
                    is_empty = False
                    self.end_of_dataloader = self.stream.end_of_epoch and not self._is_endless
                    yield batch if self._place is None else self._place(batch)
                if not is_empty:
                    check_ended(self.stream)
                if is_empty or not self._is_endless:
                    return
        finally:
            self.end()

    def _epoch(self) -> Iterator[Any]:
        """The batches of the stream's next epoch."""
        batches = iter(self.stream)
        with self._draws_of_its_own():
            first = list(itertools.islice(batches, 1))
        yield from itertools.chain(first, batches)

    @contextmanager
    def _draws_of_its_own(self) -> Iterator[None]:
        """Lets a later epoch of an endless loader draw its workers' seeds beside torch's generator.

        A trainer puts that generator back behind the batches that it passes over: where these end an epoch, it would
        take back what the next one has drawn already.
        """
        number = self.stream.epoch + self.stream.end_of_epoch
        if not self._is_endless or number == 0:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed((torch.initial_seed() + number) % 2**63)
            yield

    def __len__(self) -> int:
        """Batches an epoch on every rank; `TypeError` where nobody can tell."""
        if self._is_endless:
            raise TypeError("epochs follow one another without an end: count steps (max_steps)")
        return len(self.stream)

    def set_epoch(self, epoch: int) -> None:
        """Let the next `iter()` begin this epoch."""
        if not self._is_endless:
            self.stream.set_epoch(epoch)

    # What accelerate.skip_first_batches asks of a loader, to drop the first batches of what is iterated over.
    batch_size = None
    drop_last = False
    prefetch_factor = None

    @property
    def dataset(self) -> StreamLoader:
        """Itself: an iterable data set of whole batches."""
        return self

    @staticmethod
    def collate_fn(batch: Any) -> Any:
        """A batch is one already."""
        return batch


class _Silent:
    """Stands where a prepared loader would report its beginning and its end."""

    def _add_dataloader(self, loader: object) -> None:
        pass

    def _remove_dataloader(self, loader: object) -> None:
        pass
