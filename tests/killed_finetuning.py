"""`flowstream train` in processes that end themselves by a signal: once a path is there, and a moment later.

Without arguments one process imports what takes seconds, and forks each life: it reads lives, one line of JSON each,
and answers each with what came of it. With arguments (PATH DELAY RANK and the command's) it is a rank under torchrun.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forking_scripts import launch

from flowstream.cli.__main__ import main


@dataclass(frozen=True, kw_only=True)
class Life:
    arguments: list[str]
    until: str = ""
    """The path that it waits for; none, and it lives to its end."""
    delay: float = 0.0
    """Seconds from then on."""
    number: int = signal.SIGKILL
    """The signal that it gets."""
    num_ranks: int = 1
    """So many processes under torchrun, of which the last waits."""


@dataclass(frozen=True, kw_only=True)
class End:
    status: int
    """Of the exit; of a signal, its negative number."""
    stdout: str
    stderr: str


def end_oneself(life: Life) -> None:
    """Begin to wait for the moment."""

    def wait() -> None:
        while not os.path.exists(life.until):
            time.sleep(1e-4)
        time.sleep(life.delay)
        os.kill(os.getpid(), life.number)

    if life.until:
        threading.Thread(target=wait, daemon=True).start()


def alone(life: Life) -> int:
    end_oneself(life)
    return main(life.arguments)


def together(life: Life) -> int:
    """Under torchrun's agent, which raises where a rank fails."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))  # the agent then ends its ranks
    signal.alarm(240)
    own = [life.until, str(life.delay), str(life.num_ranks - 1), *life.arguments]
    launch([f"--nproc-per-node={life.num_ranks}", __file__, *own])
    return 0


def live(life: Life) -> End:
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place, "stdout"), Path(place, "stderr")]
        pid = os.fork()
        if pid == 0:
            status = 70
            signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
            try:
                for stream, path in enumerate(files, start=1):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
                status = alone(life) if life.num_ranks == 1 else together(life)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return End(status=status, stdout=files[0].read_text(), stderr=files[1].read_text())


def serve() -> None:
    imported: list[Any] = []
    import matplotlib.figure
    import peft
    import torch.utils.tensorboard

    import flowstream.finetune.run

    imported += [matplotlib, peft, torch, flowstream]
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(live(Life(**json.loads(line))))), flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        serve()
    else:
        until, delay, rank, *arguments = sys.argv[1:]
        life = Life(arguments=arguments, until=until, delay=float(delay))
        if os.environ["RANK"] == rank:
            end_oneself(life)
        sys.exit(main(life.arguments))
