"""The world: which ranks share τ and keep in step, and which of them this process is."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["World"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """The ranks that read different data (data-parallel ones), and this process among them.

    All arithmetic on ranks is here. A world of one is a single process, whether or not torch.distributed runs.
    """

    rank: int = 0
    """This process among the data-parallel ranks, from 0."""
    world_size: int = 1
    """How many data-parallel ranks there are."""
    ranks: tuple[int, ...] = (0,)
    """Their ranks in the default process group, in their order."""
    peers: tuple[int, ...] = (0,)
    """The ranks, in the default process group, that read the same data as this one (tensor- and pipeline-parallel
    peers), this one among them. The first is whose losses count."""
    global_rank: int = 0
    """This process in the default process group."""
    local_rank: int = 0
    """This process among those of its node."""
    node: int = 0
    """The node, from 0."""
    ranks_per_node: int = 1
    """Processes that the launcher started on this node."""

    @classmethod
    def of(cls, process_group: ProcessGroup | DeviceMesh | None = None) -> World:
        """The world of a process group; of the default group if none is given; a single process if there is none.

        Args:
            process_group: the data-parallel ranks: a group, or a `DeviceMesh` of the data-parallel dimensions of a
                larger mesh, such as `mesh["dp"]` or `mesh["dp_replicate", "dp_shard"]`. Only from a mesh are tensor-
                and pipeline-parallel peers known.

        Raises:
            ValueError: a group that this process is not in; or one without torch.distributed.
        """
        if not (dist.is_available() and dist.is_initialized()):
            if process_group is not None:
                raise ValueError("a process_group was given, but torch.distributed is not initialized in this process")
            return cls()
        own = dist.get_rank()
        peers: tuple[int, ...] = (own,)
        if isinstance(process_group, DeviceMesh):
            ranks = tuple(process_group.mesh.flatten().tolist())
            peers = _peers(process_group, own)
        elif process_group is None:
            ranks = tuple(range(dist.get_world_size()))
        elif isinstance(process_group, int):  # torch's NON_GROUP_MEMBER
            raise ValueError("this process is not in the process_group: build the stream on its members only")
        elif isinstance(process_group, ProcessGroup):
            ranks = tuple(dist.get_process_group_ranks(process_group))
        else:
            raise ValueError(f"process_group is {process_group!r}: give a ProcessGroup, a DeviceMesh, or None")
        if own not in ranks:
            raise ValueError(
                f"this process has rank {own}, the process_group has ranks {list(ranks)}: give the data-parallel group "
                "that it belongs to"
            )
        local_rank, node, ranks_per_node = _placement(own)
        return cls(ranks.index(own), len(ranks), ranks, peers, own, local_rank, node, ranks_per_node)

    @property
    def is_first_peer(self) -> bool:
        """Whether it is this process' losses that count among its tensor- and pipeline-parallel peers."""
        return self.global_rank == self.peers[0]

    @property
    def speaks(self) -> bool:
        """Whether this process tells what concerns all of them."""
        return self.rank == 0 and self.is_first_peer

    @property
    def has_peers(self) -> bool:
        """Whether other processes read the same data."""
        return len(self.peers) > 1

    def share(self, num: int) -> int:
        """What each rank contributes, at least, for all to reach `num` together."""
        return -(-num // self.world_size)

    def part_of(self, num: int) -> int:
        """This rank's part of a count: over all ranks they add up to it."""
        return len(range(num)[self.rank :: self.world_size])

    def shard(self, items: Iterable[_T]) -> Iterator[_T]:
        """Every `world_size`-th of `items`, from the `rank`-th on: over all ranks each of them once."""
        return itertools.islice(items, self.rank, None, self.world_size)


def _peers(mesh: DeviceMesh, own: int) -> tuple[int, ...]:
    """The ranks of the whole mesh that stand where `own` does in the dimensions along which `mesh` extends."""
    root = mesh._get_root_mesh().mesh
    places = (root[..., None] == mesh.mesh.flatten()).nonzero()[:, :-1]
    extends = (places != places[0]).any(0).tolist()  # by place, not by name: "dp" may be flattened from two dimensions
    place = (root == own).nonzero()[0].tolist()
    index = tuple(at if varies else slice(None) for at, varies in zip(place, extends, strict=True))
    return tuple(root[index].flatten().tolist())


def _placement(global_rank: int) -> tuple[int, int, int]:
    """(local rank, node, ranks on this node), as the launcher tells in the environment; else all are on one node."""
    env = os.environ
    size = dist.get_world_size()
    local_rank = int(env.get("LOCAL_RANK", env.get("SLURM_LOCALID", global_rank)))
    on_node = int(env.get("LOCAL_WORLD_SIZE", env.get("SLURM_NTASKS_PER_NODE", size)))
    node = int(env.get("GROUP_RANK", env.get("SLURM_NODEID", global_rank // max(on_node, 1))))
    return local_rank, node, on_node
