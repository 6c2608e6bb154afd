"""One τ over 8 to 4,096 ranks: bytes, merge time, and τ against the exact median over all ranks' losses.

The ranks are simulated in one process, without a network: each has its own law of losses, over a hundredfold range,
some ranks' losses are constant, some ranks are empty. What the network costs is a model, whose constants are printed,
beside a real all-gather of a few local processes.
"""

from __future__ import annotations

import tempfile
import time
import timeit
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from flowstream.digest import Digest
from flowstream.distributed.meetings import MAX_MERGED, MIN_VALUES
from flowstream.distributed.message import MERGED_CENTROIDS, Message
from flowstream.distributed.world import World
from flowstream.running_temperature import RunningTemperature
from flowstream.temperature import RunningMedian

WORLD_SIZES = (8, 32, 128, 512, 1024, 4096)
NODE = 8  # ranks
NUM_WINDOWS = 4
RANK_RUNS = 320  # a world of 8 is run 40 times, the largest once
MESSAGE = Message.num_bytes(0)  # without label counts
# Of the ring on paper: seconds a hop, bytes a second. Ethernet of 10 Gbit/s between nodes, shared memory within one.
LATENCY, BANDWIDTH = 50e-6, 1.25e9
NODE_LATENCY, NODE_BANDWIDTH = 15e-6, 5e9


def losses_of(rank: int, window: int, seed: int, warmup: int) -> np.ndarray:
    """A rank's losses in a window: float32 as the stream's, 256 to 4,096 of them, or none, or all the same."""
    law = np.random.default_rng((seed, rank))
    location, spread = 10 ** law.uniform(-1, 1), law.uniform(0.3, 1)
    rng = np.random.default_rng((seed, rank, window))
    size = warmup if window == 0 else int(256 * 16 ** (rng.random() ** 2))
    if rank % 16 == 5 or (rank % 16 == 9 and window >= 2):
        size = 0
    values = np.full(size, location) if rank % 8 == 3 else location * rng.lognormal(0, spread, size)
    return values.astype(np.float32)


def messages_of(shards: Sequence[np.ndarray]) -> list[bytes]:
    """The digest of each rank, in as many values as a message holds in such a world."""
    temperature = RunningTemperature(RunningMedian())
    max_values = max(World(world_size=len(shards)).share(MAX_MERGED), MIN_VALUES)
    return [temperature.window_digest(shard).to_bytes(max_values) for shard in shards]


def merged(messages: Sequence[bytes]) -> Digest:
    return Digest.merged([Digest.from_bytes(message) for message in messages], MERGED_CENTROIDS)


def of_nodes(messages: Sequence[bytes]) -> list[bytes]:
    """What each node says after its own ranks have met: as long as what a rank says."""
    return [merged(messages[i : i + NODE]).to_bytes(MIN_VALUES) for i in range(0, len(messages), NODE)]


def milliseconds(call: Callable[[], object]) -> float:
    """CPU time, the best of a few calls: the machine is shared."""
    return 1e3 * min(timeit.repeat(call, timer=time.process_time, number=1, repeat=5))


def ring(num_ranks: int, latency: float, bandwidth: float, num_bytes: int = MESSAGE) -> float:
    """Milliseconds of an all-gather on paper: each message goes from neighbour to neighbour."""
    return 1e3 * (num_ranks - 1) * (latency + num_bytes / bandwidth)


def cost(world_size: int) -> None:
    shards = [losses_of(rank, 1, 0, 0) for rank in range(world_size)]
    messages = messages_of(shards)
    nodes = of_nodes(messages)
    # The most there is to sort: every rank's window is full.
    full = messages_of(np.random.default_rng(0).lognormal(size=(world_size, 2000)).astype(np.float32))
    merge, merge_full = milliseconds(lambda: merged(messages)), milliseconds(lambda: merged(full))
    merges = milliseconds(lambda: of_nodes(messages[:NODE])) + milliseconds(lambda: merged(nodes))
    network = ring(world_size, LATENCY, BANDWIDTH)
    # A node's ranks meet, one of them goes to the other nodes, and hands round what all of these said.
    rings = ring(NODE, NODE_LATENCY, NODE_BANDWIDTH) + ring(len(nodes), LATENCY, BANDWIDTH)
    rings += np.log2(NODE) * ring(2, NODE_LATENCY, NODE_BANDWIDTH, len(nodes) * MESSAGE)
    flat_mb, node_mb = (1e-6 * count * MESSAGE for count in (world_size - 1, NODE - 1 + len(nodes)))
    raw_mb = 4e-6 * (world_size - 1) * max(shard.size for shard in shards)  # a gather needs equal lengths
    median = milliseconds(lambda: np.median(np.concatenate(shards)))
    print(f"{world_size:>6}{flat_mb:>8.2f}{merge:>8.1f}{merge_full:>11.1f}{network:>8.1f}", end="|")
    print(f"{node_mb:>8.2f}{merges:>8.1f}{rings:>8.1f}{(merge + network) / (merges + rings):>9.1f} ×", end="|")
    print(f"{raw_mb:>8.2f}{median:>8.1f}{raw_mb / flat_mb:>7.1f} ×", flush=True)


