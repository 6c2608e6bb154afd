"""Several ranks over shards of unequal size: equally many batches, every sample once, one τ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from spawned import run_ranks
from torch import Tensor

import flowstream as fs

BATCH = 8
WINDOW = 4


def losses_of(rank: int, num: int) -> Tensor:
    """Of each shard another scale and law: the ranks' medians differ by a factor of ten."""
    generator = torch.Generator().manual_seed(rank)
    drawn = torch.rand(num, generator=generator, dtype=torch.float64).clamp(min=1e-9)
    return ((-drawn.log()) ** (1 + rank % 3) * (0.3 + rank)).float()


def shard(rank: int, num: int) -> list[dict[str, Tensor]]:
    losses = losses_of(rank, num)
    ids = torch.arange(num) + 1_000_000 * rank
    labels = torch.arange(num) % 5
    return [
        {"loss": losses[i : i + BATCH], "id": ids[i : i + BATCH], "labels": labels[i : i + BATCH]}
        for i in range(0, num, BATCH)
    ]


def by_key() -> fs.FunctionScorer:
    return fs.FunctionScorer(lambda batch: batch["loss"])


def walked(sizes: list[int], settings: dict[str, Any]) -> dict[str, Any]:
    """What one rank's stream delivers over its shard."""
    rank = torch.distributed.get_rank()
    settings = {"window": WINDOW, "cache": None, **settings}
    with fs.FlowStream(shard(rank, sizes[rank]), by_key(), **settings) as stream:
        length: int | None
        try:
            length = len(stream)
        except TypeError:
            length = None
        batches = list(stream)
        return {
            "length": length,
            "ids": [batch["id"].tolist() for batch in batches],
            "labels": [batch["labels"].tolist() for batch in batches],
            "weight": [batch["flow_weight"].tolist() if "flow_weight" in batch else None for batch in batches],
            "tau": [float(batch["flow_tau"]).hex() for batch in batches],
            "metrics": stream.metrics(),
        }


SIZES = {2: [8 * 40 + 3, 50], 4: [300, 0, 41, 130], 8: [64, 0, 333, 8, 120, 1, 90, 240]}


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("warmup", [16, 100])
def test_padded_every_sample_comes_once_and_all_ranks_take_as_many_steps(world_size, warmup):
    sizes = SIZES[world_size]
    settings = {"include": ("tau",), "temperature": fs.RunningMedian(warmup_samples=warmup)}
    found = [outcome.result for outcome in run_ranks(walked, world_size, sizes, settings)]
    longest = max(-(-num // BATCH) for num in sizes)
    assert [len(one["ids"]) for one in found] == [longest] * world_size
    assert [one["length"] for one in found] == [longest] * world_size
    for rank, one in enumerate(found):
        weighed = [i for ids, weight in zip(one["ids"], one["weight"], strict=True) if any(weight) for i in ids]
        assert weighed == (torch.arange(sizes[rank]) + 1_000_000 * rank).tolist()
        for labels, weight in zip(one["labels"], one["weight"], strict=True):
            assert any(weight) or set(labels) == {-100}
        assert one["tau"] == found[0]["tau"]
    padded = sum(longest - -(-num // BATCH) for num in sizes)
    assert found[0]["metrics"]["flow/padded_batches"] == padded
    assert found[0]["metrics"]["flow/samples_seen"] == sum(sizes)
    check_taus(sizes, warmup, found[0])


def check_taus(sizes: list[int], warmup: int, one: dict[str, Any]) -> None:
    """τ of every batch against the median over all ranks' windows before it; the first: its own."""
    num_batches = len(one["tau"])
    first = max(WINDOW, -(-warmup // sum(min(num, BATCH) for num in sizes)))
    starts = [0, *range(first, num_batches, WINDOW), num_batches]
    for number, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        seen = (starts[1] if number == 0 else start) * BATCH
        union = np.concatenate([losses_of(rank, num)[:seen].double().numpy() for rank, num in enumerate(sizes)])
        for tau in one["tau"][start:end]:
            assert float.fromhex(tau) == pytest.approx(np.median(union), rel=0.002)
