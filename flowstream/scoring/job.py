"""A window under way: samples read from batches, looked up, planned, run in micro-batches, and placed again."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowstream.scoring.base import Cost, Level, Scores
from flowstream.scoring.cache import LossCache
from flowstream.scoring.device import Fetched, Lane
from flowstream.scoring.out_of_memory import is_out_of_memory
from flowstream.scoring.reading import Integers
from flowstream.window import Layout, Padded

_logger = logging.getLogger("flowstream")


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sample, ready to be scored without its neighbours and without padding."""

    key: bytes
    """Samples of the same key have the same losses, and as many."""

    length: int
    """What it takes of the token budget."""

    num_tokens: int
    """What the reference reads of it (1 for an image)."""

    count: int
    """Losses that it has; 0 where nothing is labelled, and then it is not run."""

    content: Any
    """What the scorer's `run` takes."""

    group: Hashable = None
    """Only samples of one group go into a micro-batch together."""

    whole: bool = False
    """The group is a batch that is run as it is, all samples in one micro-batch."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A batch as a scorer reads it."""

    samples: Sequence[Sample]

    shape: tuple[int, int] | None = None
    """[B, T] of the labels, where losses are of tokens."""

    segment: Tensor | None = None
    """See `Scores.segment`."""

    positions: Sequence[Integers] = ()
    """For each sample, where its losses belong in the flattened labels."""

    row_targets: Tensor | None = None
    """See `Scores.row_targets`."""


