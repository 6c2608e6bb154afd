"""A rank that leaves its loop, or takes long between two batches: the others say so and end, or wait and go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import ending_ranks
import torch
import torch.distributed as dist
from ending_ranks import LEAVER, WORLD_SIZE
from spawned import run_ranks

import flowstream as fs

CASES = {
    # How the one leaves: what the others say of it, and its exit status.
    "raise": ("has ended without closing its stream after OSError: no such shard", 1),
    "with, raise": ("has closed its stream after OSError: no such shard", 1),
    "break": ("has ended without closing its stream", 0),
    "with, break": ("has closed its stream", 0),
}


def test_ranks_that_are_left_say_by_whom_and_how_and_all_processes_end(tmp_path):
    lines = []
    for how in CASES:
        (tmp_path / how).mkdir()
        lines.append(json.dumps({"folder": str(tmp_path / how), "how": how}) + "\n")
    ran = subprocess.run(
        [sys.executable, ending_ranks.__file__],
        input="".join(lines),
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # a process with threads cannot be forked
        stdout=subprocess.PIPE,
        text=True,
        timeout=200,
        check=True,
    )
    for (how, (told, status)), found in zip(CASES.items(), map(json.loads, ran.stdout.splitlines()), strict=True):
        assert found["statuses"] == [status if rank == LEAVER else 1 for rank in range(WORLD_SIZE)], (how, found)
        assert max(found["seconds"]) < 20, (how, found)  # which the timeout of 300 s is far from
        for rank, printed in enumerate(found["printed"]):
            if rank == LEAVER:
                assert "RankError" not in printed
                assert ("OSError: no such shard" in printed) == ("raise" in how)
            else:
                assert (
                    f"RankError: at window 3 of epoch 0 (window, iterator 1), rank {rank} waited in vain: " in printed
                )
                assert f"rank {LEAVER} {told} (last seen at" in printed
                assert ("none may `break` alone" in printed) == how.endswith("break")


def evaluate_for_long() -> tuple[float, float]:
    """Seconds that this rank's slowest step took, of which one rank's is an evaluation; and the sum of its weights."""
    scorer = fs.FunctionScorer(lambda batch: batch["loss"], name="given")
    batches = [{"loss": torch.full((4,), 1.0 + number)} for number in range(24)]
    slowest = total = 0.0
    temperature = fs.RunningMedian(warmup_samples=16)
    with fs.FlowStream(batches, scorer, temperature=temperature, window=4, cache=None, timeout=30.0) as stream:
        began = time.monotonic()
        for number, batch in enumerate(stream):
            slowest, began = max(slowest, time.monotonic() - began), time.monotonic()
            total += float(batch["flow_weight"].sum())
            if number == 9 and dist.get_rank() == 0:
                time.sleep(8.0)
                began = time.monotonic()
    return slowest, total


def test_a_long_evaluation_on_one_rank_is_waited_for():
    alone, waiting = (outcome.result for outcome in run_ranks(evaluate_for_long, 2))
    assert alone[0] < 4 < 7 < waiting[0] < 12
    assert alone[1] == waiting[1]
