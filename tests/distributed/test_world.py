"""The world in real processes: from nothing, a group, a mesh, and its dimensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from spawned import run_ranks
from torch.distributed import init_device_mesh

from flowstream.distributed.world import World


def test_without_torch_distributed_the_world_is_one_process():
    assert World.of() == World()
    assert World().share(7) == 7
    assert list(World().shard("abc")) == ["a", "b", "c"]


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_shares_reach_the_whole_and_shards_are_a_partition(world_size):
    worlds = [World(rank, world_size, tuple(range(world_size))) for rank in range(world_size)]
    for num in range(20):
        shards = [list(world.shard(range(num))) for world in worlds]
        assert sorted(item for shard in shards for item in shard) == list(range(num))
        assert all(len(shard) <= world.share(num) for shard, world in zip(shards, worlds, strict=True))
        assert num <= sum(world.share(num) for world in worlds) < num + world_size


def look() -> dict[str, Any]:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    flat = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "tp"))
    flattened = flat["replicate", "shard"]._flatten("dp")
    pair = dist.new_group([1, 3])
    found = {
        "default": World.of(),
        "dp": World.of(mesh["dp"]),
        "flattened": World.of(flattened),
        "pair": World.of(pair) if rank in (1, 3) else None,
    }
    other = dist.new_group([0, 2])
    try:
        World.of(other if rank in (1, 3) else pair)
    except ValueError as error:
        found["outside"] = str(error)  # type: ignore[assignment]
    return found


def test_the_world_of_a_group_and_of_a_mesh_with_its_peers():
    for rank, outcome in enumerate(run_ranks(look, 4)):
        assert outcome.error is None, outcome.error
        found = outcome.result
        assert (found["default"].rank, found["default"].ranks) == (rank, (0, 1, 2, 3))
        assert (found["default"].local_rank, found["default"].node, found["default"].ranks_per_node) == (rank, 0, 4)
        for name in ("dp", "flattened"):
            assert found[name].rank == rank // 2
            assert found[name].ranks == (rank % 2, rank % 2 + 2)
            assert found[name].peers == (rank // 2 * 2, rank // 2 * 2 + 1)
            assert found[name].is_first_peer == (rank % 2 == 0)
        if rank in (1, 3):
            assert (found["pair"].rank, found["pair"].ranks, found["pair"].peers) == (rank // 2, (1, 3), (rank,))
        assert "not in the process_group" in found["outside"] or "rank" in found["outside"]
