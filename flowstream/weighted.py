"""A weighted window: the loader's batches in the loader's order, each with its weights."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowstream.batch import num_bytes, num_samples
from flowstream.delivery import Delivery, denominator_of, in_order, step_counts
from flowstream.digest import Digest
from flowstream.distributed.message import Agreed, Message
from flowstream.making import Contents, Recipe, Terms
from flowstream.metrics import WeightSums
from flowstream.numerics import own_numerics
from flowstream.read_ahead import Pulled, ReadAhead
from flowstream.recollate import cost_of
from flowstream.scored import (
    Scoring,
    batch_temperatures,
    check_bad,
    check_negative,
    check_stored,
    content_of,
    digest_of,
    hash_of_samples,
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
        self.num_left = 0
        self.num_taken = 0
        self.content = ""
        self.next_index = terms.first_index
        self.first_ordinal = reader.next_ordinal
        self.shape = terms.shape
        self.carry = terms.carry
        self.capped = False
        self.ended = False
        self._recipe = recipe
        self._reader = reader
        self._pulled: list[Pulled] = []
        self._num_samples = 0
        self._num_bytes = 0
        self._scoring: Scoring | None = None
        self._began_at = 0.0
        self._losses = flatten([], recipe.settings.level)
        self._weight = torch.empty(0)
        self._scores: list[Scores] | None = None
        self._tau: float | list[float] = self.tau
        self._agreed = Agreed()
        self._deliveries: list[Delivery | None] | None = None
        self._num_samples_at: list[int] = []

    def advance(self, share: float) -> None:
        if self._scores is not None:
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

    def look(self) -> None:
        if not self.num_taken and self._scoring is None:
            self._take()

    def finish(self) -> None:
        if self._scores is not None:
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

    @own_numerics()
    def report(self) -> Message:
        assert self._scores is not None
        settings, meetings = self._recipe.settings, self._recipe.meetings
        self.ended = self.terms.ended or self._reader.exhausted
        names_samples = meetings.are_several and not meetings.has_compared
        return replace(
            self.terms.place(),
            tau=self._tau if isinstance(self._tau, float) and settings.needs_loss else math.nan,
            num_batches=len(self._pulled),
            ended=self.ended,
            num_seen=self.num_seen,
            num_kept=self.num_seen,
            content=hash_of_samples(self._pulled, settings) if names_samples else 0,
            sums=self.sums,
            counts=step_counts([num_labelled(score) for score in self._scores], settings),
            digest=self.digest,
        )

    def contents(self) -> Contents:
        batches = [item.batch for item in self._pulled]
        labelled = [num_labelled(score) for score in self._scores or ()]
        return Contents(list(map(cost_of, batches)), labelled, batches[0] if batches else None)

    @own_numerics()
    def settle(self, agreed: Agreed) -> None:
        assert self._scores is not None
        self._agreed = agreed
        if len(self._pulled) > agreed.num_deliveries:
            self._leave_over(agreed)
        weight = self._weight
        if self._recipe.settings.normalize:
            mean = agreed.sums.token_mean_weight if self.terms.mean_weight is None else self.terms.mean_weight
            weight = weight / mean if mean > 0 else weight
        self._deliveries = []
        weights, losses = weight.split(self._losses.sizes), self._losses.loss.split(self._losses.sizes)
        for i, (item, score) in enumerate(zip(self._pulled, self._scores, strict=True)):
            self._deliveries.append(self._delivery(i, item, score, weights[i], losses[i]))
            self._num_samples_at.append(len(score.loss))
            self.next_index += num_rows(score)
        if self._pulled and self._recipe.meetings.are_several:
            self._recipe.filling.remember(self._pulled[-1].batch)
        self._pulled, self._scores = [], []

    @property
    def gathers(self) -> bool:
        return self._scoring is None and self._scores is None and not self._is_full

    @property
    def num_wanted(self) -> int:
        if not self.gathers:
            return 0
        return max(self._target - self.num_taken, 1)

    @property
    def barren(self) -> bool:
        return not self.num_taken and self._reader.stopped

    @property
    def flat_losses(self) -> Tensor:
        return self._losses.loss

    @property
    def num_deliveries(self) -> int:
        return self._agreed.num_deliveries

    @own_numerics()
    def deliver(self, position: int) -> Any:
        assert self._deliveries is not None
        if position < len(self._deliveries):
            delivery, self._deliveries[position] = self._deliveries[position], None
        else:
            delivery = self._recipe.filling.delivery(self._shared_extras(position))
        assert delivery is not None
        return delivery.complete(self._recipe.settings)

    def num_samples_at(self, position: int) -> int:
        return self._num_samples_at[position] if position < len(self._num_samples_at) else 0

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
        if self._recipe.first_size is not None:
            return num >= self._recipe.first_size
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

    @own_numerics()
    def part(self, num_batches: int) -> dict[str, Any]:
        """What the first batches brought, in plain values: a state says it for those that were delivered."""
        losses = self._losses.of_first(num_batches)
        return {
            "digest": digest_of(losses, self._recipe, self.terms).to_bytes(),
            "sums": sum_up(losses, self._weight[: len(losses.loss)]).state_dict(),
            "num_seen": sum(self._num_samples_at[:num_batches]),
        }

    def _leave_over(self, agreed: Agreed) -> None:
        """Deliver fewer batches than were scored: a rank has no more of them."""
        num = agreed.num_deliveries
        assert self._scores is not None
        if agreed.last:  # a state keeps what the ranks were told, so that they come to the same once more
            self.num_left = sum(len(score.loss) for score in self._scores[num:])
        else:  # a loader raised; the epoch may go on
            self._reader.put_back([replace(item, is_counted=True) for item in self._pulled[num:]])
            self.num_taken, self.ended = num, False
            self._losses = self._losses.of_first(num)
            self._weight = self._weight[: len(self._losses.loss)]
        self._pulled, self._scores = self._pulled[:num], self._scores[:num]

    def _weigh(self, scores: list[Scores]) -> None:
        recipe, settings, terms = self._recipe, self._recipe.settings, self.terms
        losses = flatten(scores, settings.level)
        check_stored(losses, terms)
        check_negative(losses, self._pulled, scores, recipe, terms)
        check_bad(losses, self._pulled, scores, recipe, terms)
        fresh, which = losses, torch.ones(len(losses.loss), dtype=torch.bool)
        is_fresh = [not item.is_counted for item in self._pulled]
        if not all(is_fresh):
            fresh, which = losses.of(is_fresh)
        self.digest = digest_of(fresh, recipe, terms)
        tau = self._temperature_of(losses)
        self._tau = tau
        self.tau = tau if isinstance(tau, float) else statistics.median(tau or [math.nan])
        self._weight = weigh(losses, tau, settings.policy, terms.seed(recipe))
        self.sums = sum_up(fresh, self._weight[which])
        self._losses = losses
        self.content = content_of(self._pulled, settings)
        self.num_seen = sum(len(score.loss) for score, counts in zip(scores, is_fresh, strict=True) if counts)
        self._scores = scores

    def _temperature_of(self, losses: Losses) -> float | list[float]:
        recipe = self._recipe
        if recipe.temperature.scope == "batch" and recipe.settings.needs_loss:
            return batch_temperatures(losses, recipe.temperature)
        if self.terms.tau is not None:
            return self.terms.tau
        digest = recipe.meetings.merged(self.terms.place(), self.digest) if recipe.settings.needs_loss else self.digest
        return recipe.temperature.tau(digest) if self._pulled or digest.num_values else math.nan

    def _delivery(self, position: int, item: Pulled, score: Scores, weight: Tensor, loss: Tensor) -> Delivery:
        settings = self._recipe.settings
        extras = self._shared_extras(position)
        if "loss" in settings.include:
            extras["flow_loss"] = place(loss, score, settings.level)
        if "index" in settings.include:
            extras["flow_index"] = torch.arange(self.next_index, self.next_index + num_rows(score))
        return Delivery(item.batch, place(weight, score, settings.level), in_order(extras, settings))

    def _shared_extras(self, position: int) -> dict[str, Tensor]:
        """What a batch is given beside its weight that does not depend on its samples."""
        settings, tau = self._recipe.settings, self._tau
        extras = {}
        if "tau" in settings.include:
            of_batch = tau if isinstance(tau, float) else tau[position] if position < len(tau) else math.nan
            extras["flow_tau"] = torch.tensor(of_batch)
        if "denominator" in settings.include:
            extras["flow_denominator"] = denominator_of(position, self._agreed, settings)
        return extras
