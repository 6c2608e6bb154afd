"""Hugging Face `IterableDataset`: resumed by its own state, or, where a shuffle buffer is not in it, by replaying."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from flowstream.sources.base import Source
from flowstream.sources.counted import CountedSource
from flowstream.sources.replay import FromTheBeginning
from flowstream.sources.stateful import StatefulSource

NAME = "datasets.iterable_dataset.IterableDataset"

_BUFFER = "BufferShuffledExamplesIterable"


def source_of_iterable_dataset(dataset: Any) -> Source:
    """Its state is exact, but leaves out what waits in the buffer of `.shuffle()`: that is made again by replaying."""
    if shuffles(dataset):
        return CountedSource(dataset, FromTheBeginning(described=described(dataset)))
    # A state that was loaded stays with the data set, and would begin every epoch of that number anew.
    return StatefulSource(dataset, forget=lambda: dataset.load_state_dict({}), has_legacy=False)


def shuffles(dataset: Any) -> bool:
    """Whether `dataset` is one of Hugging Face's, with a shuffle buffer."""
    return any(True for _ in _buffers(dataset))


def described(dataset: Any) -> dict[str, Any]:
    """The generators of its shuffles, as a hash: `.shuffle()` without a seed has others in each process."""
    states = [repr(buffer.generator.bit_generator.state) for buffer in _buffers(dataset)]
    if not states:
        return {}
    return {"shuffle(seed=…) drawn from generator": hashlib.sha256(json.dumps(states).encode()).hexdigest()[:8]}


def _buffers(dataset: Any) -> Iterator[Any]:
    waiting = [getattr(dataset, "_ex_iterable", None)]
    while waiting:
        part = waiting.pop()
        if part is None:
            continue
        if type(part).__name__ == _BUFFER:
            yield part
        waiting.append(getattr(part, "ex_iterable", None))
        waiting.extend(getattr(part, "ex_iterables", ()))
