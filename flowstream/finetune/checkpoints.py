"""Which checkpoint of a folder a run goes on from: the newest that every rank had written."""

from __future__ import annotations

import json
import re
from pathlib import Path

_FOLDER = re.compile(r"checkpoint-(\d+)")
_STATE = re.compile(r"flowstream-\d+-rank-\d+-of-(\d+)\.pt")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; `None` where there is none."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _FOLDER.fullmatch(path.name))]
    return next((path for _, path in sorted(found, reverse=True) if is_whole(path)), None)


def step_of(checkpoint: Path) -> int:
    """The step after which it was written, from its name."""
    match = _FOLDER.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def is_whole(checkpoint: Path) -> bool:
    """Whether nothing of it is missing: the trainer's state is written last, the stream's by every rank before."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    sizes = _sizes(checkpoint)
    return bool(sizes) and len(sizes) == max(sizes)


def num_ranks(checkpoint: Path) -> int:
    """The processes that wrote it."""
    return max(_sizes(checkpoint))


def _sizes(checkpoint: Path) -> list[int]:
    """Of each rank's state of the stream, how many ranks it says there were."""
    return [int(match[1]) for path in checkpoint.iterdir() if (match := _STATE.fullmatch(path.name))]