def errors(world_size: int, seed: int) -> np.ndarray:
    """Of τ, and of the mean of the ranks' medians, the worst of the windows: each [relative, in rank]."""
    temperature = RunningTemperature(RunningMedian())
    history, found = np.empty(0, dtype=np.float32), []
    for window in range(NUM_WINDOWS):
        shards = [losses_of(rank, window, seed, -(-1024 // world_size)) for rank in range(world_size)]
        history = np.sort(np.concatenate([history, *shards]))
        temperature.update(merged(messages_of(shards)), sum(shard.size for shard in shards))
        taus = np.array([temperature.tau(), np.mean([np.median(shard) for shard in shards if shard.size])])
        below, upto = (np.searchsorted(history, taus, side=side) / history.size for side in ("left", "right"))
        in_rank = np.maximum(np.maximum(below - 0.5, 0.5 - upto), 0)
        found.append(np.stack([abs(taus / np.median(history) - 1), in_rank], axis=1))
    return np.max(found, axis=0)


def all_gathers(rank: int, world_size: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size)
    message, taken = torch.zeros(MESSAGE, dtype=torch.uint8), []
    received = [torch.empty_like(message) for _ in range(world_size)]
    for _ in range(100):
        dist.barrier()
        start = time.perf_counter()
        dist.all_gather(received, message)
        taken.append(1e6 * (time.perf_counter() - start))
    if rank == 0:
        low, middle, high = np.percentile(taken[20:], [10, 50, 90])
        print(f"{world_size} processes: median {middle:.0f} µs (10–90 %: {low:.0f}–{high:.0f})")
    dist.destroy_process_group()


def main() -> None:
    print(f"one window, messages of {MESSAGE:,} bytes, nodes of {NODE} ranks; ms (CPU, best of 5). The rings on paper:")
    print(f"  {1e6 * LATENCY:.0f} µs a hop and {BANDWIDTH / 1e9} GB/s between nodes;", end=" ")
    print(f"{1e6 * NODE_LATENCY:.0f} µs and {NODE_BANDWIDTH / 1e9} GB/s within a node")
    print(f"{'':6}{'flat':^35}|{'node first':^35}|{'raw losses, one window':^25}")
    print(f"{'ranks':>6}{'MB':>8}{'merge':>8}{'full ranks':>11}{'ring':>8}", end="|")
    print(f"{'MB':>8}{'merge':>8}{'rings':>8}{'flat takes':>11}|{'MB':>8}{'median':>8}{'MB/flat':>9}")
    for world_size in WORLD_SIZES:
        cost(world_size)
    print(f"\nτ against the exact median of all ranks' losses so far, worst of {NUM_WINDOWS} windows: relative error,")
    print("(in rank: the share of all losses that lies between the two), and runs above 0.2 %")
    print(f"{'ranks':>6}{'runs':>5}{'τ':>25}{'mean of medians':>27}")
    for world_size in WORLD_SIZES:
        runs = np.array([errors(world_size, seed) for seed in range(max(1, RANK_RUNS // world_size))])
        print(f"{world_size:>6}{len(runs):>5}", end="")
        for way in runs.transpose(1, 0, 2):
            (relative, in_rank), above = way.max(0), int((way[:, 0] > 0.002).sum())
            print(f"{relative:>13.3%} ({in_rank:.3%}){above:>3}", end="")
        print(flush=True)
    print("\na real all-gather over gloo")
    mp.get_context("forkserver").set_forkserver_preload(["torch", "flowstream.running_temperature"])
    for world_size in (2, 4, 8):
        with tempfile.TemporaryDirectory() as directory:
            mp.start_processes(all_gathers, (world_size, directory), world_size, start_method="forkserver")


if __name__ == "__main__":
    main()
