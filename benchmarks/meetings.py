"""What the ranks' meetings cost a training loop, beyond the ranks' own skew, against a gather at every boundary.

python benchmarks/meetings.py [--ranks 4] [--window 8] [--milliseconds 20] [--windows 60]

Each rank sleeps in place of a training step, without a word to the others, so that they drift apart. A wait for the
slowest rank is skew; what a wait lasts longer than that, and the work for the meeting, is ours. The plain alternative
gathers the same bytes with torch.distributed.all_gather once a window, when it needs them. Target: 1 % of the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.multiprocessing

import flowstream as fs
from flowstream.distributed.agreement import Agreement
from flowstream.distributed.message import Message

Times = list[tuple[float, float, float, float]]
"""Of each meeting: when its call began, when it was called, when it was waited for, when it was over."""


def watched(times: Times) -> None:
    """Have the stream's meetings write down when they happen."""
    start, wait = Agreement.start, Agreement.wait
    called = [0.0, 0.0]

    def timed_start(self: Agreement, message: bytes, place: str) -> None:
        called[0] = time.monotonic()
        start(self, message, place)
        called[1] = time.monotonic()

    def timed_wait(self: Agreement) -> list[bytes]:
        began = time.monotonic()
        found = wait(self)
        times.append((called[0], called[1], began, time.monotonic()))
        return found

    Agreement.start, Agreement.wait = timed_start, timed_wait  # type: ignore[method-assign]


def batches(num: int) -> Iterator[dict[str, torch.Tensor]]:
    for seed in range(dist.get_rank() * num, (dist.get_rank() + 1) * num):
        yield {"loss": torch.rand(32, generator=torch.Generator().manual_seed(seed))}


def ours(args: argparse.Namespace) -> Times:
    times: Times = []
    watched(times)
    scorer = fs.FunctionScorer(lambda batch: batch["loss"])
    with fs.FlowStream(batches(args.windows * args.window), scorer, window=args.window, cache=None) as stream:
        for _ in stream:
            time.sleep(args.milliseconds / 1000)
    return times


def plain(args: argparse.Namespace) -> Times:
    times: Times = []
    message = torch.zeros(Message.num_bytes(0), dtype=torch.uint8)
    found = [torch.empty_like(message) for _ in range(args.ranks)]
    for _ in range(args.windows):
        for _ in range(args.window):
            time.sleep(args.milliseconds / 1000)
        began = time.monotonic()
        dist.all_gather(found, message)
        times.append((began, began, began, time.monotonic()))
    return times


def beyond_skew(of_ranks: list[Times]) -> tuple[float, float]:
    """(share of the time that meetings took beyond skew, median over ranks; milliseconds a meeting)."""
    shares, means = [], []
    num = min(map(len, of_ranks))
    for own in of_ranks:
        took = 0.0
        for number in range(2, num):  # the first window is made with nothing to hide it behind
            begins, called, waits, ends = own[number]
            latest = max(times[number][1] for times in of_ranks)
            took += called - begins + ends - max(waits, min(latest, ends))
        shares.append(took / (own[num - 1][3] - own[1][3]))
        means.append(1e3 * took / (num - 2))
    return statistics.median(shares), statistics.median(means)


def rank(number: int, args: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, args.ranks, is_master=False)
    dist.init_process_group("gloo", store=store, rank=number, world_size=args.ranks)
    results = []
    for way in (plain, ours):
        dist.barrier()
        found: list[Times] = [[] for _ in range(args.ranks)]
        dist.all_gather_object(found, way(args))
        results.append(beyond_skew(found))
    if number == 0:
        (plain_share, plain_ms), (our_share, our_ms) = results
        print(f"{args.ranks} ranks, {args.milliseconds} ms a step, a meeting every {args.window} steps, beyond skew:")
        print(f"  gathered at the boundary {plain_share:.2%} of the time, {plain_ms:.2f} ms a window")
        print(f"  flowstream {our_share:.2%} of the time, {our_ms:.2f} ms a window (target 1 %)")
        print(f"ratio {our_share / plain_share:.2f}")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--milliseconds", type=float, default=20)
    parser.add_argument("--windows", type=int, default=60)
    args = parser.parse_args()
    store = dist.TCPStore("127.0.0.1", 0, args.ranks, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(rank, (args, store.port), nprocs=args.ranks)


if __name__ == "__main__":
    main()
