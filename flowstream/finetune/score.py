"""One offline pass: every sample's loss into a cache, by the same stream that would score it in training."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from flowstream.finetune.loading import Material
from flowstream.finetune.paths import make_folder
from flowstream.finetune.pretrained import load_scorer, load_tokenizer
from flowstream.finetune.quiet import quiet
from flowstream.finetune.settings import Texts
from flowstream.scoring.base import Level
from flowstream.stream import FlowStream


@quiet()
def score(model: str, data: str, texts: Texts, *, cache: Path, level: Level, bf16: bool, batch_size: int) -> str | None:
    """Fill the cache; what came of it in words, on the first rank.

    Raises:
        ValueError, OSError: what the user can mend, in one line.
    """
    encoder = texts.encoder(load_tokenizer(model))
    material = Material.of(data, encoder, split=texts.split)
    make_folder("--cache", cache)
    is_one_of_many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if is_one_of_many:
        dist.init_process_group("gloo")
    try:
        scorer = load_scorer(model, bf16=bf16, device=device)
        loader = material.loader(encoder, batch_size=batch_size, seed=None)
        started = time.perf_counter()
        with FlowStream(loader, scorer, level=level, cache=cache, progress=not dist.is_initialized()) as stream:
            for _ in stream:
                pass
            metrics = stream.metrics()
        if is_one_of_many and dist.get_rank() != 0:
            return None
    finally:
        if is_one_of_many:
            dist.destroy_process_group()
    seconds = time.perf_counter() - started
    return (
        f"{metrics['flow/samples_seen']:,.0f} samples in {seconds:.1f} s, {metrics['flow/cache_hit_rate']:.0%} of them "
        f"known before; τ at their median is {metrics['flow/tau']:.4f} nats. Train with --cache {cache}"
    )
