"""A rank that is lost at a random moment: every other says which, and begun again the run sees each sample."""

from __future__ import annotations

import os
import random
import re
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from killed_ranks import LAST, NUM_EPOCHS, SHARDS, WORLD_SIZE, Blow, Run, committed, live, strike
from spawned import Outcome

NUM_KILLS = int(os.environ.get("FLOWSTREAM_NUM_RANK_KILLS", "5"))
"""Over all cases; `make soak` asks for more."""

FIRST_SEED = 838
"""From here on no kill hits a rank that builds its stream: while its word is on its way, that takes 15 s to tell."""

CASES = [
    # mode, whether the loop has a collective of its own, who keeps the store
    ("weight", False, "parent"),
    ("weight", True, "rank0"),
    ("weight", False, "rank0"),
    ("resample", False, "rank0"),
    ("resample", True, "parent"),
]


def check_survivors(run: Run, blow: Blow, outcomes: list[Outcome], what: str) -> None:
    """Every other rank has an error of ours, in time, that names the one and no other."""
    what = rf"\(?{what}"
    if blow.phase == "building":
        # As long as its word is on its way nobody knows its process.
        what = f"({what}|did not come|has ended|cannot be reached)"
    for rank, outcome in enumerate(outcomes):
        if rank == blow.victim:
            continue
        told = outcome.result
        where = f"{blow}, on rank {rank}: {told or outcome}"
        assert told is not None, where
        assert not told["is_through"], where
        assert told["ranks"] == (blow.victim,), where
        assert re.search(f"rank {blow.victim} {what}", told["text"]), where
        assert told["at"] - blow.at < run.timeout, where


@pytest.mark.parametrize(("mode", "in_lockstep", "host_store"), CASES)
def test_killed_rank_is_named_and_the_run_goes_on_from_its_states(mode, in_lockstep, host_store, tmp_path):
    num_kills = NUM_KILLS // len(CASES)
    case = CASES.index((mode, in_lockstep, host_store))
    seed = FIRST_SEED + case if num_kills == 1 else int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    draws = random.Random(seed)
    scale = (1 + num_kills // 2) * (1 if mode == "weight" else 4)  # resampled, a shard makes few batches
    undisturbed = Run(str(tmp_path / "undisturbed"), mode, in_lockstep, scale=scale)
    killed = replace(undisturbed, folder=str(tmp_path / "killed"))
    for run in (undisturbed, killed):
        Path(run.folder).mkdir()
    live(undisturbed)
    expected = [committed(undisturbed, rank) for rank in range(WORLD_SIZE)]
    num_steps = len(expected[0])
    assert num_steps > LAST

    furthest = 2 * num_steps // num_kills
    for _ in range(num_kills):
        blow, outcomes = strike(killed, draws, num_steps=num_steps, furthest=furthest, host_store=host_store)
        print(blow)
        check_survivors(killed, blow, outcomes, "has died")
    live(killed)
    found = [committed(killed, rank) for rank in range(WORLD_SIZE)]
    assert found == expected
    if mode == "weight":
        check_seen_once(found, sum(SHARDS) * killed.scale)


def check_seen_once(found: list[list[dict[str, Any]]], num_samples: int) -> None:
    for epoch in range(NUM_EPOCHS):
        seen: Counter[int] = Counter()
        for step in (step for steps in found for step in steps if step["epoch"] == epoch):
            seen.update(index for index, weight in zip(step["ids"], step["weight"], strict=True) if weight > 0)
        assert seen == Counter(range(num_samples))


@pytest.mark.parametrize("host_store", ["parent", "rank0"])
def test_stopped_rank_is_named_within_the_timeout(host_store, tmp_path):
    run = Run(str(tmp_path), "weight", in_lockstep=False, timeout=8.0)
    draws = random.Random(len(host_store))
    blow, outcomes = strike(run, draws, num_steps=40, furthest=20, host_store=host_store, how=signal.SIGSTOP)
    check_survivors(run, blow, outcomes, "was stopped")
