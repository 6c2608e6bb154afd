"""The state of every rank's stream in files of its own beside a trainer's checkpoint, whole or not there at all."""

from __future__ import annotations

import io
import logging
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed
import xxhash

from flowstream.elastic import merge_states
from flowstream.stream import FlowStream

_logger = logging.getLogger("flowstream")

_NAME = re.compile(r"flowstream-(\d+)-rank-(\d+)-of-(\d+)\.pt")
_MAGIC = b"flowstream state"
_DAMAGED = "damaged: "
_FOOTER_SIZE = len(_MAGIC) + 16
"""Behind what torch.save wrote, where torch.load does not look: the magic, and the XXH3-128 of all before it."""


class HasState(Protocol):
    """A stream, or the position that one had before."""

    def state_dict(self) -> dict[str, Any]: ...


def save_state(
    stream: HasState,
    directory: str | os.PathLike[str],
    *,
    step: int,
    rank: int | None = None,
    world_size: int | None = None,
    keep_last: int = 2,
) -> Path:
    """Save this rank's state at `step` in `directory`, and return the file's path. Every rank calls it by itself.

    The file is there as a whole or not at all, and survives a power cut: written under another name, synced, renamed.
    Call it before the trainer saves its own checkpoint of that step, which then never lacks its state; with
    `keep_last` of 2 or more, nor does the checkpoint before it. One stream a directory.

    Args:
        step: what the trainer calls this moment, 0 or more. States of later steps are removed: they are of a run that
            went on from here.
        rank, world_size: by default torch.distributed's, or 0 of 1.
        keep_last: of the steps that all ranks have saved, this many are kept, and what is newer.

    Raises:
        ValueError: a number that cannot be.
        OSError: what the disk says; what was saved before is still there.
    """
    rank, world_size = _place(rank, world_size)
    for name, value, least in (("step", step, 0), ("keep_last", keep_last, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}: give a whole number of at least {least}")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _name(step, rank, world_size)
    buffer = io.BytesIO()
    torch.save({"step": step, "rank": rank, "world_size": world_size, "state": stream.state_dict()}, buffer)
    _write_whole(path, buffer.getvalue())
    _prune(folder, step, rank, world_size, keep_last)
    return path


def load_state(
    stream: FlowStream,
    directory: str | os.PathLike[str],
    *,
    step: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    strict: bool = True,
) -> int | None:
    """Load this rank's state of `step`, or of the newest step that is whole on all ranks; returns the step.

    `None` if no step was saved by all ranks. Every rank reads the files of all, so that without a word between them
    all take the same step, also where one was killed before its file was there, or the file of another is damaged;
    what is passed over is told in a warning. Where the trainer knows its step, give it. States of another number of
    ranks are put together (`fs.merge_states`).

    Raises:
        FileNotFoundError: the `step` asked for was not saved by all ranks.
        ValueError: what `fs.merge_states` or `FlowStream.load_state_dict` says.
        RuntimeError: the `step` asked for is damaged, or all are: never a silent restart.
    """
    rank, world_size = _place(rank, world_size)
    folder = Path(directory)
    found = _saved(folder)
    steps = sorted({at for at, _ in found}, reverse=True)
    if step is not None and step not in steps:
        raise FileNotFoundError(f"{folder} has no state of step {step}, only of {sorted(steps) or 'none'}")
    any_damaged = False
    for at in steps if step is None else [step]:
        states = _whole(folder, at, {size: ranks for (other, size), ranks in found.items() if other == at}, world_size)
        if not isinstance(states, str):
            own = states[rank] if len(states) == world_size else merge_states(states, strict=strict)
            stream.load_state_dict(own, strict)
            return at
        is_damaged = states.startswith(_DAMAGED)
        if step is not None:
            kind = RuntimeError if is_damaged else FileNotFoundError
            raise kind(f"the state of step {at} in {folder} cannot be loaded: {states}")
        _logger.warning("the state of step %d in %s is passed over: %s", at, folder, states)
        any_damaged |= is_damaged
    if any_damaged:
        raise RuntimeError(
            f"no step in {folder} is whole, and some are damaged (see the warnings): to begin anew, remove the folder"
        )
    return None


def _whole(folder: Path, step: int, ranks_of: Mapping[int, set[int]], world_size: int) -> list[dict[str, Any]] | str:
    """The states of all ranks at a step, of this run's number of ranks if there are; or why there are none."""
    why = ""
    for size in sorted(ranks_of, key=lambda size: (size != world_size, -size)):
        missing = sorted(set(range(size)) - ranks_of[size])
        if missing:
            why = why or f"rank {missing[0]} of {size} did not save it"
            continue
        states = [_read(folder / _name(step, rank, size), step, rank) for rank in range(size)]
        damaged = [state for state in states if isinstance(state, str)]
        if not damaged:
            return [state for state in states if not isinstance(state, str)]
        why = f"{_DAMAGED}{damaged[0]}"
    return why


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, world size): as given, or torch.distributed's."""
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank is {rank} and world_size {world_size}: give both, or neither")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, with world_size={world_size}: give a rank from 0 to {world_size - 1}")
    return rank, world_size


def _name(step: int, rank: int, world_size: int) -> str:
    return f"flowstream-{step:010d}-rank-{rank:05d}-of-{world_size:05d}.pt"


def _saved(folder: Path) -> dict[tuple[int, int], set[int]]:
    """The ranks whose file is there, of each (step, world size)."""
    found: dict[tuple[int, int], set[int]] = defaultdict(set)
    for entry in os.listdir(folder) if folder.is_dir() else ():
        if match := _NAME.fullmatch(entry):
            step, rank, world_size = map(int, match.groups())
            found[step, world_size].add(rank)
    return dict(found)


def _write_whole(path: Path, content: bytes) -> None:
    """The content and its checksum, on disk under its name once this returns; before that nothing is under it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content + _MAGIC + xxhash.xxh3_128_digest(content))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or the new name may be lost
    finally:
        os.close(folder)


def _prune(folder: Path, step: int, rank: int, world_size: int, keep_last: int) -> None:
    """Remove this rank's files of steps that no resume needs, and what a process that was killed left half-written.

    As long as another rank lacks a step, the ones before it are needed: it might be killed before it has it.
    """
    found = _saved(folder)
    complete = sorted(at for (at, size), ranks in found.items() if at <= step and len(ranks) == world_size == size)
    oldest = complete[-keep_last] if len(complete) >= keep_last else -1
    for (at, size), ranks in found.items():
        # Another number of ranks may have left more files than this run has ranks: each removes its share.
        for other in ranks if at > step or at < oldest else ():
            if other % world_size == rank:
                (folder / _name(at, other, size)).unlink(missing_ok=True)
    for left_over in folder.glob(f".flowstream-*-rank-{rank:05d}-of-{world_size:05d}.pt.tmp"):
        left_over.unlink(missing_ok=True)


def _read(path: Path, step: int, rank: int) -> dict[str, Any] | str:
    """The state in a file; or why there is none, in words."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return f"{path.name} was removed meanwhile"
    body, footer = content[:-_FOOTER_SIZE], content[-_FOOTER_SIZE:]
    if not footer.startswith(_MAGIC):
        return f"{path.name} is torn: its {len(content)} bytes do not end as a state does"
    if footer != _MAGIC + xxhash.xxh3_128_digest(body):
        return f"{path.name} is damaged: its checksum is wrong"
    saved = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    if (saved["step"], saved["rank"]) != (step, rank):
        return f"{path.name} holds step {saved['step']} of rank {saved['rank']}: it was renamed"
    state: dict[str, Any] = saved["state"]
    return state
