"""Gradients over ranks of unequal data: their mean is that of one process over the union of a step's batches."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from faulty import Bounded
from spawned import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from uneven import own_rank

import flowstream as fs

SIZES = [8 * 6 + 3, 0, 21, 8 * 5]
"""Seven batches on the first rank, none on the second: with two a step, the third runs dry within one."""

CLASSES, FEATURES, WIDTH = 5, 6, 9


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(FEATURES, CLASSES)


def rows(rank: int, num: int) -> list[dict[str, Tensor]]:
    """Images, in a way; one in three has no label on the last rank, none elsewhere."""
    generator = torch.Generator().manual_seed(rank)
    inputs = torch.randn(num, FEATURES, generator=generator)
    labels = torch.randint(0, CLASSES, (num,), generator=generator)
    if rank == 3:
        labels[::3] = -100
    return [{"x": inputs[i : i + 8], "labels": labels[i : i + 8]} for i in range(0, num, 8)]


def texts(rank: int, num: int) -> list[dict[str, Tensor]]:
    """Rows with few labels on one rank, many on another."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, 97, (num, WIDTH), generator=generator)
    labels = ids.clone()
    labels[:, : 1 + 2 * rank] = -100
    labels[::2, -1] = -100
    mask = torch.ones_like(ids)
    whole = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return [{name: value[i : i + 8] for name, value in whole.items()} for i in range(0, num, 8)]


class InDouble(nn.Module):
    """The model that is trained: summed losses, in float64, so that what is compared is not rounding."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "rows":
            self.body = linear(1)
        else:
            torch.manual_seed(1)
            self.body = nn.Sequential(nn.Embedding(97, 8), nn.Linear(8, 97))
        self.double()

    def forward(self, batch: dict[str, Tensor], weight: Tensor) -> Tensor:
        labels, inputs = batch["labels"], batch["x"].double() if "x" in batch else batch["input_ids"]
        logits = self.body(inputs)
        if "x" not in batch:
            logits, labels = logits[:, :-1].transpose(1, 2), labels[:, 1:]
            weight = weight[:, 1:] if weight.ndim == 2 else weight[:, None]
        losses = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        return (losses * weight.double()).sum()


def num_labelled(batch: dict[str, Tensor]) -> int:
    labels = batch["labels"] if batch["labels"].ndim == 1 else batch["labels"][:, 1:]
    return int((labels != -100).sum())


def gradient(model: nn.Module) -> Tensor:
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return found


def compared(kind: str, accumulate: int, settings: dict[str, Any]) -> list[dict[str, float]]:
    """A step at a time: how far the ranks' mean gradient is from that of one process, and the denominators."""
    loader = {"rows": rows, "texts": texts}[kind](own_rank(), SIZES[own_rank()])
    scorer = fs.ClassifierScorer(linear(0)) if kind == "rows" else fs.CausalLMScorer(Bounded(10**6))
    trained = DistributedDataParallel(InDouble(kind))
    alone = InDouble(kind)
    steps: list[dict[str, float]] = []
    with fs.FlowStream(
        loader,
        scorer,
        accumulate=accumulate,
        window=2 * accumulate,
        include=("denominator",),
        temperature=fs.FixedTemperature(2.0),
        **settings,
    ) as stream:
        batches: list[Any] = []
        for number, batch in enumerate(stream):
            weight, denominator = batch.pop("flow_weight"), batch.pop("flow_denominator")
            batches.append((batch, weight, float(denominator)))
            is_last = len(batches) == accumulate or number == len(stream) - 1
            with contextlib.nullcontext() if is_last else trained.no_sync():
                (trained(batch, weight) / denominator.double()).backward()
            if not is_last:
                continue
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, batches)
            union = [one for told in everyone for one in told]
            num = sum(num_labelled(batch) for batch, _, _ in union)
            for each, weights, _ in union:
                (alone(each, weights) / num).backward()
            mean, whole = gradient(trained), gradient(alone)
            told = {one[2] for one in union}
            steps.append(
                {
                    "error": float((mean - whole).norm() / whole.norm()),
                    "norm": float(whole.norm()),
                    "num": num,
                    "num_batches": len(batches),
                    "low": min(told) * len(everyone),
                    "high": max(told) * len(everyone),
                }
            )
            batches = []
    return steps


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("kind", "settings"), [("rows", {}), ("texts", {}), ("texts", {"level": "token"})])
def test_the_mean_gradient_of_the_ranks_is_that_of_one_process_over_the_union(kind, settings, accumulate):
    outcomes = run_ranks(compared, 4, kind, accumulate, settings)
    assert [str(outcome.error) for outcome in outcomes if outcome.error] == []
    for outcome in outcomes:
        steps = outcome.result
        assert [step["num_batches"] for step in steps] == ([1] * 7 if accumulate == 1 else [2, 2, 2, 1])
        for step in steps:
            assert step["norm"] > 0
            assert step["error"] < 1e-6
            assert step["low"] == pytest.approx(step["num"], rel=1e-6)
            assert step["high"] == pytest.approx(step["num"], rel=1e-6)


def counted(accumulate: int, on_uneven: str) -> list[tuple[float, list[Any]]]:
    loader = rows(own_rank(), [8 * 7, 8 * 5 + 1, 60, 8 * 9][own_rank()])
    scorer = fs.ClassifierScorer(linear(0))
    settings: dict[str, Any] = {"accumulate": accumulate, "window": 4, "on_uneven": on_uneven}
    with fs.FlowStream(loader, scorer, include=("denominator",), **settings) as stream:
        return [(float(batch["flow_denominator"]), batch["labels"].tolist()) for batch in stream]


@pytest.mark.parametrize("on_uneven", ["pad", "stop"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_denominators_count_the_labels_of_a_step_over_all_ranks(on_uneven, accumulate):
    found = [outcome.result for outcome in run_ranks(counted, 4, accumulate, on_uneven)]
    num = len(found[0])
    assert num == (9 if on_uneven == "pad" else 6)
    for step in range(0, num, accumulate):
        labels = [label for one in found for _, own in one[step : step + accumulate] for label in own]
        expected = sum(label != -100 for label in labels)
        for one in found:
            for denominator, _ in one[step : step + accumulate]:
                assert denominator * 4 == pytest.approx(expected)
