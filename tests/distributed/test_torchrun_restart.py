"""Under torchrun's restarts a run whose rank was killed goes on from its checkpoints, and sees each sample once."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from torchrun import ROOT, torchrun

NUM_SAMPLES, BATCH = (120, 68), 4
LAST_SAVED = 16


def committed(log: Path) -> dict[int, list[int]]:
    """The ids of each step, as it was done last."""
    lines = map(json.loads, log.read_text().splitlines())
    return {line["step"]: line["ids"] for line in lines}


@pytest.mark.parametrize("killed", [0, 1])
def test_restarted_run_goes_on_from_its_checkpoints_and_sees_each_sample_once(killed, tmp_path):
    # torchrun looks every two seconds only: time for the rank that is left to say what it knows.
    options = ("--max-restarts=2", "--monitor-interval=2")
    script = ROOT / "tests" / "restarted_training.py"
    printed, told = torchrun(script, tmp_path, killed, num_processes=2, folder=tmp_path, options=options)

    num_steps = -(-max(NUM_SAMPLES) // BATCH)
    said = sorted(re.findall(r"rank (\d), life (\d): (from|through at) step (\d+)", printed))
    assert said == [
        (rank, life, what, str(step))
        for rank in "01"
        for life, what, step in [("0", "from", 0), ("1", "from", LAST_SAVED), ("1", "through at", num_steps)]
    ]
    logs = [committed(tmp_path / f"steps-of-{rank}") for rank in (0, 1)]
    assert [sorted(log) for log in logs] == [list(range(1, num_steps + 1))] * 2
    counts = Counter(index for log in logs for ids in log.values() for index in ids)
    assert counts == Counter(range(sum(NUM_SAMPLES)))
    assert re.search(rf"RankError: .*rank {1 - killed} waited in vain: rank {killed} has died", told), told
