"""A training run of several ranks, of which one is killed at a random moment; begun again, it goes on from its states.

Every rank writes down what each step trained on before it saves a state; what a later life does again replaces it.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from spawned import Outcome, run_ranks

import flowstream as fs

WORLD_SIZE = 3
SHARDS = (92, 38, 67)
"""Samples of each rank, for each `scale`."""
BATCH = 4
WINDOW = 4
NUM_EPOCHS = 2
STEPS_A_STATE = 3
PHASES = ("building", "loading", "next", "pulling", "scoring", "step", "saving")
OWN_TIMEOUT = 3.0
"""Seconds that the loop's own collective waits."""
LAST = 14
"""So many steps before the end nobody is killed: the survivors might be through without another meeting."""


@dataclass(frozen=True)
class Run:
    folder: str
    mode: str
    in_lockstep: bool
    """Whether the loop has a collective of its own in each step, as under DDP."""
    timeout: float = 20.0
    scale: int = 1

    def log_of(self, rank: int) -> Path:
        return Path(self.folder, f"steps-of-{rank}")


@dataclass(frozen=True)
class Blow:
    """What was done to a rank."""

    victim: int
    phase: str
    """What it was at."""
    step: int
    at: float
    """Of `time.time()`."""


class Moment:
    """What a rank is at, for who watches: its process, the step it has done, the phase it is in, and where to wait."""

    def __init__(self, path: Path) -> None:
        path.touch()
        os.truncate(path, 32)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 32)

    pid = property(lambda self: self._read(0), lambda self, pid: self._write(0, pid))
    step = property(lambda self: self._read(8), lambda self, step: self._write(8, step))
    limit = property(lambda self: self._read(24), lambda self, step: self._write(24, step))

    @property
    def phase(self) -> str:
        return PHASES[self._read(16)]

    @phase.setter
    def phase(self, phase: str) -> None:
        self._write(16, PHASES.index(phase))

    def _read(self, at: int) -> int:
        return int(struct.unpack_from("q", self._memory, at)[0])

    def _write(self, at: int, number: int) -> None:
        struct.pack_into("q", self._memory, at, number)


class Shard:
    """A rank's batches, in another order in each epoch."""

    def __init__(self, rank: int, scale: int, moment: Moment) -> None:
        self._num = SHARDS[rank] * scale
        self._first = sum(SHARDS[:rank]) * scale
        self._losses = torch.rand(self._num, generator=torch.Generator().manual_seed(rank)) + rank
        self._moment = moment
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-self._num // BATCH)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = torch.randperm(self._num, generator=torch.Generator().manual_seed(self._epoch))
        for rows in order.split(BATCH):
            self._moment.phase = "pulling"
            time.sleep(5e-4)
            self._moment.phase = "next"
            yield {"id": rows + self._first, "loss": self._losses[rows]}


def train(run: Run) -> dict[str, Any]:
    """One life of a rank. What came of it: it is through, or has lost another rank."""
    moment = Moment(Path(run.folder, f"moment-{dist.get_rank()}"))
    own = None
    if run.in_lockstep:
        own = dist.new_group(timeout=timedelta(seconds=OWN_TIMEOUT))
        dist.all_reduce(torch.ones(1), group=own)
    moment.pid = os.getpid()
    try:
        go(run, moment, own)
    except fs.RankError as error:
        return {"is_through": False, "ranks": error.ranks, "text": str(error), "at": time.time()}
    return {"is_through": True}


