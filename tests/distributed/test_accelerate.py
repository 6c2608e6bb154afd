"""Under accelerate on two ranks: where only one rank pulls, our error ends it; over a prepared loader all is well."""

from __future__ import annotations

import os
import socket
from collections import Counter
from typing import Any

import torch.distributed as dist
from spawned import run_ranks
from torch.utils.data import DataLoader, Dataset, IterableDataset

import flowstream as fs

NUM_SAMPLES, BATCH = 83, 4


class Samples(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": index, "loss": 0.1 + index % 7}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accelerator_on(port: int) -> Any:
    """As after `accelerate launch --cpu`: it makes the process group, with torch's own timeout of half an hour."""
    from accelerate import Accelerator

    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    return accelerator


def stream_over(loader: Any, **settings: Any) -> fs.FlowStream:
    scorer = fs.FunctionScorer(lambda batch: batch["loss"].float(), name="given")
    settings |= {"temperature": fs.RunningMedian(warmup_samples=16), "window": 4, "cache": None}
    return fs.FlowStream(loader, scorer, **settings)


def pull_through_the_dispatcher(port: int) -> str:
    accelerator = accelerator_on(port)
    stream = stream_over(DataLoader(Samples(), batch_size=BATCH), timeout=5.0)  # in place of 45 s for the first next()
    dispatcher = accelerator.prepare(DataLoader(stream, batch_size=None))
    next(iter(dispatcher))
    return type(dispatcher).__name__


def test_a_prepared_loader_over_the_stream_ends_in_an_error_that_says_why_instead_of_a_hang():
    puller, waiter = run_ranks(pull_through_the_dispatcher, 2, free_port(), timeout=100)
    assert puller.error is not None
    assert puller.error.type == "RankError"
    assert puller.error.text.startswith("rank 1 did not come")
    assert "accelerator.prepare" in puller.error.text
    assert "prepare the inner loader, then wrap it in a FlowStream" in puller.error.text
    assert puller.seconds < 60
    # It waits in accelerate's broadcast, which ends with the process of the other one.
    assert waiter.error is not None
    assert waiter.seconds < puller.seconds + 10


def walk_over_a_prepared_loader(port: int) -> dict[str, Any]:
    accelerator = accelerator_on(port)
    loader = accelerator.prepare(DataLoader(Samples(), batch_size=BATCH))
    with stream_over(loader) as stream:
        batches = [(batch["id"].tolist(), batch["flow_weight"].tolist()) for batch in stream]
        return {"batches": batches, "length": len(stream), "tau": stream.metrics()["flow/tau"].hex()}


def test_over_a_prepared_loader_each_rank_gets_its_share_and_one_tau():
    outcomes = run_ranks(walk_over_a_prepared_loader, 2, free_port(), timeout=60)
    assert [outcome.error for outcome in outcomes] == [None, None], outcomes[0].output
    first, second = (outcome.result for outcome in outcomes)
    assert len(first["batches"]) == len(second["batches"]) == first["length"] == second["length"]
    assert first["tau"] == second["tau"]
    ids = [Counter(index for ids, _ in one["batches"] for index in ids) for one in (first, second)]
    assert set(ids[0] | ids[1]) == set(range(NUM_SAMPLES))
    # accelerate fills the last batches up with the data set's first samples (even_batches).
    assert max((ids[0] + ids[1]).values()) <= 2


class Streamed(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Any:
        return iter([Samples()[index] for index in range(NUM_SAMPLES)])


def wrap_a_dispatcher(port: int) -> None:
    accelerator = accelerator_on(port)
    stream_over(accelerator.prepare(DataLoader(Streamed(), batch_size=BATCH)))


def test_a_dispatcher_as_the_loader_is_refused():
    for outcome in run_ranks(wrap_a_dispatcher, 2, free_port(), timeout=60):
        assert str(outcome.error).startswith("ValueError: loader is accelerate's DataLoaderDispatcher")
        assert "dispatch_batches=False" in str(outcome.error)
