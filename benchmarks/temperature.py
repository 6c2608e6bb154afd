"""How close the running τ is to the exact median of all losses of the windows before, window by window.

On GSM8K scored by ../shared/models/tiny-llama where that is there; else on drifting lognormal losses. Prints the worst
window.

    python benchmarks/temperature.py [--samples 2048] [--window 16]
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import gsm8k
import numpy as np
import torch
from torch.utils.data import DataLoader

import flowstream as fs


def under_tiny_llama(num_samples: int) -> tuple[DataLoader[Any], fs.Scorer]:
    """GSM8K, scored as its checkpoint is: in bf16."""
    return gsm8k.loader(gsm8k.rows(num_samples)), fs.CausalLMScorer.from_pretrained(str(gsm8k.MODEL))


def drifting(num_samples: int) -> tuple[list[dict[str, torch.Tensor]], fs.Scorer]:
    """Lognormal losses whose scale grows by half over the stream."""
    rng = np.random.default_rng(0)
    losses = rng.lognormal(size=num_samples) * np.linspace(1, 1.5, num_samples)
    parts = torch.tensor(losses, dtype=torch.float32).split(gsm8k.BATCH)
    return [{"loss": part} for part in parts], fs.FunctionScorer(lambda batch: batch["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--window", type=int, default=16)
    arguments = parser.parse_args()
    on_gsm8k = gsm8k.is_there()
    loader, scorer = (under_tiny_llama if on_gsm8k else drifting)(arguments.samples)
    started = time.perf_counter()
    stream = fs.FlowStream(loader, scorer, window=arguments.window, include=("loss", "tau"), cache=None)
    out = [(batch["flow_loss"].numpy(), float(batch["flow_tau"])) for batch in stream]
    seconds = time.perf_counter() - started

    losses = np.concatenate([loss for loss, _ in out])
    starts = np.cumsum([0] + [len(loss) for loss, _ in out])
    warmup = -(-fs.RunningMedian().warmup_samples // gsm8k.BATCH)
    worst, worst_at, worst_to_all = 0.0, 0, 0.0
    firsts = [0, *range(warmup, len(out), arguments.window)]
    for number, first in enumerate(firsts):
        before = losses[: starts[first if first else min(warmup, len(out))]]
        tau = out[first][1]
        error = abs(tau / np.median(before) - 1)
        worst_to_all = max(worst_to_all, abs(tau / np.median(losses) - 1))
        if error >= worst:
            worst, worst_at = error, number
    kind = "GSM8K under tiny-llama" if on_gsm8k else "drifting lognormal losses"
    print(f"{len(losses)} samples of {kind}, {len(firsts)} windows, {seconds:.0f} s of streaming")
    print(f"exact median of all: {np.median(losses):.4f} nats; first τ {out[0][1]:.4f}, last τ {out[-1][1]:.4f}")
    print(f"worst window {worst_at}: τ within {worst:.4%} of the exact median of the windows before (must hold: 2 %)")
    print(f"against the exact median of all: within {worst_to_all:.2%} at every window")
    if worst > 0.02:
        sys.exit("τ is further off than 2 %")


if __name__ == "__main__":
    main()
