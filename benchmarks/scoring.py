"""Losses of a frozen model: `CausalLMScorer` over windows of 256 samples against padded batches of 16 in order.

On GSM8K under ../shared/models/tiny-llama, or on what gsm8k.py makes instead. All ways take turns, in one process.
Ours includes reading the batches and planning. Prints how many times as fast it is, with what the FLOPs alone would
give; how much of its time the matrix products would take at the rate that this machine reaches on large ones, which is
how far it is from the hardware's limit; how far the losses differ; and the memory that each takes.

    python benchmarks/scoring.py [--samples 512] [--rounds 5] [--dtype float32] [--threads 2] [--compile]
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gsm8k
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import flowstream as fs

WINDOW = 256 // gsm8k.BATCH

Batch = dict[str, Tensor]
Way = Callable[[Sequence[Batch]], Tensor]
"""Batches → [samples] mean loss of each, nats."""


def mean_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """[B] means over the labelled tokens of logits [B, T, V]."""
    following = labels[:, 1:]
    nll = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), following.flatten(), reduction="none")
    return nll.view_as(following).sum(1) / (following != -100).sum(1)


@torch.no_grad()
def plain(model: Any, batches: Sequence[Batch]) -> Tensor:
    """Padded batches, the logits of all positions."""
    inputs = ({name: value for name, value in batch.items() if name != "labels"} for batch in batches)
    return torch.cat([mean_losses(model(**i).logits, b["labels"]) for i, b in zip(inputs, batches, strict=True)])


@torch.no_grad()
def official(model: Any, batches: Sequence[Batch]) -> Tensor:
    """As the official code of arXiv 2502.02797: given labels, the model takes a loss too, which is thrown away."""
    return torch.cat([mean_losses(model(**batch).logits, batch["labels"]) for batch in batches])


def ours(scorer: fs.Scorer, batches: Sequence[Batch]) -> Tensor:
    windows = [batches[at : at + WINDOW] for at in range(0, len(batches), WINDOW)]
    return torch.cat([s.loss for window in windows for s in scorer.begin(window, level="sample").finish()])


def counted(way: Way, batches: Sequence[Batch]) -> tuple[Tensor, float]:
    """The losses, and the FLOPs of the matrix products that they took, without attention's."""
    with FlopCounterMode(display=False) as counter:
        losses = way(batches)
    products = (num for operator, num in counter.get_flop_counts()["Global"].items() if "mm" in str(operator))
    return losses, float(sum(products))


def reached_flops(model: Any, dtype: torch.dtype, rounds: int) -> float:
    """FLOPs a second of the products that such a model is made of, the best of all sizes and times."""
    config, best = model.config, 0.0
    sizes = ((config.hidden_size, config.intermediate_size), (config.hidden_size, config.vocab_size), (2048, 2048))
    for inner, outer in sizes:
        rows, weight = torch.randn(2048, inner).to(dtype), torch.randn(outer, inner).to(dtype)
        for _ in range(4 * rounds):
            started = time.perf_counter()
            F.linear(rows, weight)
            best = max(best, 2 * 2048 * inner * outer / (time.perf_counter() - started))
    return best


def status_megabytes(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def megabytes_of(ways: dict[str, Way], names: Sequence[str], batches: Sequence[Batch]) -> dict[str, float]:
    """What each way takes at its peak beyond what the process has now; not a number where the system does not tell."""
    for name in names:
        ways[name]([{key: value[:2, :8] for key, value in batches[0].items()}])  # what libraries set up on first use
    before, found = status_megabytes("VmRSS"), {}
    for name in names:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
        except OSError:
            return dict.fromkeys(names, float("nan"))
        ways[name](batches)
        found[name] = status_megabytes("VmHWM") - before
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="compile ours, which takes half a minute first")
    parser.add_argument("--quick", action="store_true", help="32 samples, two rounds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.samples, arguments.rounds = 32, 2
    torch.set_num_threads(arguments.threads)

    dtype = getattr(torch, arguments.dtype)
    model = gsm8k.model(dtype)
    batches = list(gsm8k.loader(gsm8k.rows(arguments.samples)))
    unlabelled = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    scorer = fs.CausalLMScorer(model, copy=True, compile=arguments.compile)
    ways: dict[str, Way] = {
        "plain": lambda batches: plain(model, batches),
        "ours": lambda batches: ours(scorer, batches),
        "official": lambda batches: official(model, batches),
    }
    megabytes = megabytes_of(ways, ("ours", "plain"), batches[:WINDOW])  # before anything larger
    ways["packed"] = lambda _: ours(scorer, unlabelled)

    num_real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    num_labelled = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    num_padded = sum(batch["input_ids"].numel() for batch in batches)
    print(
        f"{arguments.samples} samples of {gsm8k.described()}, {arguments.dtype}, {torch.get_num_threads()} threads: "
        f"{num_real / arguments.samples:.0f} tokens a sample, {num_labelled / num_real:.0%} labelled"
    )
    losses, flops = zip(*(counted(ways[name], batches) for name in ("plain", "ours")), strict=True)
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            way(batches)
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - started_cpu)
    for number, (slow, fast) in enumerate(zip(wall["plain"], wall["ours"], strict=True)):
        print(f"  round {number}: plain {slow:.2f} s, ours {fast:.2f} s: {slow / fast:.2f} times as fast")

    def ratio(name: str, to: str, seconds: dict[str, list[float]]) -> float:
        return statistics.median(a / b for a, b in zip(seconds[to], seconds[name], strict=True))

    def told(name: str, to: str) -> str:
        return f"{ratio(name, to, wall):.2f} times as fast ({ratio(name, to, cpu):.2f} in CPU time)"

    print(f"ours against padded batches: {told('ours', 'plain')} (target 4)")
    print(f"  its products alone: {flops[0] / flops[1]:.2f} times fewer FLOPs")
    print(f"  packing alone, all tokens labelled: {told('packed', 'plain')}")
    print(f"ours against the official code's way, with a second loss: {told('ours', 'official')}")
    costs = scorer.begin(batches, level="sample")
    costs.finish()
    print(
        f"padded tokens a real one: {num_padded / num_real:.2f} in padded batches, "
        f"{costs.cost.num_padded / max(costs.cost.num_tokens, 1):.2f} in ours, which reads "
        f"{costs.cost.num_tokens / num_real:.3f} of the real ones"
    )
    rate = reached_flops(model, dtype, arguments.rounds)
    plain_share, ours_share = (num / rate / min(wall[name]) for name, num in zip(("plain", "ours"), flops, strict=True))
    print(
        f"products at the {rate / 1e9:.0f} GFLOP/s that this machine reaches: {ours_share:.0%} of the time of ours, "
        f"{plain_share:.0%} of padded batches'; were ours nothing but its products, it would be "
        f"{min(wall['plain']) * rate / flops[1]:.2f} times as fast"
    )
    difference = (losses[1] - losses[0]).abs().max()
    print(f"losses differ by {difference:.2g} nats at most (mean loss {losses[0].mean():.3f})")
    print(
        f"memory: ours {megabytes['ours']:.0f} MB, padded batches {megabytes['plain']:.0f} MB, "
        f"{megabytes['plain'] / max(megabytes['ours'], 1):.1f} times as much"
    )


if __name__ == "__main__":
    main()