def go(run: Run, moment: Moment, own: Any) -> None:
    rank = dist.get_rank()

    def score(batch: dict[str, Any]) -> torch.Tensor:
        moment.phase = "scoring"
        time.sleep(5e-4)
        moment.phase = "next"
        return batch["loss"]

    stream = fs.FlowStream(
        Shard(rank, run.scale, moment),
        fs.FunctionScorer(score, name="given"),
        mode=run.mode,  # type: ignore[arg-type]
        temperature=fs.RunningMedian(warmup_samples=32),
        include=("tau",),
        window=WINDOW,
        cache=None,
        timeout=run.timeout,
    )
    moment.phase = "loading"
    states = Path(run.folder, "states")
    step = fs.load_state(stream, states) or 0
    haste = random.Random(rank + step)
    is_lost = False
    with run.log_of(rank).open("a", buffering=1) as log:
        moment.step, moment.phase = step, "next"
        while stream.state_dict()["epoch"] < NUM_EPOCHS:
            for batch in stream:
                moment.phase = "step"
                while step >= moment.limit:
                    time.sleep(1e-3)
                time.sleep(haste.uniform(0, 4e-3))
                try:
                    if own is not None and not is_lost:
                        dist.all_reduce(torch.ones(1), group=own)
                except RuntimeError:
                    is_lost = True  # gloo names nobody: the next call to the stream does
                if is_lost:
                    continue
                step += 1
                weight = batch.get("flow_weight", torch.ones(len(batch["id"])))
                done = {"step": step, "epoch": stream.epoch, "ids": batch["id"].tolist(), "weight": weight.tolist()}
                print(json.dumps(done | {"tau": batch["flow_tau"].item().hex()}), file=log)
                moment.step, moment.phase = step, "saving"
                if step % STEPS_A_STATE == 0:
                    fs.save_state(stream, states, step=step)
                moment.phase = "next"
    fs.save_state(stream, states, step=step)
    stream.close()


def committed(run: Run, rank: int) -> list[dict[str, Any]]:
    """What each step trained on, as it was done last. What a padding batch is made from is not told."""
    steps = {}
    for line in _lines(run, rank):
        steps[line["step"]] = line if any(line["weight"]) else line | {"ids": [], "weight": []}
    assert sorted(steps) == list(range(1, len(steps) + 1))
    return [steps[number] for number in sorted(steps)]


def _lines(run: Run, rank: int) -> list[dict[str, Any]]:
    log = run.log_of(rank)
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def live(run: Run) -> None:
    """A life that nobody ends, to the end of the run."""
    outcomes = Watch(run, limit=2**62).watched_life()
    assert all(outcome.result == {"is_through": True} for outcome in outcomes), outcomes


def strike(
    run: Run, draws: random.Random, *, num_steps: int, furthest: int, host_store: Any, how: int = signal.SIGKILL
) -> tuple[Blow, list[Outcome]]:
    """A life in which a random rank is killed at a random moment, within the next `furthest` steps."""
    first = max((line["step"] for rank in range(WORLD_SIZE) for line in _lines(run, rank)[-1:]), default=0)
    target = min(first + draws.randrange(furthest), num_steps - LAST)
    watch = Watch(run, limit=target + STEPS_A_STATE + 2)
    return watch.struck_life(
        draws.randrange(WORLD_SIZE), draws.choice(PHASES), target, draws.uniform(0, 4e-3), host_store, how
    )


class Watch:
    """Over the ranks of a life, which wait before the step `limit` until it is lifted."""

    def __init__(self, run: Run, *, limit: int) -> None:
        self.run = run
        self.moments = [Moment(Path(run.folder, f"moment-{rank}")) for rank in range(WORLD_SIZE)]
        for moment in self.moments:
            moment.pid, moment.step, moment.phase, moment.limit = 0, 0, "building", limit

    def watched_life(self) -> list[Outcome]:
        return run_ranks(train, WORLD_SIZE, self.run)

    def struck_life(
        self, victim: int, phase: str, target: int, delay: float, host_store: Any, how: int
    ) -> tuple[Blow, list[Outcome]]:
        blows: list[Blow] = []
        is_over = threading.Event()

        def strike() -> None:
            moment = self.moments[victim]
            while not all(moment.pid for moment in self.moments) and not is_over.is_set():
                time.sleep(1e-4)
            reached = 0 if phase in ("building", "loading") else target
            patience = time.monotonic() + 1.0  # a phase may be over before it is seen
            while not (moment.step >= reached and moment.phase == phase):
                if is_over.is_set() or (moment.step >= reached and time.monotonic() > patience):
                    break
                time.sleep(1e-4)
            time.sleep(delay)
            if is_over.is_set():
                return
            os.kill(moment.pid, how)
            blows.append(Blow(victim, moment.phase, moment.step, time.time()))
            for moment in self.moments:
                moment.limit = 2**62

        thread = threading.Thread(target=strike)
        thread.start()
        try:
            outcomes = run_ranks(train, WORLD_SIZE, self.run, host_store=host_store, expect_death=[victim])
        finally:
            is_over.set()
            thread.join()
        assert blows, outcomes
        return blows[0], outcomes
