"""What checkpoints of a stream's position cost: one every 100 steps of 20 ms, against the steps alone.

Prints the share of the time that goes into `state_dict()` and saving, and the size, for windows of 512 samples.

    python benchmarks/state.py [--rounds 50] [--folder .]
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

import flowstream as fs

STEPS_A_CHECKPOINT = 100
SECONDS_A_STEP = 0.020
NUM_ROWS = 16
WINDOW = 32


class Losses(Dataset):
    def __init__(self, num: int) -> None:
        self.losses = torch.distributions.Gamma(2.0, 1.0).sample((num,))

    def __len__(self) -> int:
        return len(self.losses)

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"loss": self.losses[index], "id": index}


def seconds_of(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(mode: str, rounds: int, folder: Path) -> None:
    stream = fs.FlowStream(
        DataLoader(Losses(400_000), batch_size=NUM_ROWS),
        fs.FunctionScorer(lambda batch: batch["loss"]),
        mode=mode,  # type: ignore[arg-type]
        window=WINDOW,
        cache=None,
    )
    iterator = iter(stream)
    times: dict[str, list[float]] = {"state_dict()": [], "and torch.save": [], "and fsync (save_state)": []}
    path, size = folder / "plain.pt", 0
    for number in range(rounds):
        for _ in range(STEPS_A_CHECKPOINT - 1):  # not in step with the windows
            next(iterator)
        times["state_dict()"].append(seconds_of(stream.state_dict))
        times["and torch.save"].append(seconds_of(lambda: torch.save(stream.state_dict(), path)))
        times["and fsync (save_state)"].append(
            seconds_of(lambda step=number: fs.save_state(stream, folder, step=step))  # type: ignore[misc]
        )
        buffer = io.BytesIO()
        torch.save(stream.state_dict(), buffer)
        size = max(size, buffer.tell())
    print(f"{mode}: {size / 1024:.0f} KB at most (target 64), one every {STEPS_A_CHECKPOINT} steps of 20 ms")
    for name, found in times.items():
        share = statistics.median(found) / (STEPS_A_CHECKPOINT * SECONDS_A_STEP)
        print(f"  {name}: {statistics.median(found) * 1e3:.2f} ms, {share:.3%} of the steps (target 1 %)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk that checkpoints go to")
    arguments = parser.parse_args()
    for mode in ("weight", "resample"):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            measure(mode, arguments.rounds, Path(folder))


if __name__ == "__main__":
    main()
