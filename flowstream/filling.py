"""What a rank that has no more batches delivers, so that the others need not wait for it: weight 0, no label counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowstream.batch import mapped
from flowstream.delivery import Delivery, in_order
from flowstream.padding_batches import ignored
from flowstream.scoring.base import Scorer, Scores
from flowstream.scoring.function import FunctionScorer
from flowstream.settings import Settings
from flowstream.weighing import flatten, num_rows, place


class Filling:
    """Owns the batch that such batches are made from: the last that the rank had.

    A rank that never had one gets another rank's: its first, and after a resume the next one there.
    """

    def __init__(self, scorer: Scorer, settings: Settings) -> None:
        self._scorer = scorer
        self._settings = settings
        self.model: Any = None
        """The batch; `None` before there is one."""
        self._scores: Scores | None = None

    def remember(self, batch: Any) -> None:
        """From now on make them like `batch`, even where a training loop takes keys out of it."""
        self.model = mapped(batch, lambda leaf: leaf)
        self._scores = None

    def delivery(self, shared: Mapping[str, Tensor]) -> Delivery:
        """One more of them. `shared`: what goes with a batch whatever its samples."""
        level, include = self._settings.level, self._settings.include
        batch = ignored(self.model, by_position=not isinstance(self._scorer, FunctionScorer))
        if self._scores is None:  # for its structure: documents in packed rows, labelled tokens
            (self._scores,) = self._scorer.begin([batch], level=level, needs_loss=False).finish()
        scores = self._scores
        nothing = place(torch.zeros(flatten([scores], level).sizes[0]), scores, level)
        extras = dict(shared)
        if "loss" in include:
            extras["flow_loss"] = nothing
        if "index" in include:
            extras["flow_index"] = torch.full((num_rows(scores),), -1)
        return Delivery(batch, nothing, in_order(extras, self._settings))
