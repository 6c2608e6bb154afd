"""What tensor- and pipeline-parallel peers share: the losses of the first of them."""

from __future__ import annotations

import contextlib
import weakref

import torch
from torch import Tensor

from flowstream.distributed.meeting_place import MeetingPlace
from flowstream.distributed.rank_error import RankError
from flowstream.distributed.world import World

__all__ = ["Peers"]


_FAILED = (-1, -1)
"""In place of a number of losses, and the size of one."""


class Peers:
    """Owns the meeting place of the processes that read the same data: they are one data-parallel rank.

    Its errors name ranks of the default process group. Without peers nothing is made.
    """

    def __init__(self, world: World, *, timeout: float) -> None:
        self._place: MeetingPlace | None = None
        if world.has_peers:
            own = world.peers.index(world.global_rank)
            names = tuple(f"global rank {rank} (a tensor- or pipeline-parallel peer)" for rank in world.peers)
            self._place = MeetingPlace("peers", world.peers, own, names, timeout)
            weakref.finalize(self, self._place.close)

    def agree(self, losses: Tensor) -> Tensor:
        """The first peer's `losses` [N], float32 or float16, on all peers.

        Raises:
            RuntimeError: on every peer, that their N or dtype differ.
            RankError: a peer that does not come, or has failed.
        """
        if self._place is None:
            return losses
        place = f"sharing {len(losses)} losses among peers"
        own = losses.detach().cpu().contiguous()
        header = torch.tensor([len(own), own.element_size()])
        told = [tuple(other.tolist()) for other in self._place.wait(self._place.gather(header, place))]
        if _FAILED in told:
            who = [rank for rank, one in zip(self._place.ranks, told, strict=True) if one == _FAILED]
            raise RankError(
                f"global ranks {who}, tensor- or pipeline-parallel peers, have failed: see their errors", tuple(who)
            )
        if len(set(told)) > 1:
            each = ", ".join(f"{num} of {size} bytes" for num, size in told)
            raise RuntimeError(
                f"tensor- and pipeline-parallel peers have scored different samples: {each} losses, on global ranks "
                f"{list(self._place.ranks)}. They must read the same batches: shard the data by the data-parallel rank"
            )
        if not len(own):
            return losses
        (first,) = self._place.wait(self._place.broadcast(own.view(torch.uint8).clone(), 0, place))
        return first.view(own.dtype).to(losses.device)

    def fail(self) -> None:
        """Let peers that wait for losses know that this one has none."""
        if self._place is not None:
            with contextlib.suppress(RuntimeError):  # what they have said is what counts
                self._place.gather(torch.tensor(_FAILED), "failing")

    def close(self) -> None:
        """As `Agreement.close`."""
        if self._place is not None:
            self._place.close()
