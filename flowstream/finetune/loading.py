"""What is learned, and this rank's loader of it: tokens in memory in a seeded order, or shards that stream."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import webdataset as wds
from torch.utils.data import DataLoader

from flowstream.elastic_sampler import ElasticDistributedSampler
from flowstream.finetune.collate import Collate
from flowstream.finetune.encoding import Encoder
from flowstream.finetune.records import is_sharded
from flowstream.finetune.shards import token_stream
from flowstream.finetune.tokens import TokenDataset, read_tokens


@dataclass(frozen=True)
class Material:
    """The samples to learn."""

    dataset: TokenDataset | None
    """All of them, in memory; `None` where they stream."""

    shards: str
    """What names them; of no use where `dataset` has all."""

    @classmethod
    def of(cls, spec: str, encoder: Encoder, *, split: str) -> Material:
        """Read and tokenise what is no shard, so that its errors come before training.

        Raises:
            ValueError, OSError: what `read_tokens` says.
        """
        return cls(None if is_sharded(spec) else read_tokens(spec, encoder, split=split), spec)

    def loader(
        self, encoder: Encoder, *, batch_size: int, seed: int | None, shuffle: int = 0, num_workers: int = 0
    ) -> Iterable[Any]:
        """This rank's batches: in every process that resumes, the same. Without a `seed`, in order.

        `shuffle` samples wait in the buffer that streamed ones are drawn from, and `num_workers` processes read them.
        """
        collate = Collate.of(encoder.tokenizer)
        if self.dataset is not None:
            sampler = ElasticDistributedSampler(self.dataset, shuffle=seed is not None, seed=seed or 0)
            return DataLoader(self.dataset, batch_size=batch_size, sampler=sampler, collate_fn=collate)
        stream = token_stream(self.shards, encoder, seed=seed or 0, shuffle=0 if seed is None else shuffle)
        batches: Iterable[Any] = stream.batched(batch_size, collation_fn=collate)
        return wds.WebLoader(batches, batch_size=None, num_workers=num_workers) if num_workers else batches
