"""What tensor- and pipeline-parallel peers share: the losses of the first of them."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from flowstream.distributed.meeting_place import MeetingPlace
from flowstream.distributed.world import World

__all__ = ["Peers"]


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
            RankError: a peer that does not come.
        """
        if self._place is None:
            return losses
        place = f"sharing {len(losses)} losses among peers"
        own = losses.detach().cpu().contiguous()
        header = torch.tensor([len(own), own.element_size()])
        told = [tuple(other.tolist()) for other in self._place.wait(self._place.gather(header, place))]
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

    def close(self) -> None:
        """As `Agreement.close`."""
        if self._place is not None:
            self._place.close()