@dataclass
class Budget:
    """Tokens that a micro-batch may have, padding included; halved for good when memory runs out."""

    tokens: int
    told: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"token_budget must be at least 1, not {self.tokens}")

    @classmethod
    def of(cls, tokens: int | None, device: torch.device) -> Budget:
        """`tokens`, or by default enough to fill the device and little enough to sit beside a training step."""
        return cls((2048 if device.type == "cpu" else 16384) if tokens is None else tokens)

    def halve(self, size: int) -> None:
        """After a micro-batch of `size` tokens did not fit."""
        self.tokens = max(min(self.tokens, size) // 2, 1)
        if not self.told:
            self.told = True
            _logger.warning(
                "the scorer ran out of memory on a micro-batch of %d tokens: it goes on with at most %d. Pass "
                "token_budget=%d to start there (told once)",
                size,
                self.tokens,
                self.tokens,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"token_budget": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The smaller of the two: what memory allowed then, and what the user allows now."""
        self.tokens = min(self.tokens, max(int(state["token_budget"]), 1))


Run = Callable[[list[Sample]], Tensor]
"""Enqueues a micro-batch, and gives the fp32 losses of its samples one after the other, on the reference's device."""


class WindowJob:
    """Owns the scoring of a window until it is finished. A `Job`."""

    def __init__(
        self,
        readings: Sequence[Reading],
        run: Run,
        *,
        level: Level,
        budget: Budget,
        lane: Lane,
        layout: Layout,
        on_last: Callable[[], None] | None = None,
        cache: LossCache | None = None,
        needs_loss: bool = True,
    ) -> None:
        self._readings = readings
        self._run = run
        self._level = level
        self._budget = budget
        self._lane = lane
        self._layout = layout
        self._on_last = on_last
        self._cache = cache
        self._needs_loss = needs_loss
        self._losses: dict[bytes, NDArray[Any]] = {}
        self._pending: list[tuple[list[Sample], Tensor]] = []
        self._fetched: Fetched | None = None
        self.cost = Cost()
        missing = self._look_up() if needs_loss else []
        self._queue = deque(self._micro_batches(missing))
        self.num_steps = len(self._queue)

    def step(self) -> None:
        """Enqueue one micro-batch; where memory runs out, a smaller one."""
        if not self._queue:
            return
        if not self._pending:
            self._lane.follow()
        while (losses := self._try(self._queue[0])) is None:
            self._halve()
        samples = self._queue.popleft()
        self._pending.append((samples, losses))
        self.num_steps = len(self._queue)
        self.cost += Cost(num_tokens=sum(s.num_tokens for s in samples), num_padded=self._padded(samples))
        if not self._queue:
            # On its way while the rest of the window before this one is trained on.
            with self._lane.entered():
                self._fetched = self._lane.fetch(torch.cat([losses for _, losses in self._pending]).float())
                if self._on_last is not None:
                    self._on_last()

    @torch.inference_mode(False)  # or the caller's mode would give weights that no backward takes
    def finish(self) -> list[Scores]:
        """Run what is left, fetch all losses in one copy, round them to what is stored, and place them."""
        while self._queue:
            self.step()
        self._fetch()
        return [self._place(reading) for reading in self._readings]

    # Planning

    def _look_up(self) -> list[Sample]:
        """The samples without a stored loss, one of each key."""
        samples = [sample for reading in self._readings for sample in reading.samples if sample.count]
        if self._cache is not None:
            for sample, stored in zip(samples, self._cache.get([s.key for s in samples]), strict=True):
                if stored is not None:
                    self._losses[sample.key] = stored
            hits = sum(sample.key in self._losses for sample in samples)
            self.cost += Cost(num_lookups=len(samples), num_hits=hits)
        missing: dict[bytes, Sample] = {}
        for sample in samples:
            if sample.key not in self._losses:
                missing.setdefault(sample.key, sample)
        return list(missing.values())

    def _micro_batches(self, samples: Iterable[Sample]) -> list[list[Sample]]:
        """A pure function of the samples, their order and the budget: the same window gives the same bits."""
        groups: dict[Hashable, list[Sample]] = {}
        for sample in samples:
            groups.setdefault(sample.group, []).append(sample)
        planned: list[list[Sample]] = []
        for group, members in groups.items():
            if members[0].whole:
                planned.append([s for r in self._readings for s in r.samples if s.group == group and s.count])
            else:
                lengths = [member.length for member in members]
                cuts = self._layout.plan(lengths, self._budget.tokens)
                planned += [[members[i] for i in indices] for indices in cuts]
        return planned

    # Running

    def _try(self, samples: list[Sample]) -> Tensor | None:
        """The losses, or `None` where memory ran out and a smaller micro-batch may fit."""
        try:
            with self._lane.entered():
                return self._run(samples)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if samples[0].whole:
                raise RuntimeError(
                    f"the scorer ran out of memory on a batch of {len(samples)} rows ({self._size(samples)} tokens), "
                    "which has inputs that cannot be split: make the loader's batches smaller, or score on another "
                    "device"
                ) from error
            if len(samples) == 1:
                raise RuntimeError(
                    f"the scorer ran out of memory on a single sample of {self._size(samples)} tokens (the budget of a "
                    f"micro-batch is {self._budget.tokens}): truncate the samples, free memory for the reference, load "
                    "it in a smaller dtype, or score on another device"
                ) from error
        # Here the error is gone, and with its traceback what the failed forward held.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _halve(self) -> None:
        """Plan anew what is left, under half of what did not fit."""
        self._budget.halve(self._size(self._queue[0]))
        left = [micro_batch for micro_batch in self._queue if not micro_batch[0].whole]
        whole = [micro_batch for micro_batch in self._queue if micro_batch[0].whole]
        self._queue = deque(self._micro_batches(s for micro_batch in left for s in micro_batch))
        self._queue.extend(whole)
        self.num_steps = len(self._queue)

    def _size(self, samples: list[Sample]) -> int:
        """What a micro-batch takes of the budget."""
        return self._layout_of(samples).size([sample.length for sample in samples])

    def _padded(self, samples: list[Sample]) -> int:
        """What the reference reads of a micro-batch, with padding."""
        return self._layout_of(samples).size([sample.num_tokens for sample in samples])

    def _layout_of(self, samples: list[Sample]) -> Layout:
        return Padded() if samples[0].whole else self._layout

    # Placing

    def _fetch(self) -> None:
        if self._fetched is None:
            return
        flat = self._fetched.wait()
        samples = [sample for micro_batch, _ in self._pending for sample in micro_batch]
        self._pending = []
        self._fetched = None
        parts = flat.split([sample.count for sample in samples])
        stored = [_stored(part, self._level) for part in parts]
        self._losses.update(zip((s.key for s in samples), stored, strict=True))
        if self._cache is not None:
            self._cache.put([sample.key for sample in samples], stored)

    def _place(self, reading: Reading) -> Scores:
        samples = reading.samples
        found = [self._losses.get(sample.key) if sample.count else None for sample in samples]
        loss = np.array([0.0 if v is None else _mean(v, self._level) for v in found], dtype=np.float32)
        count = np.array([sample.count for sample in samples], dtype=np.int64)
        scores = Scores(
            torch.from_numpy(loss), torch.from_numpy(count), reading.segment, row_targets=reading.row_targets
        )
        if self._level == "sample":
            return scores
        assert reading.shape is not None
        token_loss = np.zeros(reading.shape, dtype=np.float16)
        token_mask = np.zeros(reading.shape, dtype=np.bool_)
        for value, where in zip(found, reading.positions, strict=True):
            token_mask.reshape(-1)[where] = True
            if value is not None:
                token_loss.reshape(-1)[where] = value
        tokens, mask = torch.from_numpy(token_loss), torch.from_numpy(token_mask)
        return replace(scores, token_loss=tokens, token_mask=mask)


# What is stored of a sample: its mean loss in fp32 at level "sample", its losses in fp16 at level "token". Losses are
# rounded to it before anything uses them, so that a stored loss equals the one it came from to the bit. How many they
# are is part of the key.


def _stored(losses: Tensor, level: Level) -> NDArray[Any]:
    if level == "token":
        return losses.half().numpy()
    return losses.double().mean().float().reshape(1).numpy()


def _mean(stored: NDArray[Any], level: Level) -> float:
    if level == "sample":
        return float(stored[0])
    return torch.from_numpy(stored.astype(np.float64)).mean().item()
