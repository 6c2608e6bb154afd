"""An epoch of training with FLOW's weights, over one without: the stream, its cache, and the offline ways.

A model of 4 M parameters in fp32 (see gsm8k.py) is trained with AdamW on padded batches of 16. All ways take turns,
each a share of its epoch at a time, so that what else the machine does hits them alike. Prints seconds of wall and of
CPU time, and the medians over the rounds of each over plain training, with the model's own loss, `model(**batch).loss`,
and with `weighted_lm_loss` at weights of 1, which spares the logits that have no label:

    plain         the model's own loss
    weights of 1  `weighted_lm_loss`, as all that follow
    two passes    offline, as the official code of arXiv 2502.02797: two full passes of scoring, then training
    one pass      offline, each loss taken once and stored
    epoch 1       FlowStream over the same loader
    epoch 2       the same stream again: all losses are in its cache

    python benchmarks/end_to_end.py [--samples 256] [--rounds 3] [--threads 2] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import gsm8k
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flowstream as fs

Batch = dict[str, Tensor]
Units = Iterator[None]
"""The work of an epoch: each `next` does a share of it."""

TARGETS = {"epoch 1": " (target 1.12)", "epoch 2": " (target 1.02)"}


class Trained:
    """Owns a model under training and its optimizer."""

    def __init__(self, reference: nn.Module) -> None:
        self.model = copy.deepcopy(reference).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def step(self, batch: Batch, weight: Tensor) -> None:
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        fs.weighted_lm_loss(logits, batch["labels"], weight).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def plain_step(self, batch: Batch) -> None:
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@torch.no_grad()
def mean_losses(reference: Any, batch: Batch) -> Tensor:
    """[B], nats, as the official code takes them: of a padded batch, from all logits, beside the model's own loss."""
    logits, following = reference(**batch).logits[:, :-1].float(), batch["labels"][:, 1:]
    nll = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none").view_as(following)
    return nll.sum(1) / (following != -100).sum(1)


def plain(reference: nn.Module, loader: Iterable[Batch]) -> Units:
    trained = Trained(reference)
    for batch in loader:
        trained.plain_step(batch)
        yield


def unweighted(reference: nn.Module, loader: Iterable[Batch]) -> Units:
    trained = Trained(reference)
    for batch in loader:
        trained.step(batch, torch.ones(len(batch["labels"])))
        yield


def offline(reference: nn.Module, loader: Iterable[Batch], num_passes: int) -> Units:
    """The passes over all samples, then training with the weights of the last."""
    trained, losses = Trained(reference), []
    for _ in range(num_passes):
        losses.clear()
        for batch in loader:
            losses.append(mean_losses(reference, batch))
            yield
    tau = torch.cat(losses).median()
    for batch, loss in zip(loader, losses, strict=True):
        trained.step(batch, torch.exp(-loss / tau))
        yield


def streamed(reference: nn.Module, stream: Iterable[Batch]) -> Units:
    trained = Trained(reference)
    for batch in stream:
        weight = batch.pop("flow_weight")
        trained.step(batch, weight)
        yield


def take_turns(ways: dict[str, tuple[Units, int]], num_turns: int) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds of each way. A way is its units and how many they are."""
    seconds = {name: [0.0, 0.0] for name in ways}
    done = dict.fromkeys(ways, 0)
    for turn in range(1, num_turns + 1):
        names = list(ways)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            units, num_units = ways[name]
            started, started_cpu = time.perf_counter(), time.process_time()
            while done[name] < num_units * turn // num_turns:
                next(units)
                done[name] += 1
            seconds[name][0] += time.perf_counter() - started
            seconds[name][1] += time.process_time() - started_cpu
    for name, (units, _) in ways.items():
        if next(units, units) is not units:
            raise RuntimeError(f"{name} has more work than was timed")
    return {name: (wall, cpu) for name, (wall, cpu) in seconds.items()}


def one_round(reference: nn.Module, loader: Any, scorer: fs.Scorer) -> dict[str, tuple[float, float]]:
    first, second = fs.FlowStream(loader, scorer), fs.FlowStream(loader, scorer)
    for _ in second:  # its first epoch fills its cache
        pass
    num = len(loader)
    ways: dict[str, tuple[Units, int]] = {
        "plain": (plain(reference, loader), num),
        "weights of 1": (unweighted(reference, loader), num),
        "two passes": (offline(reference, loader, 2), 3 * num),
        "one pass": (offline(reference, loader, 1), 2 * num),
        "epoch 1": (streamed(reference, first), num),
        "epoch 2": (streamed(reference, second), num),
    }
    return take_turns(ways, num)


def ratio(rounds: Sequence[dict[str, tuple[float, float]]], name: str, over: str, which: int) -> float:
    return statistics.median(seconds[name][which] / seconds[over][which] for seconds in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="32 samples, one round")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.samples, arguments.rounds = 32, 1
    torch.set_num_threads(arguments.threads)

    logging.getLogger("flowstream").setLevel(logging.ERROR)  # losses of so small a model are alike, and it tells
    reference = gsm8k.model(torch.float32)
    loader = gsm8k.loader(gsm8k.rows(arguments.samples))
    scorer = fs.CausalLMScorer(reference)
    first = next(iter(loader))
    Trained(reference).step(first, torch.ones(len(first["labels"])))  # what libraries set up on first use
    Trained(reference).plain_step(first)
    print(f"{arguments.samples} samples of {gsm8k.described()}, fp32, {torch.get_num_threads()} threads")
    rounds = []
    for number in range(arguments.rounds):
        rounds.append(one_round(reference, loader, scorer))
        told = ", ".join(f"{name} {wall:.1f} ({cpu:.1f})" for name, (wall, cpu) in rounds[-1].items())
        print(f"  round {number}, seconds (of CPU): {told}", flush=True)
    print("wall (CPU) time       over plain      over weights of 1")
    for name in rounds[0]:
        columns = [[ratio(rounds, name, over, which) for which in (0, 1)] for over in ("plain", "weights of 1")]
        told = "   ".join(f"{wall:.3f} ({cpu:.3f})" for wall, cpu in columns)
        print(f"  {name:18}  {told}{TARGETS.get(name, '')}")


if __name__ == "__main__":
    main()
