"""A FlowStream as a stage of a webdataset pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from flowstream.scoring.base import Scorer
from flowstream.stream import FlowStream


class Stage:
    """A function from an iterator of batches to an iterator of batches, as webdataset composes them.

    Owns one `FlowStream`, its `stream`, so that τ and the cache go on from epoch to epoch.
    """

    def __init__(self, scorer: Scorer, **settings: Any) -> None:
        self._upstream = _Upstream()
        self.stream = FlowStream(self._upstream, scorer, **settings)

    def __call__(self, batches: Iterable[Any]) -> Iterator[Any]:
        self._upstream.batches = batches
        return iter(self.stream)


def stage(scorer: Scorer, **settings: Any) -> Stage:
    """A stage that weighs or resamples the batches of a webdataset pipeline, in the main process.

    Takes the keyword arguments of `FlowStream`; `stage(…).stream` has its metrics and state.

    >>> loader = wds.WebLoader(dataset, batch_size=None).compose(fs.stage(scorer))  # doctest: +SKIP
    """
    return Stage(scorer, **settings)


class _Upstream:
    """The part of the pipeline before the stage, which is another iterator every epoch."""

    def __init__(self) -> None:
        self.batches: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)
