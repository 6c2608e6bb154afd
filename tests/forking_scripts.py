"""Scripts from a process that has imported what takes seconds to import: each is forked, by itself or under torchrun.

Of torchrun the agent is forked, and so its ranks. It reads runs, one line of JSON each, and answers each with the exit
status that the command would have.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass

import webdataset
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args
from transformers import LlamaForCausalLM

import flowstream

IMPORTED = (flowstream, webdataset, LlamaForCausalLM)


@dataclass(frozen=True)
class Run:
    arguments: list[str]
    """Torchrun's: options, the script and its own arguments. Of a script by itself: it, and they."""
    folder: str
    """Where it runs."""
    stdout: str
    """The files that all its processes print to."""
    stderr: str
    seconds: int
    """After so many it is ended."""
    is_alone: bool = False
    """Without torchrun; warnings are errors, …"""
    allowed: str = ""
    """… but for one whose text begins so."""


def begin(run: Run) -> int:
    """The process id of the agent."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.chdir(run.folder)
        for stream, path in ((1, run.stdout), (2, run.stderr)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
        # The agent ends its processes on SIGTERM, and only then.
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.alarm(run.seconds)
        if run.is_alone:
            run_alone(run)
        else:
            launch(run.arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_alone(run: Run) -> None:
    """As `python -W error` in its folder, where temporary files go, too."""
    os.environ["TMPDIR"], tempfile.tempdir = run.folder, None
    warnings.resetwarnings()
    warnings.simplefilter("error")
    if run.allowed:
        warnings.filterwarnings("ignore", message=run.allowed)
    sys.argv = list(run.arguments)
    runpy.run_path(run.arguments[0], run_name="__main__")


def launch(arguments: list[str]) -> None:
    """What `torchrun --standalone` does, but for how processes start."""
    args = parse_args(arguments)
    args.rdzv_backend, args.rdzv_endpoint = "c10d", "localhost:0"
    config, _, _ = config_from_args(args)
    config.start_method = "fork"
    elastic_launch(config, run_script)(args.training_script, *args.training_script_args)


def run_script(script: str, *arguments: str) -> None:
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:
        traceback.print_exc()  # the agent tells it of the first process only
        raise


def main() -> None:
    for line in sys.stdin:
        pid = begin(Run(**json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
