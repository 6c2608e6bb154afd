"""What the stream itself costs: a free scorer over a DataLoader with two workers, against the bare loader.

Prints the ratio of throughputs, the microseconds added a batch, and how memory grows over a million samples.

    python benchmarks/overhead.py [--rounds 5] [--batches 600] [--samples 1000000]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

import flowstream as fs

NUM_ROWS = 64
WIDTH = 128


class Slow(Dataset):
    """Batches of 64 rows; each takes a worker twice `seconds`, so that two workers deliver one every `seconds`."""

    def __init__(self, num_batches: int, seconds: float) -> None:
        self.num_batches = num_batches
        self.seconds = seconds
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1000, (NUM_ROWS, WIDTH), generator=generator)
        self.loss = torch.distributions.Gamma(2.0, 1.0).sample((num_batches, NUM_ROWS))

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        time.sleep(2 * self.seconds)
        return {"input_ids": self.ids, "labels": self.ids, "loss": self.loss[index]}


def seconds_a_batch(batches: Iterable[object]) -> float:
    """Mean over one whole pass: with the first window, which is pulled before the first batch is delivered."""
    started, count = time.perf_counter(), 0
    for _ in batches:
        count += 1
    return (time.perf_counter() - started) / count


def weighted(loader: Iterable[object]) -> fs.FlowStream:
    return fs.FlowStream(loader, fs.FunctionScorer(lambda batch: batch["loss"]), cache=None)


def throughput(rounds: int, num_batches: int) -> None:
    loader = DataLoader(Slow(num_batches, 0.005), batch_size=None, num_workers=2)
    ratios = []
    for _ in range(rounds):
        bare = seconds_a_batch(loader)
        ours = seconds_a_batch(weighted(loader))
        ratios.append(bare / ours)
        print(
            f"  bare {bare * 1e3:.2f} ms a batch, flowstream {ours * 1e3:.2f} ms: {bare / ours:.3f} of the throughput"
        )
    print(
        f"throughput over 2 workers at 5 ms a batch: {statistics.median(ratios):.3f} of the bare loader's (target 0.95)"
    )


def added(rounds: int, num_batches: int) -> None:
    batches = [Slow(num_batches, 0.0)[i] for i in range(num_batches)]
    times = [seconds_a_batch(weighted(batches)) - seconds_a_batch(batches) for _ in range(rounds)]
    print(f"added a batch of {NUM_ROWS} rows: {statistics.median(times) * 1e6:.0f} µs (target 300)")


class Endless:
    """`num_samples` samples in batches that are made as they are asked for."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        gamma = torch.distributions.Gamma(2.0, 1.0)
        for _ in range(self.num_samples // NUM_ROWS):
            yield {"input_ids": torch.zeros(NUM_ROWS, WIDTH, dtype=torch.int64), "loss": gamma.sample((NUM_ROWS,))}


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def memory(num_samples: int) -> None:
    seen, after_first = 0, None
    for batch in weighted(Endless(num_samples)):
        seen += len(batch["loss"])
        if after_first is None and seen >= num_samples // 10:
            after_first = resident_megabytes()
    growth = resident_megabytes() - (after_first or 0)
    print(f"memory: {growth:+.1f} MB from sample {num_samples // 10:,} to {num_samples:,} (target < 20)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=600)
    parser.add_argument("--samples", type=int, default=1_000_000)
    arguments = parser.parse_args()
    added(arguments.rounds, 2000)
    memory(arguments.samples)
    throughput(arguments.rounds, arguments.batches)


if __name__ == "__main__":
    main()
