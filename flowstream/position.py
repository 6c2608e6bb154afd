"""Where in an epoch the consumer is: the window in flight as a state holds it, and how the loader gets there again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from flowstream.batch import content_hash
from flowstream.making import Kept, Recipe, Shape, Window
from flowstream.numerics import own_numerics
from flowstream.read_ahead import ReadAhead
from flowstream.recollate import Row

_logger = logging.getLogger("flowstream")

_CARRIED = {
    "ordinal": torch.int64,
    "row": torch.int64,
    "index": torch.int64,
    "count": torch.int64,
    "loss": torch.float32,
    "weight": torch.float32,
}


@own_numerics()
def described(window: Window, recipe: Recipe, reader: ReadAhead, shape: Shape) -> dict[str, Any]:
    """A window that goes into delivery, as a state holds it; `shape`: as it was before the window."""
    terms, settings = window.terms, recipe.settings
    # Where the rank has no more batches, from the last it had: batches of weight 0 are made of it.
    first = window.first_ordinal if window.num_taken else max(window.first_ordinal - 1, 0)
    oldest = min([kept.ordinal for kept in terms.carry], default=first)
    dtype = torch.float16 if settings.level == "token" else torch.float32
    columns: dict[str, list[Any]] = {
        "ordinal": [kept.ordinal for kept in terms.carry],
        "row": [kept.row.index for kept in terms.carry],
        "index": [kept.index for kept in terms.carry],
        "count": [kept.count for kept in terms.carry],
        "loss": [kept.loss for kept in terms.carry],
        "weight": [kept.weight for kept in terms.carry],
    }
    return {
        "window": terms.number,
        "size": recipe.size,
        "shape": {"num_rows": shape.num_rows, "area": shape.area},
        "source": reader.state_for(oldest),
        "oldest_ordinal": oldest,
        "first_ordinal": window.first_ordinal,
        "first_index": terms.first_index,
        "first_delivery": terms.first_delivery,
        "num_taken": window.num_taken,
        "capped": window.capped,
        "ended": window.ended,
        "content": window.content,
        "losses": window.flat_losses.to(dtype) if settings.needs_loss else None,
        "carry": {name: torch.tensor(column, dtype=_CARRIED[name]) for name, column in columns.items()},
    }


def go_to(state: Mapping[str, Any], reader: ReadAhead, where: str) -> tuple[tuple[Kept, ...], Any]:
    """Bring the loader to the window in flight, whose batches are queued again.

    Returns what was carried into the window, and the batch before it where that had to be pulled, else `None`.

    Raises:
        RuntimeError: the loader ends before that.
        Exception: what the loader raises.
    """
    reader.resume(state["source"], state["oldest_ordinal"])
    columns = {name: column.tolist() for name, column in state["carry"].items()}
    pulled: dict[int, Any] = {}
    while reader.next_ordinal < state["first_ordinal"]:
        item = reader.take()
        if item is None:
            reader.reraise(where)
            raise too_short(state, reader)
        pulled[item.ordinal] = item.batch
    while reader.num_queued < state["num_taken"]:
        if not reader.pull():
            reader.reraise(where, at_once=True)
            raise too_short(state, reader)
    carried = tuple(
        Kept(Row(pulled[ordinal], row), ordinal, index, loss, weight, count)
        for ordinal, row, index, count, loss, weight in zip(*(columns[name] for name in _CARRIED), strict=True)
    )
    return carried, pulled.get(state["first_ordinal"] - 1)


def stored_losses(state: Mapping[str, Any], reader: ReadAhead, cache_key: str | None) -> torch.Tensor | None:
    """The losses of the window in flight, once the loader is there; `None` where it delivers other batches now."""
    if state["num_taken"] and content_hash(reader.peek(), cache_key) != state["content"]:
        _logger.warning(
            "the resumed loader delivers another batch %d than before (unseeded shuffling, or random augmentation "
            "without cache_key): its losses are taken anew, and samples may be repeated or left out",
            reader.next_ordinal,
        )
        return None
    stored: torch.Tensor | None = state["losses"]
    return stored


def too_short(state: Mapping[str, Any], reader: ReadAhead) -> RuntimeError:
    """The loader ends before the place that is to be resumed."""
    return RuntimeError(
        f"the loader ended at batch {reader.next_ordinal + reader.num_queued}, but the state resumes at batch "
        f"{state['first_ordinal']} with {state['num_taken']}: resume with the loader that it was taken with"
    )
