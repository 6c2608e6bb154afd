"""`flowstream score`: fill a cache with the reference's losses, for those who want an offline pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from flowstream.finetune.settings import Texts


@dataclass(frozen=True, kw_only=True)
class Score:
    """Fill a cache with a frozen model's losses, which `flowstream train --cache` then finds.

    Under torchrun each process takes its part of the samples.
    """

    model: str
    """Name or path of the frozen model and its tokenizer."""
    data: str
    """Texts to score: file.jsonl, tar shards as 'shards/{000000..000099}.tar', or hf:NAME."""
    cache: Path
    """Folder on a local disk, where the losses are kept."""
    texts: tyro.conf.OmitArgPrefixes[Texts] = field(default_factory=Texts)
    level: Literal["sample", "token"] = "sample"
    """As `flowstream train` will weigh: samples or tokens."""
    bf16: bool = False
    """As `flowstream train` will compute."""
    batch_size: int = 32
    """Samples that are read at once; scoring makes packs of its own."""

    def run(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch-size is {self.batch_size}: give 1 or more")
        from rich.console import Console

        from flowstream.finetune.score import score

        done = score(
            self.model,
            self.data,
            self.texts,
            cache=self.cache,
            level=self.level,
            bf16=self.bf16,
            batch_size=self.batch_size,
        )
        if done is not None:
            Console(highlight=False).print(done, soft_wrap=True)
