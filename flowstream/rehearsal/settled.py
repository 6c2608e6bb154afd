"""What follows from the windows that all ranks have agreed upon: a pure value, and a part of the stream's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowstream.rehearsal import ledger as ledgers
from flowstream.rehearsal.damage import Damage


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What follows from the windows that all ranks have agreed upon."""

    bins: str
    """Fingerprint of the partition."""
    damage: Damage
    num_agreed: int = 0
    """Windows."""
    new_cost: int = 0
    """Of the loader's batches, on all ranks, …"""
    num_new: int = 0
    """… and how many each rank delivered."""
    rehearsed_cost: int = 0
    """Of the rehearsed ones, on all ranks, but for the last window's, which are told at the next meeting, …"""
    num_rehearsed: int = 0
    """… and how many each rank delivered."""
    num_untold: int = 0
    """Rehearsed batches of the last window."""
    # Of this rank alone:
    cursors: tuple[int, ...] = ()
    """[K] samples drawn from each bin."""
    untold_cost: int = 0
    """Of those of the last window."""
    over_told: int = 0
    """Cost of what was told as the last window's, and not delivered in it."""
    room: int = 0
    """Cost of the loader's largest batch: a rehearsed one is no larger."""


def settled_from(state: Mapping[str, Any]) -> Settled:
    """From its `asdict`."""
    seen = state["damage"]
    damage = Damage(tuple(seen["num"]), tuple(seen["damaged"]), tuple(seen["prior_counts"]), seen["half_life"])
    return Settled(**{**state, "damage": damage, "cursors": tuple(state["cursors"])})


def merged(
    settled: Sequence[Mapping[str, Any] | None], ledgered: Sequence[Mapping[str, Any] | None]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What all ranks had settled, and their ledgers, in one of each."""
    own = [state for state in settled if state is not None]
    books = [state for state in ledgered if state is not None]
    if len(own) < len(settled) or len(books) < len(ledgered):
        return None, None
    together = {
        **own[0],
        "cursors": [sum(column) for column in zip(*(state["cursors"] for state in own), strict=True)],
        "untold_cost": sum(state["untold_cost"] for state in own),
        "over_told": sum(state["over_told"] for state in own),
        "room": max(state["room"] for state in own),
    }
    return together, ledgers.merged(books)
