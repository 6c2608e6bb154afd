"""Feedback on its way: which rehearsed samples await it, and what was given and is not yet agreed upon."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

_NUM_REMEMBERED = 8
"""Windows of which feedback is still taken: trainers pull batches ahead, and give it late."""

Tally = tuple[int, ...]
"""[2 K]: samples of each bin that feedback was given on, and damaged ones."""


@dataclass
class Window:
    """The rehearsed samples of a window that were delivered."""

    number: int
    awaited: Counter[int] = field(default_factory=Counter)
    has_feedback: bool = False


class Ledger:
    """Owns the tally of this rank, from feedback to the message that takes it along.

    Meetings are numbered by the windows that all ranks have agreed upon so far, and a meeting's tally is kept until its
    window can not be made again: a resumed stream tells the others what it told them before.
    """

    def __init__(self, num_bins: int) -> None:
        self._num_bins = num_bins
        self.pending: list[int] = [0] * (2 * num_bins)
        self._told: dict[int, Tally] = {}
        self._windows: list[Window] = []
        self.delivered = [0, 0]
        """Cost of what this rank has delivered: of the loader's batches, and of rehearsed ones."""

    # -- delivery and feedback ---------------------------------------------------------------------

    def note(self, number: int, samples: Sequence[int]) -> None:
        """These were delivered, in the window of that meeting."""
        if not self._windows or self._windows[-1].number != number:
            self._windows.append(Window(number))
        self._windows[-1].awaited.update(samples)

    def settle(self, samples: Sequence[int]) -> None:
        """Feedback was given on these. `ValueError`, and nothing is settled, where one of them does not await it."""
        wanted = Counter(samples)
        awaited = sum((window.awaited for window in self._windows), Counter[int]())
        unknown = sorted((wanted - awaited).elements())
        if unknown:
            raise ValueError(
                f"feedback on prior sample {unknown[0]} ({len(unknown)} of {len(samples)}), which awaits none: the "
                "stream did not deliver it, or that is long ago, or feedback on it was given before. Give it once for "
                "each rehearsed batch, with the flow_rehearsed that came with the batch"
            )
        for window in reversed(self._windows):
            found = wanted & window.awaited
            window.awaited -= found
            window.has_feedback |= bool(found)
            wanted -= found

    def is_neglected(self, number: int) -> bool:
        """Whether a window went by long enough ago without any feedback on what it rehearsed. Older ones are let go."""
        neglected = any(window.number <= number - 2 and not window.has_feedback for window in self._windows)
        self._windows = [window for window in self._windows if window.number > number - _NUM_REMEMBERED]
        return neglected

    # -- meetings ----------------------------------------------------------------------------------

    def tell(self, number: int) -> Tally:
        """What this rank tells at a meeting: all that was given until it was called, however often it is held."""
        if number not in self._told:
            self._told[number] = tuple(self.pending)
            self.pending = [0] * (2 * self._num_bins)
        return self._told[number]

    def prune(self, number: int) -> None:
        """Windows of meetings before this one will not be made again."""
        self._told = {key: tally for key, tally in self._told.items() if key >= number}

    def reclaim(self, number: int) -> None:
        """An epoch begins: what was told and not agreed upon, from this meeting on, is still to be told."""
        for key in [key for key in self._told if key >= number]:
            self.pending = [a + b for a, b in zip(self.pending, self._told.pop(key), strict=True)]

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Feedback that was given is in it; batches that still await it belong to the loop that has them."""
        return {
            "pending": list(self.pending),
            "told": {key: list(tally) for key, tally in self._told.items()},
            "delivered": list(self.delivered),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        ledger = cls(len(state["pending"]) // 2)
        ledger.pending = list(state["pending"])
        ledger._told = {key: tuple(tally) for key, tally in state["told"].items()}
        ledger.delivered = list(state["delivered"])
        return ledger


def merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ledgers of all ranks in one."""
    keys = sorted({key for state in states for key in state["told"]})
    num = len(states[0]["pending"])
    nothing = [0] * num

    def added(tallies: list[list[int]]) -> list[int]:
        return [sum(column) for column in zip(*tallies, strict=True)]

    return {
        "pending": added([state["pending"] for state in states]),
        "told": {key: added([state["told"].get(key, nothing) for state in states]) for key in keys},
        "delivered": added([state["delivered"] for state in states]),
    }
