"""Starts a script, by itself or under torchrun: real processes, on a port that is free."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # a process with threads cannot be forked
    "HF_HUB_OFFLINE": "1",
    # webdataset leaves its shards' files to the garbage collector, and loaders fork under gloo's threads.
    "PYTHONWARNINGS": "error,ignore::ResourceWarning,ignore:This process:DeprecationWarning",
    # Else torchrun keeps its store over restarts, and there new ranks find the addresses of those of the life before
    # (pytorch issue 135712).
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
_SECONDS = 240


def torchrun(
    script: Path,
    *arguments: object,
    num_processes: int,
    folder: Path,
    options: tuple[str, ...] = (),
    is_forked: bool = True,
) -> tuple[str, str]:
    """What all processes printed to stdout and stderr, run in `folder`, each on one thread.

    Forked, they start in no time; else they are what the torchrun command starts.
    """
    command = [f"--nproc-per-node={num_processes}", *options, str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as place:
        stdout, stderr = Path(place, "stdout"), Path(place, "stderr")
        status = (_fork if is_forked else _start)(command, folder, stdout, stderr)
        printed, told = stdout.read_text(), stderr.read_text()
    assert status == 0, f"{printed}\n{told}"
    return printed, told


def script(path: Path, *arguments: object, folder: Path, allowed: str = "") -> tuple[str, str]:
    """What a script printed to stdout and stderr, run in `folder` on one thread; warnings are errors.

    `allowed` is a warning that is not, by how its text begins.
    """
    command = [str(path), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as place:
        stdout, stderr = Path(place, "stdout"), Path(place, "stderr")
        status = _fork(command, folder, stdout, stderr, is_alone=True, allowed=allowed)
        printed, told = stdout.read_text(), stderr.read_text()
    assert status == 0, f"{printed}\n{told}"
    return printed, told


def _start(command: list[str], folder: Path, stdout: Path, stderr: Path) -> int:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with (
        stdout.open("w") as printed,
        stderr.open("w") as told,
        subprocess.Popen(
            [*launcher, *command], cwd=folder, env=os.environ | _ENVIRONMENT, stdout=printed, stderr=told
        ) as process,
    ):
        try:
            return process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its processes; killed, it would leave them
            return process.wait(60) or 1


def _fork(command: list[str], folder: Path, stdout: Path, stderr: Path, **further: object) -> int:
    run = {"arguments": command, "folder": str(folder), "stdout": str(stdout), "stderr": str(stderr)}
    process = _forking()
    assert process.stdin is not None
    assert process.stdout is not None
    print(json.dumps(run | {"seconds": _SECONDS} | further), file=process.stdin, flush=True)
    return int(process.stdout.readline())


@functools.cache
def _forking() -> subprocess.Popen[str]:
    """One for all tests of this process."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "forking_scripts.py")],
        env=os.environ | _ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.communicate)  # without more runs it ends
    return process
