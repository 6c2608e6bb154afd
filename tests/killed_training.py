"""A training run that is killed at random moments and begun again from its checkpoints, until it is through.

One process imports torch, and forks each life of a run: a life costs milliseconds. It reads cases, one line of JSON
each, and prints what came of them.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

import flowstream as fs

NUM_EPOCHS = 2
STEPS_A_CHECKPOINT = 3
NUM_SAMPLES_A_KILL = 40


@dataclass(frozen=True)
class Case:
    folder: str
    mode: str
    is_cached: bool
    num_kills: int
    seed: int


class Points(Dataset[dict[str, Any]]):
    def __init__(self, num: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(num, 6, generator=generator)
        self.y = torch.randint(3, (num,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input": self.x[index], "labels": self.y[index], "id": index}


class Shuffled(Sampler[int]):
    """Another order in every epoch, the same in every life."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.num, generator=torch.Generator().manual_seed(self.epoch)).tolist()


class Progress:
    """Shared by a life and who watches it: how many steps are done, and before which one it waits."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 16)
        self.limit = 2**62

    step = property(lambda self: self._read(0), lambda self, step: self._write(0, step))
    limit = property(lambda self: self._read(8), lambda self, step: self._write(8, step))

    def _read(self, at: int) -> int:
        return int(struct.unpack_from("q", self._memory, at)[0])

    def _write(self, at: int, number: int) -> None:
        struct.pack_into("q", self._memory, at, number)


def train(case: Case, folder: Path, progress: Progress) -> None:
    """One life: from the last checkpoint to the end of the last epoch."""
    num = NUM_SAMPLES_A_KILL * case.num_kills
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = nn.Linear(6, 3).requires_grad_(False)
    stream = fs.FlowStream(
        DataLoader(Points(num), sampler=Shuffled(num), batch_size=8),
        fs.ClassifierScorer(reference),
        mode=case.mode,  # type: ignore[arg-type]
        window=3,
        temperature=fs.RunningMedian(warmup_samples=48),
        include=("loss", "tau"),
        cache=folder / "losses" if case.is_cached else None,
    )
    model: dict[str, Tensor] = {
        "step": torch.tensor(0),
        "counts": torch.zeros(NUM_EPOCHS, num, dtype=torch.int64),
        "order": torch.tensor(0),
        "sum": torch.tensor(0.0, dtype=torch.float64),
    }
    checkpoint = folder / "model.pt"
    if checkpoint.exists():
        model = torch.load(checkpoint, weights_only=True)
        assert fs.load_state(stream, folder / "stream", step=int(model["step"])) == model["step"]
    while stream.state_dict()["epoch"] < NUM_EPOCHS:
        for batch in stream:
            while progress.step >= progress.limit:
                time.sleep(1e-4)
            take_step(model, batch, stream.epoch)
            progress.step = int(model["step"])
            if model["step"] % STEPS_A_CHECKPOINT == 0:
                save(model, stream, folder)
    save(model, stream, folder)


def take_step(model: dict[str, Tensor], batch: dict[str, Any], epoch: int) -> None:
    """A model that is nothing but what it was trained on: how often, in which order, and with which weights."""
    ids = batch["id"]
    model["counts"][epoch] += torch.bincount(ids, minlength=model["counts"].shape[1])
    for at in ids.tolist():
        model["order"] = (model["order"] * 31 + at + 1) % (2**61 - 1)
    weight = batch.get("flow_weight", torch.ones(len(ids))).double()
    model["sum"] = model["sum"] * 0.999 + (weight * batch["flow_loss"].double()).sum() + batch["flow_tau"].double()
    model["step"] = model["step"] + 1
    time.sleep(1e-3)


def save(model: dict[str, Tensor], stream: fs.FlowStream, folder: Path) -> None:
    fs.save_state(stream, folder / "stream", step=int(model["step"]))
    temporary = folder / "model.tmp"
    torch.save(model, temporary)
    temporary.replace(folder / "model.pt")  # no sync: a killed process takes nothing of the page cache along


def begin_life(case: Case, folder: Path, progress: Progress) -> int:
    """The process id of a life that begins."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        train(case, folder, progress)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def run(case: Case) -> dict[str, Any]:
    """Train without a kill, then with `num_kills` of them; what the checkpointed models say in the end."""
    draws = random.Random(case.seed)
    undisturbed, killed = Path(case.folder, "undisturbed"), Path(case.folder, "killed")
    undisturbed.mkdir()
    killed.mkdir()
    progress = Progress()
    assert os.waitpid(begin_life(case, undisturbed, progress), 0)[1] == 0
    num_steps = progress.step
    lives = []
    for _ in range(case.num_kills):
        progress.step = first = steps_saved(killed)
        target = min(first + draws.randrange(2 * num_steps // case.num_kills + 1), num_steps - 2)
        progress.limit = min(target + 4, num_steps - 1)  # it cannot be through before it is killed
        pid = begin_life(case, killed, progress)
        while progress.step < target and not os.waitpid(pid, os.WNOHANG)[0]:
            time.sleep(1e-4)
        time.sleep(draws.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        lives.append(progress.step - first)
    progress.limit = 2**62
    assert os.waitpid(begin_life(case, killed, progress), 0)[1] == 0
    expected = torch.load(undisturbed / "model.pt", weights_only=True)
    found = torch.load(killed / "model.pt", weights_only=True)
    return {
        "differ": [name for name in expected if not torch.equal(expected[name], found[name])],
        "counts": expected["counts"].unique().tolist(),
        "num_steps": int(num_steps),
        "lives": lives,
    }


def steps_saved(folder: Path) -> int:
    path = folder / "model.pt"
    return int(torch.load(path, weights_only=True)["step"]) if path.exists() else 0


def main() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            found = run(Case(**json.loads(line)))
        except Exception:  # the next case is another run
            found = {"error": traceback.format_exc()}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
