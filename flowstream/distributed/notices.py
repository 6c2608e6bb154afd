"""What a rank tells its user of the others."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from flowstream.distributed.message import Message
from flowstream.distributed.world import World

_logger = logging.getLogger("flowstream")


def tell_stop(world: World, epoch: int, ended: Sequence[int], num_left: int) -> None:
    """Say why an epoch ends before this rank's data do. `num_left`: samples that it has read for nothing."""
    is_first = world.rank not in ended and len(ended) < world.world_size
    if is_first or num_left:
        _logger.warning(
            'epoch %d ends on all ranks, since ranks %s have no more batches (on_uneven="stop"): %d samples that '
            "rank %d has read are left out, and what else its loader has",
            epoch,
            list(ended),
            num_left,
            world.rank,
        )


def tell_same(world: World, messages: Sequence[Message]) -> None:
    """Warn of ranks that deliver the same samples in the same order, by the hashes in their messages."""
    own = messages[world.rank].content
    ranks = [rank for rank, message in enumerate(messages) if own and message.content == own]
    if len(ranks) > 1:
        _logger.warning(
            "ranks %s deliver the same samples in the same order: split the data over the ranks "
            "(fs.webdataset_splitters(), fs.split_by_rank(dataset), fs.ElasticDistributedSampler(dataset)); for "
            "tensor- or pipeline-parallel ranks give process_group=mesh[…], the data-parallel dimension",
            ranks,
        )


def tell_unlike(messages: Sequence[Message]) -> bool:
    """Warn of ranks that keep unlike shares of their samples, more than chance does; whether it was told.

    Ranks deliver equally many samples, so that easy ranks, which keep more, get through their data more slowly.
    """
    seen, kept = (sum(getattr(message, name) for message in messages) for name in ("num_seen", "num_kept"))
    share = kept / seen if seen else 0.0
    for rank, message in enumerate(messages):
        num = message.num_seen
        if not num or abs(message.num_kept / num - share) <= max(0.1 * share, 4 * math.sqrt(share * (1 - share) / num)):
            continue
        _logger.warning(
            "rank %d keeps %.0f %% of its samples, all ranks together %.0f %%: ranks deliver equally many, so those of "
            "ranks with high losses count too much, and the data of the others is not read to the end. Shuffle samples "
            "or shards over the ranks, or use mode='weight'",
            rank,
            100 * message.num_kept / num,
            100 * share,
        )
        return True
    return False
