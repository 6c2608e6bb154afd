"""What a rank tells its user of the others."""

from __future__ import annotations

import logging
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
