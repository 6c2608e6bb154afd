"""Losses that need no model of ours: a function of the batch, or a key that is in it already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowstream.batch import fields, num_rows
from flowstream.scoring.base import Cost, Job, Level, Scores
from flowstream.scoring.cache import LossCache


class FunctionScorer:
    """Losses from any function of a batch. A `Scorer` for what the others do not fit.

    `fn(batch)` gets each batch as the loader made it, and returns [B] losses in nats (a tensor, array or list), not
    negative; NaN and ±inf get weight 0. It runs without gradients, and is never cached. Every sample counts as one.
    `ValueError` for another shape. `name` identifies the function when a state is loaded; by default its own.

    >>> scorer = FunctionScorer(lambda batch: batch["y"].float().abs())
    >>> job = scorer.begin([{"y": torch.tensor([1, -2])}], level="sample")
    >>> job.finish()[0].loss
    tensor([1., 2.])
    """

    levels: frozenset[Level] = frozenset({"sample"})

    def __init__(self, fn: Callable[[Any], Any], *, name: str | None = None) -> None:
        if not callable(fn):
            raise ValueError(f"FunctionScorer needs a function of a batch, not a {type(fn).__name__}")
        self._fn = fn
        kind = type(fn)
        default = f"{getattr(fn, '__module__', kind.__module__)}.{getattr(fn, '__qualname__', kind.__qualname__)}"
        self._fingerprint = f"function {name or default}"

    def begin(
        self,
        batches: Sequence[Any],
        *,
        level: Level,
        cache: LossCache | None = None,
        row_keys: Sequence[Sequence[object]] | None = None,
        needs_loss: bool = True,
    ) -> Job:
        if level != "sample":
            raise ValueError("FunctionScorer gives one loss a sample: for level='token' use a language-model scorer")
        return _Job(self._fn, batches, needs_loss)

    def check(self) -> None:
        """A function has no weights that could be watched."""

    def fingerprint(self) -> str:
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is learned on the way."""


class Prescored(FunctionScorer):
    """Losses that the batches bring along, under `key` (or at that position of a tuple): [B] in nats. A `Scorer`."""

    def __init__(self, key: str | int = "flow_loss") -> None:
        def take(batch: Any) -> Any:
            found = fields(batch)
            if key not in found:
                raise ValueError(f"Prescored(key={key!r}) found no such key in a batch, only {list(found)}")
            return found[key]

        super().__init__(take, name=f"prescored {key!r}")


class _Job:
    """A call a batch. A `Job`. It is the whole cost of a free scorer, so it is kept to a few microseconds."""

    def __init__(self, fn: Callable[[Any], Any], batches: Sequence[Any], needs_loss: bool) -> None:
        self._fn = fn
        self._batches = batches
        self._needs_loss = needs_loss
        self._losses: list[Tensor] = [] if needs_loss else [torch.zeros(num_rows(batch)) for batch in batches]
        self.num_steps = len(batches) - len(self._losses)
        self.cost = Cost()

    def step(self) -> None:
        if not self.num_steps:
            return
        number = len(self._losses)
        with torch.no_grad():
            self._losses.append(_as_losses(self._fn(self._batches[number]), self._batches[number], number))
        self.num_steps -= 1

    def finish(self) -> list[Scores]:
        while self.num_steps:
            self.step()
        if self._needs_loss:
            rows = sum(map(len, self._losses))
            self.cost = Cost(num_tokens=rows, num_padded=rows)
        return [_scores(loss.cpu()) for loss in self._losses]


def _scores(loss: Tensor) -> Scores:
    if torch.is_inference_mode_enabled():  # the caller's: it would give weights that no backward takes
        with torch.inference_mode(False):
            return Scores(loss.clone(), torch.ones(len(loss), dtype=torch.int64))
    return Scores(loss, torch.ones(len(loss), dtype=torch.int64))


def _as_losses(found: Any, batch: Any, number: int) -> Tensor:
    if isinstance(found, np.ndarray) and not found.flags.writeable:
        found = found.copy()
    try:
        losses = torch.as_tensor(found).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"a scoring function must return [B] losses, not a {type(found).__name__} (batch {number} of the window)"
        ) from error
    rows = num_rows(batch)
    if losses.shape != (rows,) or losses.is_complex():
        raise ValueError(
            f"a scoring function must return one loss a sample, [{rows}], and gave {list(losses.shape)} (batch "
            f"{number} of the window): leave out the mean (reduction='none'), and average over tokens"
        )
    # A clone, where it is fp32 already: the caller may go on to write into its batch.
    return losses.float() if losses.dtype != torch.float32 else losses.clone()
