"""What tests of streams over several ranks share: shards of unequal size, what a rank is delivered, what it is told."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import flowstream as fs
from flowstream.distributed.world import World

BATCH = 8
WINDOW = 4
STRIDE = 1_000_000
"""Ids of a rank's samples begin at its multiple."""

by_key = fs.FunctionScorer(lambda batch: batch["loss"], name="by key")


def losses_of(rank: int, num: int) -> Tensor:
    """Of each shard another scale and law: the ranks' medians differ by a factor of ten."""
    generator = torch.Generator().manual_seed(rank)
    drawn = torch.rand(num, generator=generator, dtype=torch.float64).clamp(min=1e-9)
    return ((-drawn.log()) ** (1 + rank % 3) * (0.3 + rank)).float()


def ids_of(rank: int, num: int) -> list[int]:
    return (torch.arange(num) + STRIDE * rank).tolist()


def labels_of(num: int) -> Tensor:
    """Classes; every seventh sample has none."""
    return torch.where(torch.arange(num) % 7 == 3, -100, torch.arange(num) % 5)


def shard(rank: int, num: int, *, losses: Tensor | None = None, batch: int = BATCH) -> list[dict[str, Tensor]]:
    """A rank's batches."""
    columns = {
        "loss": losses_of(rank, num) if losses is None else losses[:num],
        "id": torch.arange(num) + STRIDE * rank,
        "labels": labels_of(num),
    }
    return [{name: column[i : i + batch] for name, column in columns.items()} for i in range(0, num, batch)]


class Told(logging.Handler):
    """What flowstream says while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> Told:
        logging.getLogger("flowstream").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("flowstream").removeHandler(self)


def plain(batch: dict[str, Tensor]) -> dict[str, Any]:
    """A batch as plain values, to the bit."""
    return {
        "ids": batch["id"].tolist(),
        "labels": batch["labels"].tolist(),
        "weight": batch["flow_weight"].tolist() if "flow_weight" in batch else None,
        "tau": float(batch["flow_tau"]).hex() if "flow_tau" in batch else None,
        "denominator": float(batch["flow_denominator"]) if "flow_denominator" in batch else None,
    }


def length_of(stream: fs.FlowStream) -> int | None:
    try:
        return len(stream)
    except TypeError:
        return None


def delivered(loader: Iterable[Any], *, num_epochs: int = 1, **settings: Any) -> dict[str, Any]:
    """All that a rank is delivered of its loader, epoch after epoch, with what it is told."""
    with Told() as told, fs.FlowStream(loader, by_key, **({"window": WINDOW, "cache": None} | settings)) as stream:
        length = length_of(stream)
        epochs: list[list[dict[str, Any]]] = []
        for _ in range(num_epochs):
            epochs.append([])
            for batch in stream:
                position = stream.state_dict()["position"][0]
                names = ("window", "first_ordinal", "num_taken")  # the position after an epoch's last batch is none
                epochs[-1].append(plain(batch) | {name: position and position[name] for name in names})
        return {"length": length, "epochs": epochs, "metrics": stream.metrics(), "told": told.messages}


def outcome_of(act: Callable[[], Any]) -> Any:
    """What `act` gives, or what it raises: the type's name and the text."""
    try:
        return act()
    except Exception as error:
        return type(error).__name__, str(error)


def attempts(batches: Iterable[Any], num: int) -> list[dict[str, Any]]:
    """Walk on, up to `num` times, after whatever was raised: the ids of each time, and how it ended."""
    found: list[dict[str, Any]] = []
    iterator = iter(batches)
    for _ in range(num):
        began = time.monotonic()
        ids: list[int] = []
        error, text = "", ""
        num_batches = 0
        try:
            for batch in iterator:
                num_batches += 1
                ids += batch["id"].tolist()
        except Exception as raised:
            error, text = type(raised).__name__, str(raised)
        seconds = time.monotonic() - began
        found.append({"num": num_batches, "ids": ids, "error": error, "text": text, "seconds": seconds})
        if not error:
            break
    return found


def own_rank() -> int:
    return World.of().rank
