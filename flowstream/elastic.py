"""The states of all ranks, put together into one that any number of ranks can go on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowstream.elastic_sampler import consumed
from flowstream.rehearsal.settled import merged
from flowstream.state import ANY_WORLD_SIZE, on_cpu

__all__ = ["merge_states"]

_SHARED = ("version", "settings", "reference", "epoch", "world_size")


def merge_states(states: Sequence[Mapping[str, Any]], *, strict: bool = True) -> dict[str, Any]:
    """One state for any number of ranks, from `FlowStream.state_dict()` of every rank at the same step, in rank order.

    τ, the sums and counters are those of what was delivered. The position is kept where the loader is a `DataLoader`
    over an `ElasticDistributedSampler`: the epoch goes on behind the samples that were delivered, with none lost or
    repeated. Elsewhere it is kept only between epochs. `fs.load_state` does this by itself.

    Args:
        strict: if False, an epoch whose position cannot be kept begins anew.

    Raises:
        ValueError: states of different steps, or a position that cannot be kept, with what to do.
    """
    if not states:
        raise ValueError("there are no states to put together: give those of all ranks")
    first: dict[str, Any] = on_cpu(states[0])
    for field in _SHARED:
        values = [state.get(field) for state in states]
        if any(value != values[0] for value in values):
            raise ValueError(f"the states differ in {field}: {values}. Give those of all ranks of one step of one run")
    if first["world_size"] not in (len(states), ANY_WORLD_SIZE):
        raise ValueError(
            f"{len(states)} states were given, but each is of a stream of {first['world_size']} ranks: give those of "
            f"all; or, where streams knew of no other rank (no torch.distributed), resume with {len(states)} of them"
        )
    positions = [state["position"][0] for state in states]
    parts: list[Any] = []
    if positions[0] is not None:
        places = [(one["window"], one["delivered"], one["first_delivery"]) if one else None for one in positions]
        if any(place != places[0] for place in places):
            raise ValueError(
                f"the states are of different steps: (window, batch, first batch) are {places}. Give those of one step"
            )
        if first["elastic"] is not None:
            # Of the loader's own: rehearsed batches are none of its samples.
            num_batches = positions[0]["first_delivery"] + positions[0].get("num_own", positions[0]["delivered"])
            first["offset"] = consumed(first["offset"], len(states), num_batches=num_batches, **first["elastic"])
            parts = [on_cpu(one["part"]) for one in positions]
        elif strict:
            raise ValueError(
                f"the states were taken on {len(states)} ranks within epoch {first['epoch']}, over a loader that "
                "cannot go on in the same place on another number of them. Resume with as many ranks; or take a "
                "DataLoader over an ElasticDistributedSampler, in weight mode; or with strict=False begin the epoch "
                "anew, with the τ that was learned"
            )
        else:
            first["offset"] = 0
    if "rehearsal" in first:
        books = [state["rehearsal"][0] for state in states]
        settled, book = merged([state["running"][0]["rehearsal"] for state in states], books)
        first |= {"rehearsal": (book,), "running": ({**first["running"][0], "rehearsal": settled},)}
    return first | {
        "world_size": ANY_WORLD_SIZE,
        "position": (None,),
        "parts": (parts,),
        "num_emitted": sum(state["num_emitted"] for state in states),
    }
