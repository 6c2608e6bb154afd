"""What a rank tells its user of the others."""

from __future__ import annotations

import numpy as np
import pytest

from flowstream.distributed.message import Message, Phase
from flowstream.distributed.notices import tell_same, tell_stop, tell_unlike
from flowstream.distributed.world import World


def seen_and_kept(*counts: tuple[int, int]) -> list[Message]:
    return [Message(phase=Phase.WINDOW, num_seen=seen, num_kept=kept) for seen, kept in counts]


def test_ranks_that_keep_unlike_shares_are_told(caplog):
    assert tell_unlike(seen_and_kept((400, 328), (400, 148)))
    assert "rank 0 keeps 82 % of its samples, all ranks together 60 %" in caplog.text
    assert "Shuffle samples or shards over the ranks" in caplog.text


@pytest.mark.parametrize("counts", [((0, 0), (0, 0)), ((400, 160), (0, 0)), ((400, 400), (400, 400)), ((9, 2), (7, 5))])
def test_nothing_is_told_of_none_of_equal_or_of_few(counts, caplog):
    assert not tell_unlike(seen_and_kept(*counts))
    assert not caplog.text


def test_chance_is_not_told_of():
    rng = np.random.default_rng(0)
    told = [tell_unlike(seen_and_kept(*((256, rng.binomial(256, 0.4)) for _ in range(8)))) for _ in range(1000)]
    assert sum(told) <= 10  # eight ranks beyond four standard errors: .05 % of windows


def test_only_ranks_that_deliver_the_same_are_told(caplog):
    messages = [Message(phase=Phase.WINDOW, content=content) for content in (5, 7, 5, 0, 0)]
    for rank in (1, 3, 4):
        tell_same(World(rank, 5), messages)
    assert not caplog.text
    tell_same(World(2, 5), messages)
    assert "ranks [0, 2] deliver the same samples in the same order" in caplog.text


def test_a_rank_is_told_of_a_stop_unless_it_lost_nothing_by_it(caplog):
    tell_stop(World(1, 2), 3, [1], 0)
    tell_stop(World(1, 2), 3, [0, 1], 0)
    assert not caplog.text
    tell_stop(World(0, 2), 3, [1], 24)
    assert "epoch 3 ends on all ranks, since ranks [1] have no more batches" in caplog.text
    assert "24 samples that rank 0 has read" in caplog.text
    caplog.clear()
    tell_stop(World(1, 2), 3, [1], 8)  # its last optimizer step was not whole
    assert "8 samples that rank 1 has read" in caplog.text
