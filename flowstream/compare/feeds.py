"""What the training loop is fed: the loader as it is, a part of it, or a FlowStream over it; and what that costs."""

import random
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from torch import Tensor

import flowstream as fs

FEEDS = ("standard", "flow", "flow-token", "resample", "permuted", "subsample")
"""The loader; weighted by sample or token; drawn by the weights; weights permuted over samples; a uniform part."""

SCORING = frozenset({"flow", "flow-token", "resample", "permuted"})
"""Those that score samples, and so have less FLOPs left to train with."""

Batches = Iterable[dict[str, Tensor]]


@dataclass(kw_only=True)
class Tap:
    """A loader that remembers which samples passed: what a stream had to score, however far it reads ahead."""

    loader: Batches
    passed: set[int] = field(default_factory=set)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.loader:
            self.passed.update(batch["sample"].tolist())
            yield batch


class Feed(AbstractContextManager["Feed"]):
    """Batches without end, and what they cost. Leaving the context closes the stream behind it."""

    def __init__(
        self,
        batches: Batches,
        stream: "fs.FlowStream | None" = None,
        scored: Collection[int] = (),
        lengths: list[int] | None = None,
    ) -> None:
        self._batches, self._stream, self._scored, self._lengths = batches, stream, scored, lengths or []

    def take(self, num_batches: int | None) -> Iterator[dict[str, Tensor]]:
        """The first batches, or all without end, of as many epochs as that needs."""
        return islice(self._epochs(), num_batches)

    def score_tokens(self) -> int:
        """Tokens that the reference has scored so far, each sample counted once (the cache remembers it)."""
        return sum(self._lengths[number] for number in self._scored)

    def metrics(self) -> dict[str, float]:
        """The stream's metrics; empty where there is no stream."""
        return self._stream.metrics() if self._stream is not None else {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def _epochs(self) -> Iterator[dict[str, Tensor]]:
        while True:
            before = None
            for before in self._batches:
                yield before
            if before is None:
                raise ValueError("an epoch had no batch: give more samples, or a smaller batch")


@dataclass(frozen=True, kw_only=True)
class Feeds:
    """Where the feeds of one seed come from: the same samples, the same order, the same scorer for every method."""

    open_loader: Callable[[frozenset[int] | None], Batches]
    """A loader in the seed's order, of all samples or of those with these numbers; batches have `sample` [B], too."""
    lengths: list[int]
    """Tokens of each sample, by its number."""
    seed: int
    scorer: "fs.CausalLMScorer"
    window: int
    """Batches in a window of the stream."""
    warmup_samples: int
    cache: Path | Literal["memory"] = "memory"
    """Where losses are found."""

    def open(self, name: str, subset: frozenset[int] | None = None) -> Feed:
        """One of `FEEDS`; `subset` are the samples that a uniform subsample keeps."""
        loader = self.open_loader(subset)
        match name:
            case "standard" | "subsample":
                return Feed(loader)
            case "flow":
                return self._stream(loader, mode="weight")
            case "flow-token":
                return self._stream(loader, mode="weight", level="token")
            case "resample":
                return self._stream(loader, mode="resample")
            case "permuted":
                return self._stream(loader, mode="weight", policy=fs.Permuted(fs.Flow()))
            case _:
                raise ValueError(f"feed {name!r} is none of {', '.join(FEEDS)}")

    def _stream(self, loader: Batches, **options: Any) -> Feed:
        tap = Tap(loader=loader)
        stream = fs.FlowStream(
            tap,
            self.scorer,
            temperature=fs.RunningMedian(warmup_samples=self.warmup_samples),
            window=self.window,
            cache=self.cache,
            seed=self.seed,
            **options,
        )
        return Feed(stream, stream, tap.passed, self.lengths)


def uniform_subset(num_samples: int, num_kept: int, seed: int) -> frozenset[int]:
    """`num_kept` samples, each as likely as any other."""
    return frozenset(random.Random(seed).sample(range(num_samples), num_kept))
