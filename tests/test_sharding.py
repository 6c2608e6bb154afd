"""What each rank reads: over all ranks every sample once, peers the same, and a rank with nothing ends quietly."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import pickle
import random
from collections.abc import Iterable
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import webdataset as wds
from resuming import take, through_a_file
from spawned import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

import flowstream as fs
from flowstream import sharding
from flowstream.distributed.world import World
from flowstream.elastic_sampler import ElasticDistributedSampler
from flowstream.sharding import split_by_rank, webdataset_splitters

SIZES = (7, 1, 5, 9, 2)
"""Samples of each shard."""
NUM = sum(SIZES)


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("shards")
    ids = itertools.count()
    paths = [str(folder / f"part-{shard}.tar") for shard in range(len(SIZES))]
    for path, size in zip(paths, SIZES, strict=True):
        with wds.TarWriter(path) as writer:
            for _ in range(size):
                writer.write({"__key__": f"{next(ids):03d}", "loss.json": 1.0})
    return paths


def worlds(world_size: int) -> list[World]:
    return [World(rank, world_size, tuple(range(world_size)), (rank,), rank) for rank in range(world_size)]


def ids_of(samples: Iterable[dict[str, Any]]) -> list[int]:
    return [int(sample["__key__"]) for sample in samples]


def shards_of(ids: list[int]) -> set[int]:
    ends = list(itertools.accumulate(SIZES))
    return {next(shard for shard, end in enumerate(ends) if i < end) for i in ids}


# -- webdataset ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "num_workers"), [(1, 0), (2, 0), (3, 0), (5, 0), (7, 0), (2, 2), (3, 2), (7, 2)]
)
def test_over_all_ranks_and_workers_every_sample_is_read_once(world_size, num_workers, urls):
    parts = []
    for world in worlds(world_size):
        dataset = wds.WebDataset(urls, shardshuffle=False, **webdataset_splitters(world))
        parts.append(ids_of(wds.WebLoader(dataset, batch_size=None, num_workers=num_workers)))
        assert shards_of(parts[-1]) == set(range(world.rank, len(SIZES), world_size))
    assert sorted(itertools.chain(*parts)) == list(range(NUM))
    assert all(not part for part in parts[len(SIZES) :])


def test_the_splitters_are_stages_of_a_pipeline(urls):
    parts = []
    for world in worlds(2):
        split = webdataset_splitters(world)
        stages = [split["nodesplitter"], split["workersplitter"], wds.tarfile_to_samples()]
        # Shuffled before they are split, with one seed for all ranks: in each epoch other shards.
        epochs = wds.DataPipeline(wds.SimpleShardList(urls), wds.detshuffle(9, seed=1), *stages)
        parts.append([ids_of(epochs) for _ in range(4)])
    for ids in zip(*parts, strict=True):
        assert sorted(itertools.chain(*ids)) == list(range(NUM))
    assert len({frozenset(shards_of(epoch)) for epoch in parts[0]}) > 1


def test_peers_read_the_same_shards_where_webdatasets_own_splitter_goes_by_global_rank(urls, monkeypatch):
    """Four processes, two data-parallel ranks of two tensor-parallel peers each."""
    ours, theirs = [], []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "4")
        world = World(rank // 2, 2, (rank % 2, rank % 2 + 2), (rank // 2 * 2, rank // 2 * 2 + 1), rank)
        ours.append(ids_of(wds.WebDataset(urls, shardshuffle=False, **webdataset_splitters(world))))
        theirs.append(ids_of(wds.WebDataset(urls, shardshuffle=False, nodesplitter=wds.split_by_node)))
    assert ours[0] == ours[1]
    assert ours[2] == ours[3]
    assert sorted(ours[0] + ours[2]) == list(range(NUM))
    assert sorted(itertools.chain(*theirs)) == list(range(NUM))


def test_without_them_webdataset_raises_where_a_rank_has_no_shard(urls):
    splitters = webdataset_splitters(worlds(7)[6])
    assert ids_of(wds.WebDataset(urls, shardshuffle=False, **splitters)) == []
    with pytest.raises(ValueError, match="No samples found in dataset"):
        ids_of(wds.WebDataset(urls, shardshuffle=False, **splitters | {"empty_check": True}))


@pytest.mark.parametrize("context", ["fork", "forkserver"])  # the latter pickles, as "spawn" does, and is faster here
def test_the_world_goes_with_the_splitter_into_worker_processes(context, urls):
    dataset = wds.WebDataset(urls, shardshuffle=False, **webdataset_splitters(worlds(2)[1]))
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context)
    assert sorted(ids_of(loader)) == [7, *range(13, 22)]  # shards 1 and 3
    assert ids_of(pickle.loads(pickle.dumps(dataset))) == [7, *range(13, 22)]


def test_splitting_draws_on_no_generator_of_the_users(urls):
    shards = [{"url": url} for url in urls]
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    splitters = webdataset_splitters(worlds(2)[0])
    assert list(splitters["workersplitter"](splitters["nodesplitter"](shards))) == shards[::2]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == before[2]).all()


def test_endless_shards_are_split_as_they_come():
    splitter = webdataset_splitters(worlds(3)[1])["nodesplitter"]
    assert list(itertools.islice(splitter(itertools.count()), 4)) == [1, 4, 7, 10]


@pytest.mark.parametrize(
    ("world_size", "num_workers", "message"),
    [
        (5, 0, ""),
        (2, 2, ""),
        (7, 0, "5 webdataset shards for 7 ranks: 2 ranks have nothing to read"),
        (7, 2, "5 webdataset shards for 7 ranks: 2 ranks have nothing to read"),
        (3, 2, "5 webdataset shards for 3 ranks with 2 workers each: 1 workers have nothing to read"),
    ],
)
def test_too_few_shards_are_told_once_over_ranks_workers_and_epochs(world_size, num_workers, message, urls, tmp_path):
    told = tmp_path / "told"
    handler = logging.FileHandler(told)  # a file, since workers write to it too
    logging.getLogger("flowstream").addHandler(handler)
    try:
        for world in (*worlds(world_size)[:2], World(0, world_size, tuple(range(world_size)), (9, 0), 0)):
            dataset = wds.WebDataset(urls, shardshuffle=False, **webdataset_splitters(world))
            for _ in range(2):
                list(wds.WebLoader(dataset, batch_size=None, num_workers=num_workers))
    finally:
        logging.getLogger("flowstream").removeHandler(handler)
        handler.close()
    lines = told.read_text().splitlines()
    assert len(lines) == bool(message)
    assert all(message in line for line in lines)


by_loss = fs.FunctionScorer(lambda batch: batch["loss"], name="by loss")


def decoded(sample: dict[str, Any]) -> dict[str, Any]:
    number = int(sample["__key__"])
    return {"loss": torch.tensor(0.5 + number % 7), "id": torch.tensor(number)}


def stream_of(urls: list[str], world: World, num_workers: int = 0, shuffles: bool = False) -> fs.FlowStream:
    shuffle = {"shardshuffle": 9, "detshuffle": True, "seed": 3} if shuffles else {"shardshuffle": False}
    dataset = wds.WebDataset(urls, **shuffle, **webdataset_splitters(world)).map(decoded).batched(2, default_collate)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=num_workers)
    return fs.FlowStream(loader, by_loss, window=2, temperature=fs.RunningMedian(warmup_samples=4), cache=None)


@pytest.mark.parametrize(
    ("num_workers", "shuffles", "kind", "stops"),
    [(0, False, "shards", range(14)), (0, True, "shards", range(14)), (2, False, "replay", (5, 9))],
)
def test_a_stream_over_a_ranks_shards_is_resumed_exactly(num_workers, shuffles, kind, stops, urls):
    def stream() -> fs.FlowStream:
        return stream_of(urls, worlds(2)[0], num_workers, shuffles)

    with stream() as uninterrupted:
        assert (uninterrupted._reader._source.kind, uninterrupted._reader.caveat) == (kind, "")
        whole = [batch["id"].tolist() for batch in take(uninterrupted, max(stops) + 3)]
    for stop in stops:
        with stream() as first:
            take(first, stop)
            state = through_a_file(first.state_dict())
        with stream() as second:
            second.load_state_dict(state)
            assert [batch["id"].tolist() for batch in take(second, 3)] == whole[stop : stop + 3]


def test_a_stream_over_no_shard_ends_at_once(urls):
    for num_workers in (0, 2):
        with stream_of(urls, worlds(7)[6], num_workers) as stream:
            assert list(stream) == []
            assert list(stream) == []


# -- Hugging Face ----------------------------------------------------------------------------------


def rows(num_shards: int | None = None) -> Any:
    dataset = datasets.Dataset.from_dict({"id": list(range(NUM))})
    return dataset if num_shards is None else dataset.to_iterable_dataset(num_shards=num_shards)


@pytest.mark.parametrize(("num_shards", "world_size"), [(None, 3), (None, 1), (4, 2), (4, 3), (4, 1), (2, 4)])
def test_over_all_ranks_every_row_is_read_once(num_shards, world_size, caplog):
    parts = [[row["id"] for row in split_by_rank(rows(num_shards), world)] for world in worlds(world_size)]
    assert sorted(itertools.chain(*parts)) == list(range(NUM))
    peer = World(world_size - 1, world_size, tuple(range(world_size)), (8, 9), 9)
    assert [row["id"] for row in split_by_rank(rows(num_shards), peer)] == parts[-1]
    told = [record.getMessage() for record in caplog.records if record.name == "flowstream"]
    reads_all = num_shards is not None and num_shards % world_size > 0
    assert len(told) == reads_all
    assert all(f"num_shards={num_shards}, no multiple of {world_size} ranks" in line for line in told)


@pytest.mark.parametrize("num_shards", [4, 3])
def test_every_row_is_read_once_with_workers_too(num_shards):
    parts = [
        [int(i) for batch in DataLoader(split_by_rank(rows(num_shards), world), 4, num_workers=2) for i in batch["id"]]
        for world in worlds(2)
    ]
    assert sorted(itertools.chain(*parts)) == list(range(NUM))


@pytest.mark.parametrize("num_shards", [4, 3])
def test_a_stream_over_a_ranks_rows_is_resumed_exactly(num_shards):
    def stream() -> fs.FlowStream:
        part = split_by_rank(rows(num_shards), worlds(2)[1]).batch(2).with_format("torch")
        scorer = fs.FunctionScorer(lambda batch: 1.0 + batch["id"] % 5, name="by id")
        return fs.FlowStream(part, scorer, window=2, temperature=fs.RunningMedian(warmup_samples=4), cache=None)

    whole = [batch["id"].tolist() for batch in take(stream(), 12)]
    for stop in range(9):
        first, second = stream(), stream()
        take(first, stop)
        second.load_state_dict(through_a_file(first.state_dict()))
        assert [batch["id"].tolist() for batch in take(second, 3)] == whole[stop : stop + 3]


class MapStyle(Dataset[int]):
    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> int:
        return index


class Streamed(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(NUM))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (MapStyle, r"got a MapStyle: .* sampler=ElasticDistributedSampler\(dataset\)"),
        (Streamed, "got a Streamed: an iterable data set must leave out the other ranks' samples itself"),
        (lambda: wds.DataPipeline([1]), r"got a DataPipeline: .* \*\*webdataset_splitters\(\)"),
        (lambda: datasets.DatasetDict(train=rows()), r'got a DatasetDict: .* dataset\["train"\]'),
    ],
)
def test_other_data_sets_are_refused_with_what_to_take(make, message):
    with pytest.raises(ValueError, match=message):
        split_by_rank(make(), World())


# -- ranks -----------------------------------------------------------------------------------------


def test_a_launched_process_without_torch_distributed_is_told_that_it_reads_everything(urls, monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    sharding._tell_of_launcher.cache_clear()
    for _ in range(2):
        assert len(ids_of(wds.WebDataset(urls, shardshuffle=False, **webdataset_splitters()))) == NUM
        assert len(ElasticDistributedSampler(NUM)) == NUM
    assert caplog.text.count("the launcher started 2 processes (WORLD_SIZE), but torch.distributed is not") == 1
    sharding._tell_of_launcher.cache_clear()


def read_by_rank(urls: list[str], sampler: ElasticDistributedSampler) -> dict[str, list[int]]:
    """What this rank reads of each kind of data set: as one of two data-parallel ranks, and as one of two peers."""
    multiprocessing.current_process().daemon = False  # else it could have no workers
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    found = {"sampler": list(sampler), "peer sampler": list(ElasticDistributedSampler(NUM, process_group=mesh["dp"]))}
    for name, group in (("", None), ("peer ", mesh["dp"])):
        dataset = wds.WebDataset(urls, shardshuffle=False, **webdataset_splitters(group))
        found[f"{name}shards"] = ids_of(wds.WebLoader(dataset, batch_size=None, num_workers=1))
        found[f"{name}rows"] = [row["id"] for row in split_by_rank(rows(4), group)]
    return found


def test_two_processes_read_every_sample_once_and_peers_the_same(urls):
    sampler = ElasticDistributedSampler(NUM)  # built where there are no ranks yet
    one, two = (outcome.result for outcome in run_ranks(read_by_rank, 2, urls, sampler))
    for name in ("sampler", "shards", "rows"):
        assert sorted(one[name] + two[name]) == list(range(NUM)), name
        assert one["peer " + name] == two["peer " + name], name
        assert sorted(one["peer " + name]) == list(range(NUM)), name
