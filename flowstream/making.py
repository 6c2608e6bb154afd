"""What a window is, and what is settled before it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from flowstream.batch import num_rows
from flowstream.digest import Digest
from flowstream.distributed.meetings import Meetings
from flowstream.distributed.message import Agreed, Message, Phase
from flowstream.filling import Filling
from flowstream.metrics import WeightSums
from flowstream.recollate import Row, width_of
from flowstream.running_temperature import RunningTemperature
from flowstream.scoring.base import Cost, Scorer
from flowstream.scoring.cache import LossCache
from flowstream.settings import Settings


@dataclass(frozen=True)
class Recipe:
    """What all windows of a stream are made with."""

    settings: Settings
    scorer: Scorer
    cache: LossCache | None
    temperature: RunningTemperature
    meetings: Meetings
    filling: Filling
    size: int
    """Delivered batches a window."""
    first_size: int | None = None
    """Batches of the first window, where ranks have agreed on them; `None`: it grows until τ is warm."""


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


@dataclass(frozen=True, eq=False)
class Contents:
    """The batches that a window has, before it is settled how many of them are delivered."""

    costs: list[int]
    """What each makes a model read (see `cost_of`)."""
    labelled: list[int]
    """Labelled tokens (or samples) of each."""
    model: Any
    """A batch of the loader's, or `None`."""


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
    first_delivery: int
    """Batches that the epoch delivered before it."""
    shape: Shape
    carry: Sequence[Kept] = ()
    """What windows before it kept and did not deliver."""
    max_batches: int | None = None
    """When the window is made again from a state: how many batches it took then."""
    stored: Tensor | None = None
    """… and their losses [N], …"""
    capped: bool = False
    """… and whether it was `Window.capped`, …"""
    ended: bool = False
    """… and `Window.ended`."""

    def seed(self, recipe: Recipe) -> tuple[int, int, int, int]:
        """(seed, epoch, window, rank): all randomness of the window follows from it."""
        return recipe.settings.seed, self.epoch, self.number, recipe.meetings.world.rank

    def place(self, position: int = 0) -> Message:
        """Where the ranks meet over the window."""
        return Message(phase=Phase.WINDOW, epoch=self.epoch, window=self.number, position=position)


class Window(Protocol):
    """A window: made a share at a time, then delivered batch by batch."""

    terms: Terms

    def advance(self, share: float) -> None:
        """Go on until this share (0 to 1) of the work is done, as far as batches are queued."""

    def look(self) -> None:
        """Do what tells whether there is anything to be delivered."""

    def finish(self) -> None:
        """Have all scored and weighed. What the window brings to the ranks' meeting is known only then."""

    def report(self) -> Message:
        """What it brings: everything but the place."""

    def contents(self) -> Contents:
        """What there is to be delivered: known once it is finished, until it is settled."""

    def settle(self, agreed: Agreed) -> None:
        """Make the deliveries, as all ranks agreed upon. What is left for the next window is known only then."""

    @property
    def gathers(self) -> bool:
        """Whether it waits for batches before it can go on."""

    @property
    def num_wanted(self) -> int:
        """How many batches the window is still to take from the queue, as far as that can be told."""

    @property
    def barren(self) -> bool:
        """Whether it is known by now that this rank has nothing to deliver of it."""

    tau: float
    """The temperature that its weights were taken at, in nats (the median one, where each batch has its own)."""
    digest: Digest
    """Of its finite losses."""
    sums: WeightSums
    cost: Cost
    score_seconds: float
    num_seen: int
    """Samples pulled for it."""
    num_left: int
    """Samples scored and not delivered, where the ranks stop together."""
    next_index: int
    """Position of the first sample after it."""
    first_ordinal: int
    """The first batch that it took from the queue."""
    num_taken: int
    """Batches that it took from the queue."""
    shape: Shape
    carry: Sequence[Kept]
    """What is left for the next window."""

    capped: bool
    """Whether it ended before its batches were full, but not with the epoch: what fills no batch is carried over."""
    ended: bool
    """Whether this rank has nothing to deliver after it: known once it is reported."""

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
