"""The plan of a window: how many batches are rehearsed in it, where, and which prior samples they hold. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flowstream.distributed.message import Agreed
from flowstream.rehearsal.draws import Draws
from flowstream.rehearsal.prior import Prior
from flowstream.rehearsal.schedule import num_rehearsed, order
from flowstream.rehearsal.settled import Settled


@dataclass(frozen=True, eq=False)
class Plan:
    """A window with what is rehearsed in it."""

    number: int
    """Of its meeting."""
    order: list[bool]
    """Which deliveries are rehearsed."""
    groups: list[list[int]]
    """The prior samples of each of those."""
    costs: list[int]
    """Of all deliveries on this rank; 0 where it has none of its own."""
    after: Settled


def plan(
    before: Settled,
    agreed: Agreed,
    prior: Prior,
    draws: Draws,
    *,
    ratio: float,
    accumulate: int,
    costs: Sequence[int],
    room: int,
    place: tuple[int, int],
    limit: int | None,
) -> Plan:
    """The window that the ranks have agreed upon, with what is rehearsed in it.

    Args:
        before: what followed from the windows before.
        ratio: rehearsed share of all compute.
        accumulate: rehearsed batches come in multiples of it.
        costs: of this rank's own batches.
        room: cost of the largest, or, where it has none, of what stands in for them.
        place: (epoch, window).
        limit: deliveries that the window may have.
    """
    num = len(before.cursors)
    *tallies, new_cost, rehearsed_cost = agreed.tallies
    now = replace(
        before,
        damage=before.damage.updated(tallies[:num], tallies[num:]),
        num_agreed=before.num_agreed + 1,
        new_cost=before.new_cost + new_cost,
        num_new=before.num_new + agreed.num_deliveries,
        rehearsed_cost=before.rehearsed_cost + rehearsed_cost,
        num_rehearsed=before.num_rehearsed + before.num_untold,
        over_told=sum(costs[agreed.num_deliveries :]),
        room=max([before.room, room, *costs]),
        untold_cost=0,
        num_untold=0,
    )
    number = 0
    if agreed.num_deliveries:
        number = num_rehearsed(
            ratio=ratio,
            new_cost=now.new_cost,
            expected=prior.expected_cost(now.new_cost / max(now.num_new * draws.world_size, 1)) * draws.world_size,
            rehearsed_cost=now.rehearsed_cost,
            num_rehearsed=now.num_rehearsed,
            multiple=accumulate,
        )
        if limit is not None:
            number = min(number, max(limit - agreed.num_deliveries, 0) // accumulate * accumulate)
    groups, cursors = _drawn(number, now, prior, draws, place)
    own = [prior.cost(group) for group in groups]
    now = replace(now, cursors=cursors, untold_cost=sum(own), num_untold=number)
    which = order(agreed.num_deliveries, number) if agreed.num_deliveries else []
    rehearsed, new = iter(own), iter([*costs, *[0] * agreed.num_deliveries])
    return Plan(before.num_agreed, which, groups, [next(rehearsed if is_prior else new) for is_prior in which], now)


def _drawn(
    number: int, now: Settled, prior: Prior, draws: Draws, place: tuple[int, int]
) -> tuple[list[list[int]], tuple[int, ...]]:
    """As many batches, each filled with as many samples as there is room for."""
    cursors = list(now.cursors)
    bins: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    at = 0
    groups: list[list[int]] = []
    for _ in range(number):
        group: list[int] = []
        total = widest = 0
        while True:
            if at == len(bins):  # the same draws, and as many again
                bins = draws.bins(max(2 * at, 64), now.damage.rates, place)
            k = int(bins[at])
            sample = draws.sample(k, cursors[k])
            width = int(prior.width[sample])
            total, widest = total + width, max(widest, width)
            cost = total if prior.packs else widest * (len(group) + 1)
            # Of a row of documents, one that is in it twice could not be told apart.
            if group and (cost > now.room or (prior.packs and sample in group)):
                break
            group.append(sample)
            cursors[k] += 1
            at += 1
        groups.append(group)
    return groups, tuple(cursors)
