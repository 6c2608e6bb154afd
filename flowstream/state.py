"""The state of a stream: what it must agree with before it is taken up again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

VERSION = 3
ANY_WORLD_SIZE = 0
"""In place of the number of ranks, in a state that all ranks' were put together into."""

_FIELDS = (
    "version",
    "settings",
    "reference",
    "scorer",
    "epoch",
    "position",
    "running",
    "loader",
    "num_emitted",
    "num_delivered",
    "rank",
    "world_size",
    "offset",
    "elastic",
    "parts",
)


def pack(*, settings: Mapping[str, str], reference: str, scorer: Mapping[str, Any], epoch: int) -> dict[str, Any]:
    """What every state begins with: the version, and the configuration field by field."""
    return {
        "version": VERSION,
        "settings": dict(settings),
        "reference": reference,
        "scorer": dict(scorer),
        "epoch": epoch,
    }


def sealed(
    *,
    position: Mapping[str, Any] | None,
    running: Mapping[str, Any],
    loader: Mapping[str, Any],
    num_emitted: int,
    num_delivered: int,
    rank: int,
    world_size: int,
    offset: int,
    elastic: Mapping[str, int] | None,
) -> dict[str, Any]:
    """What a state ends with: where the consumer is, what was learned before, and what past epochs left to the loader.

    `offset`: samples of the epoch, over all ranks, before it was entered; `elastic`: what else tells where in an epoch
    another number of ranks goes on, if it can.

    Each is in a tuple of one, which torch.distributed.checkpoint saves and loads as a whole: within a mapping it would
    ask for the same keys, and for tensors of the same sizes, as the stream has that is to be resumed.
    """
    return {
        "position": (position,),
        "running": (running,),
        "loader": (loader,),
        "num_emitted": num_emitted,
        "num_delivered": num_delivered,
        "rank": rank,
        "world_size": world_size,
        "offset": offset,
        "elastic": elastic,
        "parts": ([],),
    }


def check(
    state: Mapping[str, Any], settings: Mapping[str, str], reference: str, rank: int, world_size: int, *, strict: bool
) -> None:
    """Raise `ValueError`, naming the field, for the state of another version, number of ranks, or configuration.

    With `strict=False` the configuration does not count.
    """
    missing = [name for name in _FIELDS if name not in state]
    if missing and "version" in state:
        raise ValueError(f"the state has no {missing[0]!r}: it is not what FlowStream.state_dict() gave")
    version = state.get("version")
    if version != VERSION:
        raise ValueError(
            f"the state has version {version!r}, this flowstream reads version {VERSION}: resume with the flowstream "
            "that wrote it"
        )
    if state["world_size"] not in (world_size, ANY_WORLD_SIZE):
        raise ValueError(
            f"the state is one of {state['world_size']} ranks, this run has {world_size}: put all of them together by "
            "fs.merge_states(states), or load them by fs.load_state(stream, directory), which does so"
        )
    if state["world_size"] == world_size and state["rank"] != rank:
        raise ValueError(
            f"the state is that of rank {state['rank']}, this is rank {rank}: each rank loads its own, as "
            "fs.load_state does; with torch.distributed.checkpoint under a key of its own"
        )
    if not strict:
        return
    for name in {**settings, **state["settings"]}:
        ours, theirs = settings.get(name), state["settings"].get(name)
        if theirs != ours:
            raise ValueError(
                f"the state was taken with {name}={theirs}, this stream has {name}={ours}: build the stream as it was, "
                "or load_state_dict(state, strict=False) if the change is meant"
            )
    if state["reference"] != reference:
        raise ValueError(
            f"the state was taken with another reference ({state['reference']}) than this stream's ({reference}): "
            "score with the model that the run began with, or load_state_dict(state, strict=False) if that is meant"
        )


def on_cpu(value: Any) -> Any:
    """A copy of a state, with its tensors on the CPU, wherever `torch.load(map_location=…)` has put them."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: on_cpu(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(on_cpu, value))
    return copy.deepcopy(value)
