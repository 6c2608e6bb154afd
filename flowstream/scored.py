"""Batches under scoring, and what is checked of their losses before they weigh anything."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import xxhash
from torch import Tensor

from flowstream.batch import content_hash, fields, is_array, moved
from flowstream.digest import Digest
from flowstream.making import Recipe, Terms
from flowstream.numerics import own_numerics
from flowstream.read_ahead import Pulled
from flowstream.running_temperature import RunningTemperature
from flowstream.scoring.base import Cost, Level, Scores
from flowstream.settings import Settings
from flowstream.weighing import Losses, flatten

_NUM_NAMED = 4
"""Batches that an error names, and rows of each."""


class Scoring:
    """The scoring of some batches under way: a share at a time, timed, spared where losses are stored."""

    @own_numerics()
    def __init__(self, recipe: Recipe, pulled: Sequence[Pulled], stored: Tensor | None = None) -> None:
        settings = recipe.settings
        started = time.perf_counter()
        self._batches = [item.batch for item in pulled]
        self._level: Level = settings.level
        self._stored = stored
        shares = settings.needs_loss and recipe.meetings.world.has_peers
        self._peers = recipe.meetings.peers if shares else None
        self._job = recipe.scorer.begin(
            self._batches,
            level=settings.level,
            cache=recipe.cache,
            row_keys=None if settings.cache_key is None else [_row_keys(item, settings.cache_key) for item in pulled],
            needs_loss=settings.needs_loss and stored is None and recipe.meetings.world.is_first_peer,
        )
        self._finished: tuple[list[Scores], Cost] | None = None
        self._num_steps = max(self._job.num_steps, 1)
        self.seconds = time.perf_counter() - started

    @property
    def num_steps(self) -> int:
        """Micro-batches that are left."""
        return self._job.num_steps

    @property
    def done(self) -> float:
        """The share of the micro-batches that is enqueued."""
        return 1 - self._job.num_steps / max(self._num_steps, self._job.num_steps)

    @own_numerics()
    def step(self) -> None:
        """Enqueue one micro-batch."""
        started = time.perf_counter()
        self._job.step()
        self.seconds += time.perf_counter() - started

    @own_numerics()
    def finish(self) -> tuple[list[Scores], Cost]:
        """The scores of the batches in their order, and what they cost. May be asked for again."""
        if self._finished is not None:
            return self._finished
        started = time.perf_counter()
        scores = self._job.finish()
        if self._stored is not None:
            scores = _with_stored(scores, self._stored, self._level)
        elif self._peers is not None:
            scores = _with_stored(scores, self._peers.agree(flatten(scores, self._level).loss), self._level)
        self.seconds += time.perf_counter() - started
        self._finished = scores, self._job.cost
        return self._finished


def check_negative(
    losses: Losses, pulled: Sequence[Pulled], scores: Sequence[Scores], recipe: Recipe, terms: Terms
) -> None:
    """Raise `ValueError`, naming samples, for a negative loss: FLOW needs non-negative ones (arXiv 2502.02797, §3)."""
    negative = losses.usable & (losses.loss < 0)
    if not bool(negative.any()):
        return
    raise ValueError(
        f"a loss of {float(losses.loss[negative][0]):g} nats under the reference ({int(negative.sum())} of "
        f"{len(losses.loss)} are negative, in window {terms.number} of epoch {terms.epoch}: "
        f"{_named(negative, losses, pulled, scores, recipe)}): FLOW needs a non-negative loss, since e^{{-f/τ}} of a "
        "negative one is above 1. Shift it to a minimum of 0, or take another (for a regression the squared error, not "
        "the log-likelihood)"
    )


def check_bad(losses: Losses, pulled: Sequence[Pulled], scores: Sequence[Scores], recipe: Recipe, terms: Terms) -> None:
    """Raise `ValueError`, naming samples, if more of a window's losses than `max_bad_fraction` are NaN or infinite."""
    bad = losses.labelled & ~losses.loss.isfinite()
    num_bad, num = int(bad.sum()), int(losses.labelled.sum())
    if num_bad <= recipe.settings.max_bad_fraction * num:
        return
    kind = "samples" if recipe.settings.level == "sample" else "tokens"
    raise ValueError(
        f"{num_bad} of {num} {kind} of window {terms.number} (epoch {terms.epoch}) have a loss that is NaN or infinite "
        f"under the reference: {_named(bad, losses, pulled, scores, recipe)}. More than "
        f"max_bad_fraction={recipe.settings.max_bad_fraction}: look at these samples, score in bf16 or fp32 in place "
        "of fp16, or raise max_bad_fraction"
    )


