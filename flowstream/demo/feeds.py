"""The six methods, as what each of them feeds to the same training loop."""

import random
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

import flowstream as fs
from flowstream.demo.offline import OfflineFlow, OfflineWeighted
from flowstream.demo.shards import Encoder, open_shards

METHODS = {
    "standard": "standard fine-tuning",
    "exact": "FLOW, exact offline τ",
    "weighted": "flowstream, weighted",
    "resampled": "flowstream, resampled",
    "permuted": "permuted weights",
    "subsampled": "uniform subsample",
}
"""Name → how a reader knows it. The resampler goes before the subsample, which takes its count from it."""

BASELINE = "standard"
CONTROL = "permuted"
"""The same weights on other samples: what it gains as well is not owed to which samples are weighted."""

SCORING = ("exact", "weighted", "resampled", "permuted")
"""The methods that score problems, and so have less FLOPs left to train with."""

Batches = Iterable[dict[str, Tensor]]


@dataclass(kw_only=True)
class Tap:
    """A loader that remembers which problems passed: what a stream had to score, however far it reads ahead."""

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

    def take(self, num_batches: int) -> Iterator[dict[str, Tensor]]:
        """The first batches, of as many epochs as that needs."""
        return islice(self._epochs(), num_batches)

    def score_tokens(self) -> int:
        """Tokens that the reference has scored so far, each problem counted once (the cache remembers it)."""
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
            yield from self._batches


@dataclass(frozen=True, kw_only=True)
class Feeds:
    """Where the feeds of one seed come from: the same shards, the same order, the same scorer for every method."""

    shards: tuple[Path, ...]
    encoder: Encoder
    lengths: list[int]
    """Tokens of each problem, by its number."""
    batch: int
    seed: int
    scorer: "fs.CausalLMScorer"
    window: int
    """Batches in a window of the stream."""
    warmup_samples: int
    offline: OfflineFlow

    def open(self, method: str, subset: frozenset[int] | None = None) -> Feed:
        """What `method` trains on; `subset` are the problems that a uniform subsample keeps."""
        loader = open_shards(self.shards, self.encoder, batch=self.batch, seed=self.seed, only=subset)
        match method:
            case "standard" | "subsampled":
                return Feed(loader)
            case "exact":
                weighted = OfflineWeighted(loader=loader, flow=self.offline)
                return Feed(weighted, scored=range(len(self.lengths)), lengths=self.lengths)
            case "weighted":
                return self._stream(loader, mode="weight")
            case "resampled":
                return self._stream(loader, mode="resample")
            case "permuted":
                return self._stream(loader, mode="weight", policy=fs.Permuted(fs.Flow()))
            case _:
                raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")

    def _stream(self, loader: Batches, **options: Any) -> Feed:
        tap = Tap(loader=loader)
        stream = fs.FlowStream(
            tap,
            self.scorer,
            temperature=fs.RunningMedian(warmup_samples=self.warmup_samples),
            window=self.window,
            seed=self.seed,
            **options,
        )
        return Feed(stream, stream, tap.passed, self.lengths)


def uniform_subset(num_problems: int, num_kept: int, seed: int) -> frozenset[int]:
    """`num_kept` problems, each as likely as any other."""
    return frozenset(random.Random(seed).sample(range(num_problems), num_kept))
