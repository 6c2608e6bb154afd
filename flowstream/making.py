"""How a window is made: what weighted and resampled windows share."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from flowstream.batch import attach, content_hash, device_of, fields, is_array, num_rows
from flowstream.digest import Digest
from flowstream.metrics import WeightSums
from flowstream.numerics import own_numerics
from flowstream.recollate import Row, width_of
from flowstream.running_temperature import RunningTemperature
from flowstream.scoring.base import Cost, Level, Scorer, Scores
from flowstream.scoring.cache import LossCache
from flowstream.settings import Settings
from flowstream.source import Pulled
from flowstream.weighing import Losses


@dataclass(frozen=True)
class Recipe:
    """What all windows of a stream are made with."""

    settings: Settings
    scorer: Scorer
    cache: LossCache | None
    temperature: RunningTemperature
    size: int
    """Delivered batches a window."""


@dataclass(frozen=True, eq=False)
class Kept:
    """A row that was drawn and is to be delivered, in its window or, carried over, in a later one."""

    row: Row
    ordinal: int
    """Its batch in the epoch."""
    index: int
    """Its position in the rank's stream."""
    loss: float
    weight: float
    count: int
    """Its labelled tokens."""


@dataclass(frozen=True)
class Shape:
    """The loader's batches as far as seen: those of a resampler are never larger."""

    num_rows: int
    """Of the first batch."""
    area: int = 0
    """The largest rows x width."""

    def grown(self, batch: Any) -> Shape:
        return Shape(self.num_rows, max(self.area, num_rows(batch) * width_of(batch)))


@dataclass(frozen=True)
class Terms:
    """What is settled before a window is made: it follows from the windows before it."""

    epoch: int
    number: int
    tau: float | None
    """In nats; `None` for a window that uses its own losses' τ."""
    mean_weight: float | None
    """Running mean weight of labelled tokens; `None` before the first window."""
    acceptance: float
    """Running mean weight of samples, or what is typical before the first window."""
    first_index: int
    """Position in the rank's stream of the first sample that the window pulls."""
    shape: Shape
    carry: Sequence[Kept] = ()
    """What windows before it kept and did not deliver."""
    max_batches: int | None = None
    """When the window is made again from a state: how many batches it took then."""
    stored: Tensor | None = None
    """… and their losses [N]."""

    def seed(self, settings: Settings) -> tuple[int, int, int, int]:
        """(seed, epoch, window, rank): all randomness of the window follows from it."""
        return settings.seed, self.epoch, self.number, 0


class Window(Protocol):
    """A window: made a share at a time, then delivered batch by batch."""

    terms: Terms

    def advance(self, share: float) -> None:
        """Go on until this share (0 to 1) of the work is done, as far as batches are queued."""

    def settle(self) -> None:
        """Do what tells whether anything is to be delivered."""

    def finish(self) -> None:
        """Do all that is left. What the window brings is known only then."""

    @property
    def gathers(self) -> bool:
        """Whether it waits for batches before it can go on."""

    @property
    def num_wanted(self) -> int:
        """How many batches the window is still to take from the queue, as far as that can be told."""

    @property
    def ended(self) -> bool:
        """Whether the epoch is over: nothing was carried into the window, and there is nothing to take."""

    tau: float
    """The temperature that its weights were taken at, in nats (the median one, where each batch has its own)."""
    digest: Digest
    """Of its finite losses."""
    sums: WeightSums
    cost: Cost
    score_seconds: float
    num_seen: int
    """Samples pulled for it."""
    num_kept: int
    """Those that were drawn, in this window or a later one; all, in weight mode."""
    next_index: int
    """Position of the first sample after it."""
    first_ordinal: int
    """The first batch that it took from the queue."""
    num_taken: int
    """Batches that it took from the queue."""
    shape: Shape
    carry: Sequence[Kept]
    """What is left for the next window."""

    content: str
    """A hash of the first batch that it took: a resumed loader must deliver it again."""

    @property
    def flat_losses(self) -> Tensor:
        """[N] losses of all that was scored, in the stream's order, as stored: a state holds them."""

    @property
    def num_deliveries(self) -> int: ...

    def deliver(self, position: int) -> Any:
        """The batch at `position`, complete. Afterwards the window lets go of it."""

    def num_samples_at(self, position: int) -> int:
        """Samples of the delivery at `position`."""


