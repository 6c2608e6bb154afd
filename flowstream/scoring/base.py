"""What a scorer is: the losses of a window of batches under a frozen reference, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from flowstream.scoring.cache import LossCache

Level = Literal["sample", "token"]


@dataclass(frozen=True)
class Scores:
    """The losses of one batch under the reference, in nats, on the CPU.

    A *sample* is a row of the batch, or one of the documents that share a packed row: `S` samples in `B` rows.
    """

    loss: Tensor
    """[S] float32: mean loss over the sample's labelled tokens (its loss, for a classifier). NaN and ±inf are kept as
    they came; 0 where nothing is labelled."""

    count: Tensor
    """[S] int64: labelled tokens of the sample (1 for a classifier), 0 where nothing is labelled."""

    segment: Tensor | None = None
    """[B, T] int64, for packed rows only: the sample that each position of `labels` belongs to, -1 for none.
    `None`: sample i is row i."""

    token_loss: Tensor | None = None
    """[B, T] float16, at level "token" only: the loss of predicting `labels[b, t]`, at [b, t]; 0 where ignored."""

    token_mask: Tensor | None = None
    """[B, T] bool, at level "token" only: where `token_loss` is a loss."""

    row_targets: Tensor | None = None
    """[B] int64: the labels that a loss over the whole row counts, where these are not the `count` of its samples: a
    row's loss also predicts the first token of a left-padded or packed document. `None`: the sum of the counts."""


@dataclass(frozen=True)
class Cost:
    """What scoring a window took: counts that add up over windows."""

    num_tokens: int = 0
    """Tokens (or images) that the reference read, without padding."""

    num_padded: int = 0
    """The same with padding."""

    num_lookups: int = 0
    """Samples looked up in the cache."""

    num_hits: int = 0
    """Samples found there."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.num_tokens + other.num_tokens,
            self.num_padded + other.num_padded,
            self.num_lookups + other.num_lookups,
            self.num_hits + other.num_hits,
        )


class Job(Protocol):
    """The scoring of a few batches, under way: `num_steps` times `step()`, then `finish()` once."""

    num_steps: int
    """Micro-batches that are left to be enqueued. It may grow when memory runs out and they are halved."""

    cost: Cost
    """Complete after `finish()`."""

    def step(self) -> None:
        """Enqueue one micro-batch; does not wait for a device."""

    def finish(self) -> list[Scores]:
        """Enqueue what is left, wait for it, and return the scores of the batches in their order."""


class Scorer(Protocol):
    """The frozen reference, and how to take losses from it. The stream knows nothing else of a scorer."""

    levels: frozenset[Level]
    """At which levels it has losses."""

    def begin(
        self,
        batches: Sequence[Any],
        *,
        level: Level,
        cache: LossCache | None = None,
        row_keys: Sequence[Sequence[object]] | None = None,
        needs_loss: bool = True,
    ) -> Job:
        """Plan the scoring of `batches` as a whole.

        Everything that can be refused is refused here, before the device sees it: labels of another shape, token ids
        outside the vocabulary (`ValueError`). `row_keys[i][b]` names row b of batch i for the cache in place of its
        content. With `needs_loss=False` the job has no steps and gives zeros, with counts and segments as always.
        """

    def check(self) -> None:
        """Raise `RuntimeError` if the reference has changed since it was frozen (a sampled checksum, once a window)."""

    def fingerprint(self) -> str:
        """What identifies the reference and the way it scores; compared when a state is loaded."""

    def state_dict(self) -> dict[str, Any]:
        """What scoring has learned on the way (the token budget after an out-of-memory), plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
