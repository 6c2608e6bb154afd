"""Ranks of which one leaves the loop, in ways that only the end of an interpreter shows.

One process imports torch and forks the ranks of each case, and who keeps their store; a rank ends as a script does. It
reads cases, one line of JSON each, and prints what came of their ranks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import flowstream as fs

WORLD_SIZE = 3
LEAVER = 1
LEFT_AT = 7
"""The batch behind which the leaver leaves."""
_LIMIT = timedelta(seconds=30)


def live(rank: int, folder: Path, how: str) -> None:
    """What a rank's script does."""
    port = int((folder / "port").read_text())
    store = dist.TCPStore("127.0.0.1", port, None, False, _LIMIT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=_LIMIT)
    losses = torch.rand(120 - 20 * rank, 4, generator=torch.Generator().manual_seed(rank))
    scorer = fs.FunctionScorer(lambda batch: batch["loss"], name="given")
    temperature = fs.RunningMedian(warmup_samples=32)
    batches = [{"loss": of_batch} for of_batch in losses]
    stream = fs.FlowStream(batches, scorer, temperature=temperature, window=4, cache=None, timeout=300.0)
    leave = how if rank == LEAVER else ""
    if leave.startswith("with"):
        with stream:
            train(stream, leave, folder)
    else:
        train(stream, leave, folder)


def train(stream: fs.FlowStream, leave: str, folder: Path) -> None:
    for number, _ in enumerate(stream, 1):
        time.sleep(2e-3)
        if leave and number == LEFT_AT:
            (folder / "left").write_text(str(time.time()))
            if leave.endswith("raise"):
                raise OSError("no such shard")
            break


def keep_store(folder: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, True, _LIMIT, wait_for_workers=False)
    (folder / "port.tmp").write_text(str(store.port))
    (folder / "port.tmp").rename(folder / "port")
    signal.pause()


def begin(printed: Path, live: Callable[[], None]) -> int:
    """The id of a forked process, which is to end as any Python does once it has called `live`."""
    pid = os.fork()
    if not pid:
        output = os.open(printed, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        live()
        sys.exit()
    return pid


def run(folder: Path, how: str) -> dict[str, Any]:
    keeper = begin(folder / "keeper.txt", lambda: keep_store(folder))
    while not (folder / "port").exists():
        time.sleep(1e-3)
    pids = [
        begin(folder / f"{rank}.txt", lambda rank=rank: live(rank, folder, how))  # type: ignore[misc]
        for rank in range(WORLD_SIZE)
    ]
    ended: dict[int, tuple[int, float]] = {}
    deadline = time.monotonic() + 60
    while len(ended) < WORLD_SIZE and time.monotonic() < deadline:
        for pid in set(pids) - ended.keys():
            waited, status = os.waitpid(pid, os.WNOHANG)
            if waited:
                ended[pid] = (os.waitstatus_to_exitcode(status), time.time())
        time.sleep(1e-2)
    for pid in [keeper, *(set(pids) - ended.keys())]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    left = float((folder / "left").read_text())
    return {
        "statuses": [ended[pid][0] if pid in ended else None for pid in pids],
        "seconds": [ended[pid][1] - left if pid in ended else None for pid in pids],
        "printed": [(folder / f"{rank}.txt").read_text() for rank in range(WORLD_SIZE)],
    }


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        case = json.loads(line)
        print(json.dumps(run(Path(case["folder"]), case["how"])), flush=True)


if __name__ == "__main__":
    main()
