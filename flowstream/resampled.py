"""A resampled window: candidates are scored and drawn by weight, and the rows that are kept fill new batches."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowstream.batch import check_rows, num_bytes, num_rows, num_samples
from flowstream.delivery import Delivery, denominator_of, step_counts
from flowstream.digest import Digest
from flowstream.distributed.message import Agreed, Message
from flowstream.making import Contents, Kept, Recipe, Terms
from flowstream.metrics import WeightSums
from flowstream.numerics import own_numerics
from flowstream.randomness import uniform
from flowstream.read_ahead import Pulled, ReadAhead
from flowstream.recollate import Padding, Row, lengths_of, read_padding, recollate, take, width_of
from flowstream.samplers import Systematic, Thin, chunk_size
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
from flowstream.weighing import flatten, sum_up, weigh
from flowstream.window import fill_batches

_MAX_CANDIDATES = 32
"""Candidate batches for each delivered one, at most: a window of weights near 0 ends there, and is short."""


class ResampledWindow:
    """Takes candidates from the queue in chunks, has them scored, and draws until its batches are full.

    How many it takes depends on weights alone, never on what was drawn: `Thin` would be biased (see `Thin.enough`).
    """

    def __init__(self, recipe: Recipe, reader: ReadAhead, terms: Terms) -> None:
        assert recipe.settings.sampler is not None
        self.terms = terms
        self.tau = float("nan") if terms.tau is None else terms.tau
        self.digest = Digest()
        self.sums = WeightSums()
        self.cost = Cost()
        self.score_seconds = 0.0
        self.num_seen = 0
        self.num_kept = 0
        self.num_left = 0
        self.num_taken = 0
        self.content = ""
        self.next_index = terms.first_index
        self.first_ordinal = reader.next_ordinal
        self.shape = terms.shape
        self.carry: Sequence[Kept] = ()
        self._recipe = recipe
        self._sampler = recipe.settings.sampler
        self._reader = reader
        self._wanted = recipe.size * terms.shape.num_rows - len(terms.carry)
        self._mass = 0.0
        self._u = uniform(terms.seed(recipe))
        self._chunk: list[Pulled] = []
        self._num_rows = 0
        self._num_samples = 0
        self._num_bytes = 0
        self._scoring: Scoring | None = None
        self._kept: list[Kept] = []
        self._pulled: list[Pulled] = []
        self._scores: list[Scores] = []
        self._weights: list[Tensor] = []
        self._is_tau_open = terms.tau is None and recipe.settings.needs_loss and recipe.temperature.scope != "batch"
        self._complete = self._wanted <= 0 or terms.max_batches == 0
        self.capped = terms.capped
        self.ended = False
        self._taus: list[float] = []
        self._losses = flatten([], recipe.settings.level)
        self._padding = Padding()
        self._groups: list[list[Kept]] | None = None
        self._costs: list[int] = []
        self._pool: list[Kept] = []
        self._names = 0
        self._agreed = Agreed()

    def advance(self, share: float) -> None:
        while not self._complete and self._progress < share:
            if not self._go_on(force=False):
                return

    def look(self) -> None:
        self.finish()

    def finish(self) -> None:
        while not self._complete:
            self._go_on(force=True)
        if self._is_tau_open:  # the other ranks have candidates, and wait for this one's
            self._settle_tau(Digest())
        if self._groups is None:
            self._fill()

    def report(self) -> Message:
        assert self._groups is not None
        settings = self._recipe.settings
        num_placed = sum(map(len, self._groups))
        self.ended = num_placed == len(self._pool) and (self.terms.ended or self._reader.exhausted)
        return replace(
            self.terms.place(),
            tau=self.tau if settings.needs_loss and not self._taus else math.nan,
            num_batches=len(self._groups),
            ended=self.ended,
            num_seen=self.num_seen,
            num_kept=self.num_kept,
            content=self._names,
            sums=self.sums,
            counts=step_counts([sum(kept.count for kept in group) for group in self._groups], settings),
            digest=self.digest,
        )

    def contents(self) -> Contents:
        assert self._groups is not None
        labelled = [sum(kept.count for kept in group) for group in self._groups]
        return Contents(self._costs, labelled, self._groups[0][0].row.batch if self._groups else None)

    def settle(self, agreed: Agreed) -> None:
        assert self._groups is not None
        self._agreed = agreed
        del self._groups[agreed.num_deliveries :]
        self.carry = self._pool[sum(map(len, self._groups)) :]
        if agreed.last:
            self.num_left, self.carry = len(self.carry), ()
        elif self.carry:
            self.ended = False
        self._pool = []

    @property
    def gathers(self) -> bool:
        return self._scoring is None and not self._complete and not self._chunk_is_full

    @property
    def num_wanted(self) -> int:
        if self._complete:
            return 0
        expected = self._mass if self._scoring is None else self._mass + self._mass_of_chunk
        later = chunk_size(self._wanted - expected, self._mean_weight, self.shape.num_rows, margin=1.0, limit=1000)
        return later if self._scoring is not None else max(self._chunk_target - len(self._chunk), 0)

    @property
    def barren(self) -> bool:
        return self._groups == []

    @property
    def flat_losses(self) -> Tensor:
        return self._losses.loss

    @property
    def num_deliveries(self) -> int:
        return len(self._groups or ())

    def num_samples_at(self, position: int) -> int:
        assert self._groups is not None
        return len(self._groups[position])

    @own_numerics()
    def deliver(self, position: int) -> Any:
        assert self._groups is not None
        settings, group = self._recipe.settings, self._groups[position]
        rows = [kept.row for kept in group]
        if settings.recollate == "pad":
            batch = recollate(rows, self._padding)
        else:
            batch = settings.recollate([take(row) for row in rows])
        available = {
            "loss": lambda: torch.tensor([kept.loss for kept in group]),
            "weight": lambda: torch.tensor([kept.weight for kept in group]),
            "tau": lambda: torch.tensor(self.tau),
            "index": lambda: torch.tensor([kept.index for kept in group]),
            "denominator": lambda: denominator_of(position, self._agreed, settings),
        }
        extras = {f"flow_{name}": available[name]() for name in settings.include}
        self._groups[position] = []
        return Delivery(batch, None, extras).complete(settings)

    def _go_on(self, *, force: bool) -> bool:
        """Take a chunk's batches, or score a micro-batch, or draw. False where batches are not there yet."""
        if self._scoring is None:
            while not self._chunk_is_full and (force or self._reader.num_queued) and self._take():
                pass
            if not self._chunk_is_full and not self._reader.stopped:
                return False
            if not self._chunk:
                self._complete = True
                self.capped |= self._reader.failed
                return True
            stored = self.terms.stored
            at = sum(len(weight) for weight in self._weights)
            self._scoring = Scoring(self._recipe, self._chunk, None if stored is None else stored[at:])
        elif self._scoring.num_steps:
            self._scoring.step()
        elif not force and self._waits_to_draw:
            return False
        else:
            self._draw()
        return True

    @property
    def _waits_to_draw(self) -> bool:
        """Whether others are met before it is drawn: at fixed calls only, or they would wait within a training step."""
        meetings = self._recipe.meetings
        return meetings.world.has_peers or (self._is_tau_open and meetings.are_several)

    @property
    def _progress(self) -> float:
        done = self._scoring.done * self._mass_of_chunk if self._scoring is not None else 0.0
        return min((self._mass + done) / self._wanted, 0.999)

    @property
    def _mean_weight(self) -> float:
        """Expected mass of a candidate: never from what was drawn."""
        scale = self._sampler.scale if isinstance(self._sampler, Thin) else 1.0
        return self._mass / self.num_seen if self._mass else self.terms.acceptance * scale

    @property
    def _mass_of_chunk(self) -> float:
        return len(self._chunk) * self.shape.num_rows * self._mean_weight

    @property
    def _chunk_target(self) -> int:
        """Batches of the next chunk, a pure function of what was settled and of the weights so far."""
        rows, size = self.shape.num_rows, self._recipe.size
        if isinstance(self._sampler, Systematic):
            return self._sampler.num_candidates(size)
        missing = self._wanted - self._mass
        return chunk_size(missing, self._mean_weight, rows, margin=1.0, limit=8 * size)

    @property
    def _chunk_is_full(self) -> bool:
        num = len(self._chunk)
        if self.terms.max_batches is not None and self.num_taken + num >= self.terms.max_batches:
            return True
        limit = _MAX_CANDIDATES * self._recipe.size
        enough = num >= self._chunk_target
        if isinstance(self._sampler, Systematic):  # batches may be smaller than the first
            enough &= self._num_rows >= self._chunk_target * self.shape.num_rows or num >= limit
        if math.isnan(self.tau) and self._recipe.settings.needs_loss:
            wanted = self._recipe.meetings.world.share(self._recipe.temperature.warmup_samples)
            warm = self._num_samples >= wanted and enough
            return warm or self._num_bytes >= self._recipe.settings.max_window_bytes
        return enough or num >= max(limit - self.num_taken, 1)

    @property
    def _is_followed(self) -> bool:
        """Whether the epoch goes on, as far as can be told: the loader is asked, however far was read ahead."""
        return self._reader.num_queued > 0 or self._reader.pull() or self._reader.failed

    def _take(self) -> bool:
        item = self._reader.take()
        if item is not None:
            self._chunk.append(item)
            self._num_rows += num_rows(item.batch)
            if math.isnan(self.tau):
                self._num_samples += num_samples(item.batch)
                self._num_bytes += num_bytes(item.batch)
            self.shape = self.shape.grown(item.batch)
        return item is not None

    @own_numerics()
    def _draw(self) -> None:
        """Take the chunk's scores, weigh and draw."""
        assert self._scoring is not None
        recipe, settings = self._recipe, self._recipe.settings
        scores, cost = self._scoring.finish()
        losses = flatten(scores, settings.level)
        check_negative(losses, self._chunk, scores, recipe, self.terms)
        seed = self.terms.seed(recipe)
        if recipe.temperature.scope == "batch" and settings.needs_loss:
            taus = batch_temperatures(losses, recipe.temperature)
            weight = weigh(losses, taus, settings.policy, (*seed, self.num_taken))
            self._taus += taus
            self.tau = statistics.median(self._taus)
        else:
            if self._is_tau_open:
                self._settle_tau(digest_of(losses, recipe, self.terms))
            elif math.isnan(self.tau):
                self.tau = recipe.temperature.tau()
            weight = weigh(losses, self.tau, settings.policy, (*seed, self.num_taken))
        self.cost += cost
        self.score_seconds += self._scoring.seconds
        copies = self._copies(weight)
        parts = zip(
            self._chunk, scores, weight.split(losses.sizes), np.split(copies, np.cumsum(losses.sizes)), strict=False
        )
        for item, score, weights, drawn in parts:
            self._keep(item, score, weights, drawn)
        self._pulled += self._chunk
        self.num_taken = len(self._pulled)
        self._scores += scores
        self._weights.append(weight)
        self._scoring, self._chunk, self._num_rows = None, [], 0
        if self.num_taken == self.terms.max_batches:  # and `terms.capped` says the rest
            self._complete = True
        elif isinstance(self._sampler, Systematic):
            self._complete, self.capped = True, self._is_followed
        elif self._sampler.enough(self._mass, self._wanted):
            self._complete = True
        elif self.num_taken >= _MAX_CANDIDATES * recipe.size or (self._reader.failed and not self._reader.num_queued):
            self._complete = self.capped = True
        else:
            self._complete = self._reader.exhausted

    def _settle_tau(self, digest: Digest) -> None:
        """τ from the ranks' first candidates."""
        recipe = self._recipe
        merged = recipe.meetings.merged(self.terms.place(), digest)
        self._is_tau_open = False
        if merged.num_values or self._chunk:
            self.tau = recipe.temperature.tau(merged)

    def _copies(self, weight: Tensor) -> NDArray[np.int64]:
        """How often each candidate of the chunk is delivered."""
        if isinstance(self._sampler, Thin):
            copies, self._mass = self._sampler.draw(weight.numpy(), self._mass, self._u)
            return copies
        num = min(self._wanted, round(len(weight) / self._sampler.oversample))
        return self._sampler.draw(weight.numpy(), num, self._u)

    def _keep(self, item: Pulled, score: Scores, weights: Tensor, copies: NDArray[np.int64]) -> None:
        if score.segment is not None:
            raise ValueError(
                f"batch {item.ordinal} has packed rows (position_ids restart within a row): resampling takes whole "
                "rows. Resample before packing, or use mode='weight'"
            )
        rows = len(score.loss)
        check_rows(item.batch, rows)
        for i in np.flatnonzero(copies).tolist():
            kept = Kept(
                Row(item.batch, i),
                item.ordinal,
                self.next_index + i,
                float(score.loss[i]),
                float(weights[i]),
                int((score.count if score.row_targets is None else score.row_targets)[i]),
            )
            self._kept += [kept] * int(copies[i])
        self.num_kept += int((copies > 0).sum())
        self.next_index += rows
        self.num_seen += rows

    @own_numerics()
    def _fill(self) -> None:
        """Fill the window's batches; what they do not hold is carried over."""
        recipe = self._recipe
        self._losses = flatten(self._scores, recipe.settings.level)
        check_stored(self._losses, self.terms)
        check_bad(self._losses, self._pulled, self._scores, recipe, self.terms)
        self.content = content_of(self._pulled, recipe.settings)
        self.digest = digest_of(self._losses, recipe, self.terms)
        self.sums = sum_up(self._losses, torch.cat([torch.empty(0), *self._weights]))
        pool = [*self.terms.carry, *self._kept]
        loaded = [*(kept.row.batch for kept in self.terms.carry), *(item.batch for item in self._pulled)]
        sources = {id(batch): batch for batch in loaded}
        self._padding = read_padding(list(sources.values()))
        if self._padding.trims:
            lengths_in = {key: lengths_of(batch) for key, batch in sources.items()}
            lengths = [lengths_in[id(kept.row.batch)][kept.row.index] for kept in pool]
        else:
            widths = {key: width_of(batch) or 1 for key, batch in sources.items()}
            lengths = [0] * len(pool)
        rows = self.shape.num_rows
        ready = len(pool) // rows * rows if self.capped else len(pool)  # a short batch only at the epoch's end
        groups, _ = fill_batches(
            lengths[:ready], recipe.size, self.shape.num_rows, self.shape.area, self._padding.multiple
        )
        if self.capped and len(groups) % recipe.settings.accumulate:  # a step's batches come from one window
            whole = len(groups) - len(groups) % recipe.settings.accumulate
            groups, _ = fill_batches(
                lengths[:ready], whole, self.shape.num_rows, self.shape.area, self._padding.multiple
            )
        self._groups = [[pool[i] for i in group] for group in groups]
        for group in groups:
            multiple = self._padding.multiple
            if self._padding.trims:
                width = -(-max(lengths[i] for i in group) // multiple) * multiple
            else:
                width = max(widths[id(pool[i].row.batch)] for i in group)
            self._costs.append(len(group) * width)
        self._pool = pool
        if recipe.meetings.are_several and not recipe.meetings.has_compared:
            self._names = hash_of_samples(self._pulled, recipe.settings)
        # Batches of which no row was kept may go.
        self._pulled, self._scores, self._weights, self._kept = [], [], [], []
