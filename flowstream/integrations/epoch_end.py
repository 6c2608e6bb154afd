"""Whether a trainer's epoch is over, or was ended by somebody else who iterates over the stream."""

from __future__ import annotations

from flowstream.stream import FlowStream


def check_ended(stream: FlowStream) -> None:
    """`RuntimeError` unless the epoch is over, for what iterates over it: a newer iterator may have ended it."""
    if not stream.end_of_epoch:
        raise RuntimeError(
            "the training data were iterated over again while they were trained on, which ends the epoch in hand: a "
            "callback that looks at the training loader? Let it look at a loader of its own"
        )