class Scoring:
    """The scoring of some batches under way: a share at a time, timed, spared where losses are stored."""

    @own_numerics()
    def __init__(self, recipe: Recipe, pulled: Sequence[Pulled], stored: Tensor | None = None) -> None:
        settings = recipe.settings
        started = time.perf_counter()
        self._batches = [item.batch for item in pulled]
        self._level: Level = settings.level
        self._stored = stored
        self._job = recipe.scorer.begin(
            self._batches,
            level=settings.level,
            cache=recipe.cache,
            row_keys=None if settings.cache_key is None else [_row_keys(item, settings.cache_key) for item in pulled],
            needs_loss=settings.needs_loss and stored is None,
        )
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
        """The scores of the batches in their order, and what they cost."""
        started = time.perf_counter()
        scores = self._job.finish()
        if self._stored is not None:
            scores = _with_stored(scores, self._stored, self._level)
        self.seconds += time.perf_counter() - started
        return scores, self._job.cost


@dataclass(frozen=True, eq=False)
class Delivery:
    """What is handed over: a batch and what goes with it."""

    batch: Any
    weight: Tensor | None
    extras: Mapping[str, Tensor]

    def complete(self, settings: Settings) -> Any:
        """The batch as `attach` says, with tensors of its own on the labels' device."""
        device = device_of(self.batch)
        named = {} if self.weight is None else {"flow_weight": self.weight}
        # Copies: what was cut from a window's tensor would share its storage, and its version, with other batches.
        own = {name: value.to(device, copy=True) for name, value in {**named, **self.extras}.items()}
        if settings.attach == "key":
            return attach(self.batch, own)
        weight = own.pop("flow_weight")
        return (self.batch, weight, own) if own else (self.batch, weight)


def check_bad(losses: Losses, pulled: Sequence[Pulled], scores: Sequence[Scores], recipe: Recipe, terms: Terms) -> None:
    """Raise `ValueError`, naming samples, if more of a window's losses than `max_bad_fraction` are NaN or infinite."""
    bad = losses.labelled & ~losses.loss.isfinite()
    num_bad, num = int(bad.sum()), int(losses.labelled.sum())
    if num_bad <= recipe.settings.max_bad_fraction * num:
        return
    owner = torch.repeat_interleave(torch.arange(len(pulled)), torch.tensor(losses.sizes))[bad]
    named = []
    for number in owner.unique().tolist()[:4]:
        item, score = pulled[number], scores[number]
        if recipe.settings.level == "sample" and score.segment is None:
            rows = (~score.loss.isfinite() & (score.count > 0)).nonzero().flatten().tolist()[:4]
            keys = fields(item.batch).get("__key__")
            rows_named = [f"row {row}" + (f" ({keys[row]})" if isinstance(keys, list) else "") for row in rows]
            named.append(f"batch {item.ordinal}: {', '.join(rows_named)}")
        else:
            named.append(f"batch {item.ordinal}")
    kind = "samples" if recipe.settings.level == "sample" else "tokens"
    raise ValueError(
        f"{num_bad} of {num} {kind} of window {terms.number} (epoch {terms.epoch}) have a loss that is NaN or infinite "
        f"under the reference: {'; '.join(named)}. More than max_bad_fraction={recipe.settings.max_bad_fraction}: look "
        "at these samples, score in bf16 or fp32 in place of fp16, or raise max_bad_fraction"
    )


def content_of(pulled: Sequence[Pulled], settings: Settings) -> str:
    """The hash of a window's first batch, or of its `cache_key` alone where augmentation changes the rest."""
    return content_hash(pulled[0].batch, settings.cache_key) if pulled else ""


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
        losses.loss[usable].numpy(), terms.seed(recipe.settings), sample_index=losses.sample[usable].numpy()
    )


def batch_temperatures(losses: Losses, temperature: RunningTemperature) -> list[float]:
    """τ of each batch from its own losses; samples without a label count as NaN."""
    known = torch.where(losses.labelled, losses.loss, torch.nan)
    return [temperature.batch_tau(loss.numpy()) for loss in known.split(losses.sizes)]


def group_denominators(counts: Sequence[int], settings: Settings) -> list[Tensor]:
    """Of each delivery, the labelled tokens (or samples) of the `accumulate` deliveries it shares a step with: 0-d.

    `counts`: those of each delivery. Empty where nobody asked.
    """
    if "denominator" not in settings.include:
        return []
    accumulate = settings.accumulate
    sums = [sum(counts[i : i + accumulate]) for i in range(0, len(counts), accumulate)]
    return [torch.tensor(float(sums[i // accumulate])) for i in range(len(counts))]


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
