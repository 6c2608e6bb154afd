"""The easiest and the hardest samples that a run has seen, kept while they stream by."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

_MAX_CHARS = 4000


@dataclass(frozen=True, kw_only=True)
class SampleNote:
    """A sample as a page shows it."""

    place: str
    """What names it: a line of a file, or a hash of its content. The same sample has the same."""
    loss: float
    """Under the frozen reference, in nats."""
    weight: float
    """When it was seen."""
    prompt: str
    response: str


class Extremes:
    """Owns the `k` easiest and the `k` hardest samples so far; each place is kept once, with its first loss.

    Samples are ordered by loss and, where that is equal, by place: what is kept does not depend on the order in which
    they came.

    >>> extremes = Extremes(1)
    >>> extremes.add([2.0, 1.0], [0.4, 0.6], ["line 1", "line 2"], lambda row: ("prompt", "response"))
    >>> extremes.easiest[0].place, extremes.hardest[0].place
    ('line 2', 'line 1')
    """

    def __init__(self, k: int = 5) -> None:
        if k < 1:
            raise ValueError(f"Extremes(k={k}): keep at least 1 sample of each kind")
        self.k = k
        self._easiest: list[SampleNote] = []
        self._hardest: list[SampleNote] = []

    def add(
        self,
        losses: Iterable[float],
        weights: Iterable[float],
        places: Iterable[str],
        texts: Callable[[int], tuple[str, str]],
    ) -> None:
        """Look at the samples of a batch.

        Args:
            losses: `[B]` in nats; one that is not finite is no extreme.
            weights: `[B]`.
            places: `[B]`, what names each sample.
            texts: row → (prompt, response), asked for only where the sample is kept: decoding is not free.
        """
        for row, (loss, weight, place) in enumerate(zip(losses, weights, places, strict=True)):
            if math.isfinite(loss) and self._is_extreme(loss, place):
                prompt, response = (_cut(text) for text in texts(row))
                self._keep(SampleNote(place=place, loss=loss, weight=weight, prompt=prompt, response=response))

    def merge(self, other: Extremes) -> None:
        """Look at what another rank has kept."""
        for note in {note.place: note for note in (*other.easiest, *other.hardest)}.values():
            if self._is_extreme(note.loss, note.place):
                self._keep(note)

    @property
    def easiest(self) -> tuple[SampleNote, ...]:
        """At most `k`, the easiest first."""
        return tuple(self._easiest)

    @property
    def hardest(self) -> tuple[SampleNote, ...]:
        """At most `k`, the hardest first."""
        return tuple(reversed(self._hardest))

    def sides(self) -> tuple[tuple[SampleNote, ...], tuple[SampleNote, ...]]:
        """The easiest and the hardest to show: of fewer than 2k samples none is on both sides."""
        every = sorted({note.place: note for note in (*self._hardest, *self._easiest)}.values(), key=_rank)
        half = (len(every) + 1) // 2
        return tuple(every[:half][: self.k]), tuple(every[half:][::-1][: self.k])

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "k": self.k,
            "easiest": [asdict(note) for note in self._easiest],
            "hardest": [asdict(note) for note in self._hardest],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Extremes:
        """What `state_dict` described."""
        extremes = cls(state["k"])
        extremes._easiest = [SampleNote(**note) for note in state["easiest"]]
        extremes._hardest = [SampleNote(**note) for note in state["hardest"]]
        return extremes

    def _is_extreme(self, loss: float, place: str) -> bool:
        if len(self._easiest) < self.k:
            return all(note.place != place for note in self._easiest)
        is_easy = (loss, place) < _rank(self._easiest[-1])
        is_hard = (loss, place) > _rank(self._hardest[0])
        return (is_easy and all(note.place != place for note in self._easiest)) or (
            is_hard and all(note.place != place for note in self._hardest)
        )

    def _keep(self, note: SampleNote) -> None:
        for kept in (self._easiest, self._hardest):
            if all(other.place != note.place for other in kept):
                insort(kept, note, key=_rank)
        del self._easiest[self.k :]
        del self._hardest[: -self.k]


def _rank(note: SampleNote) -> tuple[float, str]:
    return (note.loss, note.place)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + f" … ({len(text):,} characters)"
