"""How close the running τ is to the exact median of all losses of the windows before, window by window.

On GSM8K scored by ../shared/models/tiny-llama where that is there; else on drifting lognormal losses. Prints the worst
window.

    python benchmarks/temperature.py [--samples 2048] [--window 16]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

import flowstream as fs

SHARED = Path(__file__).parents[2] / "shared"
BATCH = 16


def gsm8k(num_samples: int) -> tuple[DataLoader[Any], fs.Scorer]:
    """Questions without labels, answers with; rows padded to their batch's longest."""
    from transformers import AutoTokenizer

    model = SHARED / "models" / "tiny-llama"
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = (SHARED / "data" / "gsm8k" / "train.jsonl").read_text().splitlines()[:num_samples]

    def collate(lines: Sequence[str]) -> dict[str, torch.Tensor]:
        rows = []
        for row in map(json.loads, lines):
            question = tokenizer(row["question"] + "\n").input_ids
            answer = tokenizer(row["answer"]).input_ids
            rows.append((question + answer, [-100] * len(question) + answer))
        width = max(len(ids) for ids, _ in rows)
        return {
            "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
        }

    return DataLoader(lines, batch_size=BATCH, collate_fn=collate), fs.CausalLMScorer.from_pretrained(model)


def drifting(num_samples: int) -> tuple[list[dict[str, torch.Tensor]], fs.Scorer]:
    """Lognormal losses whose scale grows by half over the stream."""
    rng = np.random.default_rng(0)
    losses = rng.lognormal(size=num_samples) * np.linspace(1, 1.5, num_samples)
    parts = torch.tensor(losses, dtype=torch.float32).split(BATCH)
    return [{"loss": part} for part in parts], fs.FunctionScorer(lambda batch: batch["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--window", type=int, default=16)
    arguments = parser.parse_args()
    on_gsm8k = SHARED.exists()
    loader, scorer = (gsm8k if on_gsm8k else drifting)(arguments.samples)
    started = time.perf_counter()
    stream = fs.FlowStream(loader, scorer, window=arguments.window, include=("loss", "tau"), cache=None)
    out = [(batch["flow_loss"].numpy(), float(batch["flow_tau"])) for batch in stream]
    seconds = time.perf_counter() - started

    losses = np.concatenate([loss for loss, _ in out])
    starts = np.cumsum([0] + [len(loss) for loss, _ in out])
    warmup = -(-fs.RunningMedian().warmup_samples // BATCH)
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
