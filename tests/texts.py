"""Texts with prompts, in batches of any layout, and what a model says of each alone in a plain loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LENGTHS = (5, 11, 1, 8, 2)


def make_samples(lengths: tuple[int, ...] = LENGTHS, seed: int = 0, first_id: int = 3) -> list[tuple[Tensor, Tensor]]:
    """(ids, labels) of each sample; the first few labels ignored, as a prompt's are."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number, length in enumerate(lengths):
        ids = torch.randint(first_id, 97, (length,), generator=generator)
        labels = ids.clone()
        labels[: number % 3] = -100
        samples.append((ids, labels))
    return samples


def alone(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """[T] losses in fp32: what the model says of a sample that has no neighbours; 0 where nothing is labelled."""
    losses = torch.zeros(len(ids))
    if "dynamic" in str(getattr(model, "config", "")):
        model = copy.deepcopy(model)  # its rotary frequencies would stay those of the longest that it has read
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
    for t in range(1, len(ids)):
        if labels[t] != -100:
            losses[t] = F.cross_entropy(logits[t - 1], labels[t])
    return losses


def num_labelled(labels: Tensor) -> int:
    return int((labels[1:] != -100).sum())


def padded(samples: list[tuple[Tensor, Tensor]], side: str, pad: int = 0) -> dict[str, Tensor]:
    width = max(len(ids) for ids, _ in samples) + 1
    batch = {
        "input_ids": torch.full((len(samples), width), pad),
        "attention_mask": torch.zeros(len(samples), width, dtype=torch.long),
        "labels": torch.full((len(samples), width), -100),
    }
    for row, (ids, labels) in enumerate(samples):
        where = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        batch["input_ids"][row, where] = ids
        batch["attention_mask"][row, where] = 1
        batch["labels"][row, where] = labels
    return batch


def packed(rows: list[list[tuple[Tensor, Tensor]]], width: int) -> dict[str, Tensor]:
    """Documents one after the other, padding numbered 0, without a mask, as collators do."""
    batch = {name: torch.zeros(len(rows), width, dtype=torch.long) for name in ("input_ids", "position_ids")}
    batch["labels"] = torch.full((len(rows), width), -100)
    for row, samples in enumerate(rows):
        start = 0
        for ids, labels in samples:
            where = slice(start, start + len(ids))
            batch["input_ids"][row, where] = ids
            batch["labels"][row, where] = labels
            batch["position_ids"][row, where] = torch.arange(len(ids))
            start += len(ids)
    return batch


def check_samples(model: nn.Module, samples: list[tuple[Tensor, Tensor]], scores: Any, atol: float = 1e-5) -> None:
    """Each loss within `atol` of that of the sample alone, or of that part of it where it is above 1 nat."""
    assert scores.loss.dtype == torch.float32
    assert scores.count.dtype == torch.int64
    assert len(scores.loss) == len(scores.count) == len(samples)
    for (ids, labels), loss, count in zip(samples, scores.loss, scores.count, strict=True):
        assert count == num_labelled(labels)
        expected = alone(model, ids, labels).sum() / max(int(count), 1)
        assert loss.item() == pytest.approx(expected.item(), abs=atol, rel=atol)


def score(scorer: Any, *batches: Any, **kwargs: Any) -> list[Any]:
    return scorer.begin(batches, **({"level": "sample"} | kwargs)).finish()
