"""The six methods, as what each of them feeds to the same training loop."""

from dataclasses import dataclass
from pathlib import Path

import flowstream as fs
from flowstream.compare import feeds
from flowstream.compare.feeds import Batches, Feed
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

SCORING = ("exact", "weighted", "resampled", "permuted")
"""The methods that score problems, and so have less FLOPs left to train with."""

_FEEDS = {
    "standard": "standard",
    "weighted": "flow",
    "resampled": "resample",
    "permuted": "permuted",
    "subsampled": "subsample",
}


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
        if method == "exact":
            weighted = OfflineWeighted(loader=self._loader(None), flow=self.offline)
            return Feed(weighted, scored=range(len(self.lengths)), lengths=self.lengths)
        if method not in _FEEDS:
            raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
        shared = feeds.Feeds(
            open_loader=self._loader,
            lengths=self.lengths,
            seed=self.seed,
            scorer=self.scorer,
            window=self.window,
            warmup_samples=self.warmup_samples,
        )
        return shared.open(_FEEDS[method], subset)

    def _loader(self, subset: frozenset[int] | None) -> Batches:
        return open_shards(self.shards, self.encoder, batch=self.batch, seed=self.seed, only=subset)
