"""What the loss cache takes: look-ups and writes of a file with a million losses, beside a plain dict of Python's.

Prints look-ups a second in batches, of losses that are there and that are not; losses written a second, on the disk
when `put` returns; the size of the file; and the time to open it.

    python benchmarks/cache.py [--losses 1000000] [--batch 4096] [--rounds 5] [--folder .]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowstream.scoring.cache import Namespace, content_key
from flowstream.scoring.disk_cache import DiskCache
from flowstream.scoring.memory_cache import MemoryCache

NAMESPACE = Namespace("benchmark", "sample", "benchmark")
NUM_BATCHES = 50


def keys_of(name: str, num: int) -> list[bytes]:
    return [content_key(NAMESPACE, f"{name} {number}".encode()) for number in range(num)]


def per_second(get: Callable[[Sequence[bytes]], Any], batches: Sequence[Sequence[bytes]], rounds: int) -> float:
    """Look-ups a second: the median of the rounds."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        for batch in batches:
            get(batch)
        seconds.append(time.perf_counter() - started)
    return sum(map(len, batches)) / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--losses", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to make the file, for a while")
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    keys = keys_of("sample", arguments.losses)
    losses = generator.gamma(2.0, size=(arguments.losses, 1)).astype(np.float32)
    picks = generator.integers(arguments.losses, size=(NUM_BATCHES, arguments.batch))
    hits = [[keys[at] for at in row] for row in picks.tolist()]
    unknown = keys_of("other", NUM_BATCHES * arguments.batch)
    misses = [unknown[at : at + arguments.batch] for at in range(0, len(unknown), arguments.batch)]

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        cache = DiskCache(folder)
        cache.register(NAMESPACE)
        seconds = 0.0
        for at in range(0, len(keys), arguments.batch):
            values = list(losses[at : at + arguments.batch])
            started = time.perf_counter()
            cache.put(keys[at : at + arguments.batch], values)
            seconds += time.perf_counter() - started
        print(f"written: {len(keys) / seconds:,.0f} losses a second, {arguments.batch} a transaction, each synced")
        cache.close()
        size = Path(folder, "data.mdb").stat().st_size
        print(f"file: {size / 2**20:.0f} MB for {len(keys):,} losses, {size / len(keys):.0f} bytes each")
        started = time.perf_counter()
        cache = DiskCache(folder)
        print(f"opened and looked through in {time.perf_counter() - started:.2f} s")
        for row, batch in zip(picks[:3], hits, strict=False):
            found = np.concatenate([value for value in cache.get(batch) if value is not None])
            assert np.array_equal(found, losses[row, 0])
        found_hits = per_second(cache.get, hits, arguments.rounds)
        found_misses = per_second(cache.get, misses, arguments.rounds)
        cache.close()
    print(f"path: {found_hits:,.0f} look-ups a second that hit (target 200,000), {found_misses:,.0f} that miss")
    memory = MemoryCache(max_bytes=2**40)
    memory.put(keys, list(losses))
    in_memory = per_second(memory.get, hits, arguments.rounds)
    print(f"memory: {in_memory:,.0f} look-ups a second that hit")
    plain = dict(zip(keys, losses, strict=True))
    in_dict = per_second(lambda batch: [plain.get(key) for key in batch], hits, arguments.rounds)
    print(f"a plain dict: {in_dict:,.0f} a second; path takes {in_dict / found_hits:.1f} times as long")


if __name__ == "__main__":
    main()
