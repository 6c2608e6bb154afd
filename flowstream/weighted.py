"""A weighted window: the loader's batches in the loader's order, each with its weights."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from flowstream.batch import num_bytes, num_samples
from flowstream.delivery import Delivery, group_denominators
from flowstream.digest import Digest
from flowstream.making import Recipe, Terms
from flowstream.metrics import WeightSums
from flowstream.numerics import own_numerics
from flowstream.read_ahead import Pulled, ReadAhead
from flowstream.scored import (
    Scoring,
    batch_temperatures,
    check_bad,
    check_negative,
    check_stored,
    content_of,
    digest_of,
)
from flowstream.scoring.base import Cost, Scores
from flowstream.weighing import Losses, flatten, num_labelled, num_rows, place, sum_up, weigh


class WeightedWindow:
    """Takes its batches from the queue, has them scored as a whole, and weighs them."""

    def __init__(self, recipe: Recipe, reader: ReadAhead, terms: Terms) -> None:
        self.terms = terms
        self.tau = float("nan")
        self.digest = Digest()
        self.sums = WeightSums()
        self.cost = Cost()
        self.score_seconds = 0.0
        self.num_seen = 0
        self.num_kept = 0
        self.num_taken = 0
        self.content = ""
        self.next_index = terms.first_index
        self.first_ordinal = reader.next_ordinal
        self.shape = terms.shape
        self.carry = terms.carry
        self.capped = False
        self.held_back = False
        self._recipe = recipe
        self._reader = reader
        self._pulled: list[Pulled] = []
        self._num_samples = 0
        self._num_bytes = 0
        self._scoring: Scoring | None = None
        self._began_at = 0.0
        self._losses = flatten([], recipe.settings.level)
        self._deliveries: list[Delivery | None] | None = None
        self._num_samples_at: list[int] = []

    def advance(self, share: float) -> None:
        if self._deliveries is not None:
            return
        if self._scoring is None:
            while not self._is_full and self._reader.num_queued:
                self._take()
            if not self._is_full and not self._reader.stopped:
                return
            self._hold_back()
            self._began_at = min(share, 0.99)
            self._scoring = Scoring(self._recipe, self._pulled, self.terms.stored)
        wanted = (share - self._began_at) / (1 - self._began_at)
        while self._scoring.num_steps and self._scoring.done < wanted:
            self._scoring.step()

    def settle(self) -> None:
        if not self.num_taken and self._scoring is None:
            self._take()

    def finish(self) -> None:
        if self._deliveries is not None:
            return
        while self._scoring is None and not self._is_full and self._take():
            pass
        self.advance(1.0)
        assert self._scoring is not None
        scores, self.cost = self._scoring.finish()
        self.score_seconds = self._scoring.seconds
        with own_numerics():
            self._weigh(scores)
        self._scoring = None  # it holds the batches

    @property
    def gathers(self) -> bool:
        return self._scoring is None and self._deliveries is None and not self._is_full

    @property
    def num_wanted(self) -> int:
        if not self.gathers:
            return 0
        return max(self._target - self.num_taken, 1)

    @property
    def ended(self) -> bool:
        return not self.num_taken and self._reader.exhausted

    @property
    def barren(self) -> bool:
        return self._deliveries == []

    @property
    def flat_losses(self) -> Tensor:
        return self._losses.loss

    @property
    def num_deliveries(self) -> int:
        return len(self._deliveries or ())

    def deliver(self, position: int) -> Any:
        assert self._deliveries is not None
        delivery = self._deliveries[position]
        assert delivery is not None
        with own_numerics():
            batch = delivery.complete(self._recipe.settings)
        self._deliveries[position] = None
        return batch

    def num_samples_at(self, position: int) -> int:
        return self._num_samples_at[position]

    @property
    def _target(self) -> int:
        return self._recipe.size if self.terms.max_batches is None else self.terms.max_batches

    @property
    def _is_full(self) -> bool:
        """Whether all its batches are taken: a window's, or in the warm-up as many as the first τ wants."""
        num = self.num_taken
        if num < self._target or self.terms.max_batches is not None or self.terms.tau is not None:
            return num >= self._target
        settings = self._recipe.settings
        warm = self._num_samples >= self._recipe.temperature.warmup_samples or not settings.needs_loss
        return (warm or self._num_bytes >= settings.max_window_bytes) and num % settings.accumulate == 0

    def _take(self) -> bool:
        item = self._reader.take()
        if item is None:
            return False
        self._pulled.append(item)
        self.num_taken += 1
        if self.terms.tau is None:
            self._num_samples += num_samples(item.batch)
            self._num_bytes += num_bytes(item.batch)
        return True

    def _hold_back(self) -> None:
        """Leave a step's batches together where the loader raises among them: they come after the error."""
        left_over = self.num_taken % self._recipe.settings.accumulate
        if left_over and self._reader.failed and self.terms.max_batches is None:
            self._reader.put_back(self._pulled[-left_over:])
            del self._pulled[-left_over:]
            self.num_taken -= left_over
            self.held_back = True

    def _weigh(self, scores: list[Scores]) -> None:
        if not self._pulled:
            self.tau = float("nan") if self.terms.tau is None else self.terms.tau
            self._deliveries = []
            return
        recipe, settings, terms = self._recipe, self._recipe.settings, self.terms
        losses = flatten(scores, settings.level)
        check_stored(losses, terms)
        check_negative(losses, self._pulled, scores, recipe, terms)
        check_bad(losses, self._pulled, scores, recipe, terms)
        self.digest = digest_of(losses, recipe, terms)
        tau = self._temperature_of(losses)
        self.tau = tau if isinstance(tau, float) else statistics.median(tau or [float("nan")])
        weight = weigh(losses, tau, settings.policy, terms.seed(settings))
        self.sums = sum_up(losses, weight)
        self._losses = losses
        self.content = content_of(self._pulled, settings)
        if settings.normalize:
            mean = self.sums.token_mean_weight if terms.mean_weight is None else terms.mean_weight
            weight = weight / mean if mean > 0 else weight
        denominators = group_denominators([num_labelled(score) for score in scores], settings)
        weights, flat_losses = weight.split(losses.sizes), losses.loss.split(losses.sizes)
        self._deliveries = []
        for i, (item, score) in enumerate(zip(self._pulled, scores, strict=True)):
            rows = num_rows(score)
            extras: dict[str, Tensor] = {}
            for name in settings.include:
                if name == "loss":
                    extras["flow_loss"] = place(flat_losses[i], score, settings.level)
                elif name == "tau":
                    extras["flow_tau"] = torch.tensor(tau if isinstance(tau, float) else tau[i])
                elif name == "index":
                    extras["flow_index"] = torch.arange(self.next_index, self.next_index + rows)
                elif name == "denominator":
                    extras["flow_denominator"] = denominators[i]
            self._deliveries.append(Delivery(item.batch, place(weights[i], score, settings.level), extras))
            self._num_samples_at.append(len(score.loss))
            self.next_index += rows
            self.num_seen += len(score.loss)
            self.num_kept += len(score.loss)
        self._pulled = []

    def _temperature_of(self, losses: Losses) -> float | list[float]:
        temperature = self._recipe.temperature
        if temperature.scope == "batch" and self._recipe.settings.needs_loss:
            return batch_temperatures(losses, temperature)
        return temperature.tau(self.digest) if self.terms.tau is None else self.terms.tau
