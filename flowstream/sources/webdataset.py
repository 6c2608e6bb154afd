"""webdataset's pipelines, which have no state: whole shards are skipped where that is exact, else batches replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from flowstream.sources import pipelines
from flowstream.sources.base import Snapshot
from flowstream.sources.counted import CountedSource
from flowstream.sources.dataloader import draws_of
from flowstream.sources.draws import Draws
from flowstream.sources.pipelines import Pipeline


def source_of_pipeline(pipeline: Any) -> CountedSource:
    """Of a `WebDataset`, `WebLoader`, `DataPipeline`. In the main process, without buffers, shards are skipped."""
    return CountedSource(pipeline, ByShard(pipelines.flat(pipeline)))


class ByShard:
    """Enters a pipeline at a shard, and there behind the samples that were passed: read, but not decoded again.

    Stages are put in while the pipeline is asked for its iterator, and taken out again: before shards are opened,
    behind the samples, and before they are put into batches. Counters of epochs and the seeds of shuffles are
    remembered with the position.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.caveat = pipelines.caveat_of(pipeline)
        self._pipeline = pipeline
        self._span = pipelines.span_of_samples(pipeline)
        self.kind = "replay" if self._span is None else "shards"
        self._reading = _Reading(0, 0)
        loader = pipeline.loader
        self._draws = Draws({}, shared=False) if loader is None else draws_of(loader)

    def described(self) -> dict[str, Any]:
        loader: DataLoader[Any] | None = self._pipeline.loader
        return {"num_workers": 0 if loader is None else loader.num_workers}

    def remember(self, *, own: bool = False) -> Snapshot:
        return {"stages": pipelines.counters_of(self._pipeline), "draws": self._draws.remember(own=own)}

    def place(self) -> Snapshot:
        if self._span is None:
            return {}
        shard, sample = self._reading.place if self._span.batched is None else self._reading.before
        return {"shard": shard, "sample": sample}

    @contextmanager
    def enter(self, memory: Snapshot | None, place: Snapshot, num_passed: int) -> Iterator[Callable[[], bool]]:
        if memory is not None:
            pipelines.set_counters(self._pipeline, memory["stages"])
        with self._draws.as_in(None if memory is None else memory["draws"]):
            if self._span is None:
                yield lambda: num_passed == 0
                return
            span = self._span
            reading = self._reading = _Reading(place.get("shard", 0), place.get("sample", 0))
            stages = [(span.opener, reading.shards), (span.samples, reading.samples)]
            if span.batched is not None:
                stages.append((span.batched, reading.before_a_batch))
            before = [(steps, list(steps)) for (steps, _), _ in stages]
            for (steps, at), stage in reversed(stages):
                steps.insert(at, stage)
            try:
                yield lambda: True
            finally:
                for steps, kept in before:
                    steps[:] = kept


class _Reading:
    """Where an epoch stands: the number of the shard that the last sample came from, and how many were read of it.

    Owns the stages that count, and leave out what was passed.
    """

    def __init__(self, shard: int, sample: int) -> None:
        self.shard = shard
        self.sample = sample
        self.before = (shard, sample)
        """Where it stood before the sample that a batch waits for, to know that it is full."""
        self._opened: list[Any] = []

    @property
    def place(self) -> tuple[int, int]:
        return self.shard, self.sample

    def shards(self, shards: Iterator[Any]) -> Iterator[Any]:
        for shard in islice(shards, self.shard, None):
            self._opened.append(shard["url"] if isinstance(shard, dict) else shard)
            yield shard

    def samples(self, samples: Iterator[Any]) -> Iterator[Any]:
        passed, self.sample = self.sample, 0
        # Counted, too, for they may reach into the shards behind.
        for number, sample in enumerate(samples):
            while len(self._opened) > 1 and sample.get("__url__") != self._opened[0]:
                self._opened.pop(0)
                self.shard += 1
                self.sample = 0
            self.sample += 1
            if number >= passed:
                yield sample

    def before_a_batch(self, samples: Iterator[Any]) -> Iterator[Any]:
        place = self.place
        for sample in samples:
            self.before, place = place, self.place
            yield sample
        self.before = self.place
