"""A loss without logits: `weighted_linear_cross_entropy` against the head's logits and `weighted_lm_loss`.

Each case runs in processes of its own, forward and backward. Prints the seconds of either, their ratio, and the memory
that each needs beyond its inputs: the growth of the process' high-water mark, gradients included.

    python benchmarks/linear_loss.py [--rounds 3] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import flowstream as fs

CASES = (
    # vocabulary, width, tokens, dtype, head trained
    (32_768, 512, 1024, "float32", True),
    (32_768, 512, 1024, "float32", False),
    (32_768, 512, 1024, "bfloat16", True),
    (262_144, 256, 1024, "float32", True),
    (262_144, 256, 1024, "float32", False),
    (262_144, 256, 1024, "bfloat16", True),
)


def plain(hidden: Tensor, head: nn.Linear, labels: Tensor, weight: Tensor) -> Tensor:
    return fs.weighted_lm_loss(head(hidden), labels, weight)


LOSSES = {"plain": plain, "ours": fs.weighted_linear_cross_entropy}


def high_water_megabytes() -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def measure(name: str, vocabulary: int, width: int, num_tokens: int, dtype: str, trained: bool, rounds: int) -> None:
    """Prints seconds a step and megabytes as JSON."""

    def seconds_a_step(vocabulary: int, num_tokens: int) -> float:
        hidden = torch.randn(2, num_tokens // 2, width).to(getattr(torch, dtype)).requires_grad_()
        labels = torch.randint(vocabulary, (2, num_tokens // 2))
        head = nn.Linear(width, vocabulary, bias=False, dtype=hidden.dtype).requires_grad_(trained)
        nonlocal before
        before = high_water_megabytes()
        started = time.perf_counter()
        LOSSES[name](hidden, head, labels, torch.rand(2)).backward()
        return time.perf_counter() - started

    before = 0.0
    seconds_a_step(100, 64)  # what libraries set up on first use
    seconds = [seconds_a_step(vocabulary, num_tokens)]
    megabytes = high_water_megabytes() - before
    seconds += [seconds_a_step(vocabulary, num_tokens) for _ in range(rounds - 1)]
    print(json.dumps([statistics.median(seconds), megabytes]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        measure(*arguments.one, arguments.rounds)
        return
    for case in CASES:
        vocabulary, width, num_tokens, dtype, trained = case
        found = {}
        for name in LOSSES:
            command = [sys.executable, __file__, "--one", json.dumps([name, *case])]
            command += ["--rounds", str(arguments.rounds), "--threads", str(arguments.threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name] = json.loads(done.stdout)
        (slow, large), (seconds, megabytes) = found["plain"], found["ours"]
        gradients = (vocabulary * trained + num_tokens) * width * getattr(torch, dtype).itemsize / 2**20
        print(
            f"V {vocabulary:,}, D {width}, {num_tokens:,} tokens, {dtype}, head {'trained' if trained else 'frozen'}: "
            f"{seconds:.2f} s against {slow:.2f} s, {seconds / slow:.2f} of the time; {megabytes:,.0f} MB against "
            f"{large:,.0f} MB, {large / megabytes:.1f} times less (gradients {gradients:,.0f} MB)"
        )


if __name__ == "__main__":
    main()