def content_of(pulled: Sequence[Pulled], settings: Settings) -> str:
    """The hash of a window's first batch, or of its `cache_key` alone where augmentation changes the rest."""
    return content_hash(pulled[0].batch, settings.cache_key) if pulled else ""


def hash_of_samples(pulled: Sequence[Pulled], settings: Settings) -> int:
    """A hash of all samples in their order, wherever they are; 0 for none. It tells ranks that read the same."""
    digest = xxhash.xxh3_64()
    for item in pulled:
        digest.update(content_hash(moved(item.batch, torch.device("cpu")), settings.cache_key).encode())
    return digest.intdigest() if pulled else 0


def check_stored(losses: Losses, terms: Terms) -> None:
    """Raise `RuntimeError` where a window made again has other samples than its stored losses."""
    if terms.stored is not None and len(terms.stored) != len(losses.loss):
        raise _other_samples(len(terms.stored), len(losses.loss))


def digest_of(losses: Losses, recipe: Recipe, terms: Terms) -> Digest:
    """The digest of a window's usable losses; empty where losses were not needed, and so not taken."""
    if not recipe.settings.needs_loss:
        return Digest()
    usable = losses.usable
    return recipe.temperature.window_digest(
        losses.loss[usable].numpy(), terms.seed(recipe), recipe.meetings.world.world_size, losses.sample[usable].numpy()
    )


def batch_temperatures(losses: Losses, temperature: RunningTemperature) -> list[float]:
    """τ of each batch from its own losses; samples without a label count as NaN."""
    known = torch.where(losses.labelled, losses.loss, torch.nan)
    return [temperature.batch_tau(loss.numpy()) for loss in known.split(losses.sizes)]


def _named(which: Tensor, losses: Losses, pulled: Sequence[Pulled], scores: Sequence[Scores], recipe: Recipe) -> str:
    """The first samples of `which` [N]: batch and row, with the `__key__` where there is one."""
    owner = torch.repeat_interleave(torch.arange(len(pulled)), torch.tensor(losses.sizes))
    first = [0, *itertools.accumulate(len(score.loss) for score in scores)]
    named = []
    for number in owner[which].unique().tolist()[:_NUM_NAMED]:
        item, score = pulled[number], scores[number]
        samples = (losses.sample[which & (owner == number)] - first[number]).unique()
        if score.segment is None:
            rows = samples.tolist()
        else:  # documents of packed rows
            rows = [int((score.segment == sample).any(1).nonzero()[0]) for sample in samples]
        keys = _keys_of(item.batch, recipe.settings.cache_key)
        told = [f"row {row}" + (f" ({keys[row]})" if row < len(keys) else "") for row in rows[:_NUM_NAMED]]
        named.append(f"batch {item.ordinal}: {', '.join(told)}" + (", …" if len(rows) > _NUM_NAMED else ""))
    return "; ".join(named)


def _keys_of(batch: Any, cache_key: str | None) -> Sequence[object]:
    """What the batch calls its rows, if anything."""
    found = fields(batch)
    keys = found.get("__key__", found.get(cache_key))
    return keys if isinstance(keys, list | tuple) else ()


def _row_keys(item: Pulled, name: str) -> list[object]:
    keys = fields(item.batch).get(name)
    if is_array(keys):
        return list(keys.tolist())
    if isinstance(keys, list | tuple):
        return list(keys)
    found = ", ".join(map(repr, fields(item.batch)))
    raise ValueError(
        f"cache_key is {name!r}, but in batch {item.ordinal} that is {keys!r:.80} (its fields: {found}): name a field "
        "with an entry a row"
    )


def _with_stored(scores: list[Scores], stored: Tensor, level: Level) -> list[Scores]:
    """The scores with losses taken from `stored` [N], in order."""
    filled, at = [], 0
    for score in scores:
        if level == "token":
            assert score.token_mask is not None
            assert score.token_loss is not None
            num = int(score.token_mask.sum())
            loss = torch.zeros_like(score.token_loss)
            loss[score.token_mask] = stored[at : at + num].to(loss.dtype)
            filled.append(replace(score, token_loss=loss))
        else:
            num = len(score.loss)
            filled.append(replace(score, loss=stored[at : at + num]))
        at += num
    if at > len(stored):
        raise _other_samples(len(stored), at)
    return filled


def _other_samples(num_stored: int, num_found: int) -> RuntimeError:
    return RuntimeError(
        f"the state holds {num_stored} losses of its window, but the loader now delivers {num_found} samples there: "
        "resume with the loader (data, batch size, shuffling seed) that the state was taken with"
    )
