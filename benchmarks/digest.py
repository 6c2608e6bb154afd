"""Our digest against the `tdigest` package: error of the median, time a value, merging."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

import numpy as np
import tdigest

from flowstream.digest import Digest


def laws(size: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    low = rng.random(size) < 0.6
    return {
        "lognormal": rng.lognormal(size=size),
        "gamma": rng.gamma(2.0, size=size),
        "pareto": 1 + rng.pareto(1.5, size=size),
        "bimodal": np.where(low, rng.normal(1, 0.1, size), rng.normal(10, 0.1, size)),
    }


def timed(build: Callable[[], object]) -> tuple[object, float]:
    start = time.process_time()
    result = build()
    return result, time.process_time() - start


def ours(values: np.ndarray, batch: int, max_centroids: int = 500) -> Digest:
    digest = Digest(max_centroids)
    for start in range(0, values.size, batch):
        digest.add(values[start : start + batch])
    digest.quantile(0.5)
    return digest


def theirs(values: np.ndarray, batch: int) -> tdigest.TDigest:
    random.seed(0)
    digest = tdigest.TDigest()
    for start in range(0, values.size, batch):
        for value in values[start : start + batch].tolist():
            digest.update(value)
    return digest


def compare(size: int, package_size: int, batch: int) -> None:
    print(f"median: relative error and CPU ns a value, in batches of {batch}")
    print(f"{'':<11}{f'ours, {size:,} values':^40} |{f'{package_size:,} values':^54}")
    print(
        f"{'law':<11}{'500 centroids':>20}{'2000 centroids':>20} |{'500':>9}{'2000':>9}{'package':>20}{'as fast':>16}"
    )
    for law, values in laws(size, seed=0).items():
        few = values[:package_size]
        exact, exact_few = np.median(values), np.median(few)
        line = f"{law:<11}"
        nanos = {}
        for max_centroids in (500, 2000):
            digest, seconds = timed(lambda values=values, m=max_centroids: ours(values, batch, m))
            nanos[max_centroids] = 1e9 * seconds / size
            line += f"{abs(digest.quantile(0.5) / exact - 1):>11.1e}{nanos[max_centroids]:>6.0f} ns"
        line += " |"
        for max_centroids in (500, 2000):
            line += f"{abs(ours(few, batch, max_centroids).quantile(0.5) / exact_few - 1):>9.1e}"
        package, seconds = timed(lambda few=few: theirs(few, batch))
        package_nanos = 1e9 * seconds / few.size
        line += f"{abs(package.percentile(50) / exact_few - 1):>9.1e}{package_nanos:>8.0f} ns"
        print(line + f"{package_nanos / nanos[500]:>9.0f} ×, {package_nanos / nanos[2000]:.0f} ×")
    print(f"the package keeps {len(package)} centroids")


def decay(size: int, half_life: int, window: int) -> None:
    print(f"\nhalf-life of {half_life:,} samples, windows of {window}, losses that drift: error of the decayed median")
    ages = np.arange(window)[::-1]
    for law, values in laws(size // window * window, seed=1).items():
        values = values * np.linspace(1, 2, values.size)
        digest = Digest()
        for start in range(0, values.size, window):
            digest.scale(2.0 ** (-window / half_life))
            digest.add(values[start : start + window], 2.0 ** (-ages / half_life))
        weights = 2.0 ** (-np.arange(values.size)[::-1] / half_life)
        order = np.argsort(values)
        middles = np.cumsum(weights[order]) - 0.5 * weights[order]
        exact = np.interp(0.5 * weights.sum(), middles, values[order])
        print(f"{law:<11}{abs(digest.quantile(0.5) / exact - 1):>10.1e}")


def merging(num_digests: int, values_each: int) -> None:
    print(f"\nmerging messages of {values_each:,} values each into one digest, {Digest.num_bytes():,} bytes a message")
    for count in (64, num_digests):
        values = np.random.default_rng(2).lognormal(size=(count, values_each))
        messages = [ours(part, values_each).to_bytes() for part in values]
        digests, read_seconds = timed(lambda messages=messages: [Digest.from_bytes(message) for message in messages])
        merged, seconds = timed(lambda digests=digests: Digest.merged(digests))
        error = abs(merged.quantile(0.5) / np.median(values) - 1)
        print(f"{count:>6}: merged in {1e3 * seconds:.0f} ms, read in {1e3 * read_seconds:.0f} ms, error {error:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--package-size", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--num-digests", type=int, default=1024)
    arguments = parser.parse_args()
    compare(arguments.size, arguments.package_size, arguments.batch)
    decay(arguments.size, half_life=20_000, window=512)
    merging(arguments.num_digests, values_each=2000)
