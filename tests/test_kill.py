"""`kill -9` at random moments: training driven from checkpoints sees each sample as often as without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NUM_KILLS = int(os.environ.get("FLOWSTREAM_NUM_KILLS", "10"))
"""In each case; `make soak` asks for more."""


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs a case of `killed_training` in a process that forks the lives of the run."""
    script = Path(__file__).with_name("killed_training.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a process with threads cannot be forked
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(script)], env=environment, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout
        assert stdout.readline() == "ready\n"

        def run(**case: Any) -> dict[str, Any]:
            print(json.dumps(case), file=stdin, flush=True)
            found: dict[str, Any] = json.loads(stdout.readline())
            assert "error" not in found, found["error"]
            return found

        yield run


@pytest.mark.parametrize("is_cached", [False, True], ids=["no cache", "cache on disk"])
@pytest.mark.parametrize("mode", ["weight", "resample"])
def test_killed_training_sees_each_sample_as_often_as_without(mode, is_cached, run, tmp_path):
    seed = int.from_bytes(os.urandom(4)) if NUM_KILLS > 10 else len(mode) + is_cached
    found = run(folder=str(tmp_path), mode=mode, is_cached=is_cached, num_kills=NUM_KILLS, seed=seed)
    assert found["differ"] == [], f"seed {seed}: {found}"
    assert found["counts"] == [1] if mode == "weight" else [0, 1]
    assert len(found["lives"]) == NUM_KILLS
