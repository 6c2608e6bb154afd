"""A stream as Lightning iterates over it: it knows the batch that was trained on last, though one more is fetched."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from flowstream.integrations.epoch_end import check_ended
from flowstream.stream import FlowStream


class FlowLoader:
    """A stream as Lightning iterates over it, which remembers the position of the batch that was trained on last.

    Lightning fetches a batch ahead of a loader without a length, to know which is the last one.
    """

    def __init__(self) -> None:
        self.has_callback = False
        self.num_trained = 0
        self._num_delivered = 0
        self._stream: FlowStream | None = None
        # Before each of the last batches delivered: one is being trained on, and one may be fetched ahead.
        self._states: deque[dict[str, Any]] = deque(maxlen=2)

    @property
    def has_begun(self) -> bool:
        """Whether there is a stream."""
        return self._stream is not None

    @property
    def stream(self) -> FlowStream:
        """What is iterated over. `RuntimeError` before it is built."""
        if self._stream is None:
            raise RuntimeError("the stream is built when trainer.fit begins: it is not there yet")
        return self._stream

    def begin(self, stream: FlowStream) -> None:
        """Take the stream."""
        self._stream = stream

    def __iter__(self) -> Iterator[Any]:
        if not self.has_callback:
            raise ValueError(
                "the loader of a FlowCallback is iterated over, and the Trainer does not have the callback: "
                "Trainer(callbacks=[callback])"
            )
        if self._num_ahead and not self.stream._is_one_pass:
            self.load(self.state())  # what was fetched and not trained on comes again
        batches = iter(self.stream)
        while True:
            before = self.stream._state()
            try:
                batch = next(batches)
            except StopIteration:
                check_ended(self.stream)
                return
            self._states.append(before)
            self._num_delivered += 1
            yield batch

    def __len__(self) -> int:
        """Batches an epoch on every rank; `TypeError` where nobody can tell."""
        return len(self.stream)

    def end(self) -> None:
        """The epoch is over for Lightning: what the stream still has of it (`limit_train_batches`) is not to come."""
        stream = self.stream
        self.num_trained = self._num_delivered
        if stream._active is not None and not stream.end_of_epoch and not stream._is_one_pass:
            stream.set_epoch(stream.epoch + 1)

    def state(self) -> dict[str, Any]:
        """The stream's, at the batch that was trained on last."""
        newest = self.stream.state_dict()
        return self._states[-self._num_ahead] if self._num_ahead else newest

    def load(self, state: dict[str, Any]) -> None:
        """Let the next `iter()` go on there."""
        self.stream.load_state_dict(state)
        self.num_trained = self._num_delivered
        self._states.clear()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: Lightning keeps a loader's state of rank 0 only, and asks whether there is this method."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: the callback has loaded it."""

    @property
    def _num_ahead(self) -> int:
        return self._num_delivered - self.num_trained
