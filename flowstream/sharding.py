"""Which part of the data this rank reads: webdataset's shards, and Hugging Face's data sets."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import get_worker_info

from flowstream.distributed.world import World
from flowstream.sources import huggingface

_logger = logging.getLogger("flowstream")

Ranks: TypeAlias = ProcessGroup | DeviceMesh | World | None
"""The data-parallel ranks: a group, the data-parallel dimensions of a mesh, a world; or the default group."""

_DatasetT = TypeVar("_DatasetT")
_Shard = TypeVar("_Shard")

_MAP_STYLE = "datasets.arrow_dataset.Dataset"


def webdataset_splitters(process_group: Ranks = None) -> dict[str, Any]:
    """Arguments of `wds.WebDataset` that give each data-parallel rank, and each of its workers, shards of its own.

    Rank r of R reads shards r, r + R, …: over all ranks every shard once, and tensor- or pipeline-parallel peers the
    same ones (webdataset's own `split_by_node` goes by the global rank). A rank or worker without a shard ends at once,
    in place of webdataset's error (`empty_check`); told once if there are fewer shards than ranks, or than workers.

    >>> dataset = wds.WebDataset(urls, shardshuffle=False, **fs.webdataset_splitters())  # doctest: +SKIP

    As stages of a `DataPipeline`:

    >>> split = fs.webdataset_splitters()  # doctest: +SKIP
    >>> pipeline = wds.DataPipeline(
    ...     wds.SimpleShardList(urls), split["nodesplitter"], split["workersplitter"], wds.tarfile_to_samples(), …
    ... )  # doctest: +SKIP

    The order of shards before the splitters must be the same on all ranks: shuffle shards there with a seed that all
    share, or behind the splitters, where `shardshuffle` does it. Peers read the same samples in the same order only if
    every shuffle has a seed (`seed=…`, `detshuffle`). `ResampledShards` draws by the global rank: to peers give the
    same `worker_seed`.

    Args:
        process_group: the data-parallel ranks, by default all. Looked up now, since worker processes know of no group:
            call this after `torch.distributed.init_process_group`.

    Raises:
        ValueError: what `World.of` says of a group.
    """
    from webdataset import split_by_worker

    splitter = ShardsOfRank(world_of(process_group))
    return {"nodesplitter": splitter, "workersplitter": split_by_worker, "empty_check": False}


def split_by_rank(dataset: _DatasetT, process_group: Ranks = None) -> _DatasetT:
    """This rank's part of a Hugging Face `Dataset` or `IterableDataset`: over all ranks every sample once.

    `datasets.distributed.split_dataset_by_node` by data-parallel rank, so that tensor- and pipeline-parallel peers get
    the same. An `IterableDataset` whose `num_shards` is no multiple of the number of ranks is read as a whole by every
    rank, which is told. `.shuffle(…)` needs the same seed on all ranks. Call it after
    `torch.distributed.init_process_group`, once.

    >>> dataset = fs.split_by_rank(load_dataset("c4", "en", split="train", streaming=True))  # doctest: +SKIP

    Raises:
        ValueError: another kind of data set, with what to take for it; or what `World.of` says of a group.
    """
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(dataset).__mro__}
    if not names & {huggingface.NAME, _MAP_STYLE}:
        raise ValueError(
            f"split_by_rank splits a Hugging Face Dataset or IterableDataset, and got a {type(dataset).__name__}: "
            + _instead(dataset, names)
        )
    from datasets.distributed import split_dataset_by_node

    world = world_of(process_group)
    if huggingface.NAME in names and world.speaks:
        num_shards: int = dataset.num_shards  # type: ignore[attr-defined]
        if num_shards % world.world_size:
            _logger.warning(
                "the IterableDataset has num_shards=%d, no multiple of %d ranks: each rank reads and maps all samples, "
                "and keeps one in %d. Take a number of files, or to_iterable_dataset(num_shards=…), that is a multiple",
                num_shards,
                world.world_size,
                world.world_size,
            )
    part: _DatasetT = split_dataset_by_node(dataset, rank=world.rank, world_size=world.world_size)
    return part


class ShardsOfRank:
    """A stage of a webdataset pipeline: of all shards, those of one data-parallel rank. Can be pickled."""

    def __init__(self, world: World) -> None:
        self._world = world
        # In shared memory, since workers are started anew for each epoch, and would each tell it again.
        self._has_told = torch.zeros((), dtype=torch.bool, device="cpu").share_memory_()

    def __call__(self, shards: Iterable[_Shard]) -> Iterator[_Shard]:
        worker = get_worker_info()
        num_workers, is_first = (1, True) if worker is None else (worker.num_workers, worker.id == 0)
        shards = iter(shards)
        first = list(itertools.islice(shards, self._world.world_size * num_workers))
        if is_first and self._world.speaks and not self._has_told:
            self._has_told.fill_(True)
            _tell_of_few(len(first), self._world.world_size, num_workers)
        return self._world.shard(itertools.chain(first, shards))


def world_of(process_group: Ranks) -> World:
    """The world itself, or that of a group; tells if the launcher started more processes than torch.distributed has."""
    if isinstance(process_group, World):
        return process_group
    if not (dist.is_available() and dist.is_initialized()):
        _tell_of_launcher(os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0"))
    return World.of(process_group)


def _tell_of_few(num_shards: int, world_size: int, num_workers: int) -> None:
    """`num_shards`: as many as there are, or one for each worker of each rank."""
    if num_shards < world_size:
        _logger.warning(
            "%d webdataset shards for %d ranks: %d ranks have nothing to read. A stream over them delivers batches of "
            "weight 0 there (on_uneven='pad'), or nothing on any rank ('stop'). Write at least %d shards",
            num_shards,
            world_size,
            world_size - num_shards,
            world_size * num_workers,
        )
    elif num_shards < world_size * num_workers:
        _logger.warning(
            "%d webdataset shards for %d ranks with %d workers each: %d workers have nothing to read. Take fewer "
            "workers, or write at least %d shards",
            num_shards,
            world_size,
            num_workers,
            world_size * num_workers - num_shards,
            world_size * num_workers,
        )


@functools.cache  # once a process
def _tell_of_launcher(world_size: str, rank: str) -> None:
    if world_size != "1" and rank == "0":
        _logger.warning(
            "the launcher started %s processes (WORLD_SIZE), but torch.distributed is not initialized: each of them "
            "reads all data. Call torch.distributed.init_process_group before the data are split",
            world_size,
        )


def _instead(dataset: object, names: set[str]) -> str:
    """What to take for a data set that is not split here."""
    if any(name.startswith("webdataset.") for name in names):
        return "build it with wds.WebDataset(urls, **webdataset_splitters())"
    if any(name.startswith("datasets.dataset_dict.") for name in names):
        return 'choose one of its splits, such as dataset["train"]'
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return "for a map-style data set take DataLoader(dataset, sampler=ElasticDistributedSampler(dataset), …)"
    return "an iterable data set must leave out the other ranks' samples itself, where it reads them"
