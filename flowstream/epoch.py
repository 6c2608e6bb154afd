"""One pass over the loader: the loop that makes a window while the one before it is delivered."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flowstream.distributed.meetings import Meetings
from flowstream.distributed.message import Agreed, Message, Phase, agree
from flowstream.distributed.notices import tell_same, tell_stop, tell_unlike
from flowstream.filling import Filling
from flowstream.making import Kept, Recipe, Shape, Terms, Window
from flowstream.numerics import own_numerics
from flowstream.opening import dry_ranks, first_batch, is_over, supply
from flowstream.position import described, go_to, stored_losses, too_short
from flowstream.progress import Progress
from flowstream.read_ahead import ReadAhead
from flowstream.rehearsal.mixing import Mixed
from flowstream.resampled import ResampledWindow
from flowstream.running import Running
from flowstream.scoring.base import Scorer
from flowstream.scoring.cache import LossCache
from flowstream.settings import Settings, first_size
from flowstream.weighted import WeightedWindow

_SCORED_BY = 0.75
"""The share of a window's delivery at which the scoring of the next one is enqueued."""

_CALLED_BY = 0.875
"""The share at which the ranks' meeting over it is called: what is left hides the meeting."""

_TYPICAL_WEIGHT = 0.4
"""Mean weight at τ = median on common loss laws (.37-.43), until the stream has its own."""


class EpochEnd(Exception):
    """The epoch is over. Not `StopIteration`, which any function of the user's might raise by mistake."""


class Epoch:
    """Owns the position: the window in delivery, the one in the making, and the batches queued for the one after."""

    def __init__(
        self,
        settings: Settings,
        scorer: Scorer,
        cache: LossCache | None,
        running: Running,
        reader: ReadAhead,
        number: int,
        meetings: Meetings,
        progress: Progress | None = None,
        state: Mapping[str, Any] | None = None,
        *,
        is_elastic: bool = False,
    ) -> None:
        self.number = number
        self.num_delivered = 0
        self._settings = settings
        self._scorer = scorer
        self._cache = cache
        self._running = running
        self._reader = reader
        self._meetings = meetings
        self._filling = Filling(scorer, settings)
        self._progress = progress
        self._is_elastic = is_elastic
        self._resume: Mapping[str, Any] | None = state
        self._begun_with = running.state_dict()
        self._recipe: Recipe | None = None
        self._shape = Shape(1)
        self._making: Window | None = None
        self._current: Window | Mixed | None = None
        self._agreed: Agreed | None = None
        self._is_last = False
        self._anchor: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        self._failure: Exception | None = None
        self._position = 0
        self._first_position = 0
        self._num_due = 0
        self._num_pulled = 0
        self._started = False
        self._done = False
        self._entered_at = math.nan

    def next(self) -> Any:
        """The next batch. `EpochEnd` at the end; what the loader or the scorer raises, after the batches before it."""
        if self._done:
            raise EpochEnd
        self._meetings.note(self._consumer)
        if self._making is None and not self._is_last:
            self._start()
        if self._current is None or self._position >= self._current.num_deliveries:
            self._enter()
        assert self._current is not None
        self._work_ahead(self._current)
        num_samples_delivered = self._current.num_samples_at(self._position)
        batch = self._current.deliver(self._position)
        # From here on the batch counts as delivered: nothing below may fail.
        self._position += 1
        self.num_delivered += 1
        self._running.num_emitted += num_samples_delivered
        self._running.num_delivered += 1
        if isinstance(self._current, Mixed):
            self._current.note(self._position - 1)
        return batch

    @property
    def finished(self) -> bool:
        """Whether all is delivered; known as soon as the last batch is."""
        if self._done:
            return True
        return self._is_last and self._current is not None and self._position >= self._current.num_deliveries

    @property
    def pending(self) -> Mapping[str, Any] | None:
        """The position that is still to be resumed: a resume that failed or was interrupted begins anew."""
        return self._resume

    @property
    def where(self) -> str:
        """The place, in words for an error."""
        window = "" if self._making is None else f", window {self._making.terms.number}"
        return f"epoch {self.number}{window}"

    @property
    def _consumer(self) -> str:
        """Where the training loop is, in words for the other ranks."""
        if self._current is None:
            return f"the beginning of epoch {self.number}"
        return f"batch {self._position} of window {self._current.terms.number} of epoch {self.number}"

    def state_dict(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """The consumer's position within the epoch, `None` before the first batch, and what was learned before it."""
        if self._resume is not None:
            return dict(self._resume), self._begun_with
        if self._current is None:
            return None, self._begun_with
        position, running = self._anchor
        position = {**position, "delivered": self._position}
        current, num_own = self._current, self._position
        window = current
        if isinstance(current, Mixed):
            window, num_own = current.window, current.num_own(num_own)
        if self._is_elastic and isinstance(window, WeightedWindow):
            position["part"] = window.part(num_own)
            position["num_own"] = num_own
        return position, running

    def rewind(self) -> None:
        """Forget what was learned of windows that delivered nothing: another epoch begins in this one's place."""
        self._running.load_state_dict(self._begun_with)

    def interrupt(self) -> None:
        """Go back to the state: Ctrl-C may have left anything half-done, a generator dead among it."""
        if self.finished:
            return
        self._resume, self._begun_with = self.state_dict()
        self.rewind()
        self._making = self._current = self._failure = self._agreed = None
        self._is_last = self._started = False

    def close(self) -> None:
        """Let go of everything that is held. The epoch is over."""
        self._end()
        self._reader.close()

    def _end(self) -> None:
        self._done = True
        self._making = self._current = None
        if self._progress is not None:
            self._progress.close()

    # -- beginning ---------------------------------------------------------------------------------

    def _start(self) -> None:
        """Begin the epoch, or go to the position to be resumed: on all ranks."""
        self._meetings.begin()
        if self._resume is not None:
            self._go_to(self._resume)
            return
        place = Message(phase=Phase.OPENING, epoch=self.number, past=self._running.fingerprint())
        opened = self._meetings.meet(place, lambda: self._look_at_first(place))
        if is_over(opened, self._settings):
            tell_stop(self._meetings.world, self.number, dry_ranks(opened), self._reader.num_queued_samples)
            self._end()
            raise EpochEnd
        self._shape = Shape(max(opened[self._meetings.world.rank].num_rows, 1))
        size = max(message.size for message in opened)
        self._set_size(size, first_size(self._settings, self._running.temperature.warmup_samples, size, opened))
        supply(opened, self._settings, self._meetings, self._reader, self._filling)
        if self._running.rehearsing is not None:
            self._running.rehearsing.begin()
        self._making = self._make(0, 0, 0)

    def _look_at_first(self, place: Message) -> Message:
        if not self._started:
            self._reader.start()
            self._started = True
        return first_batch(self._reader, self._settings, place, self.where)

    def _go_to(self, state: Mapping[str, Any]) -> None:
        """Make the window in flight again. Until that is done the position stays to be resumed."""
        self.rewind()
        self._shape = Shape(**state["shape"])
        place = Message(
            phase=Phase.OPENING,
            epoch=self.number,
            window=state["window"],
            position=state["delivered"],
            past=self._running.fingerprint(),
        )
        carry: list[Kept] = []

        def reach() -> Message:
            carry[:], last = go_to(state, self._reader, self.where)
            if last is not None and self._meetings.are_several:
                self._filling.remember(last)
            return replace(place, has_batch=last is not None or state["num_taken"] > 0)

        opened = self._meetings.meet(place, reach)
        self._set_size(state["size"])
        supply(opened, self._settings, self._meetings, self._reader, self._filling)
        making = self._make(
            state["window"],
            state["first_index"],
            state["first_delivery"],
            carry,
            max_batches=state["num_taken"],
            stored=stored_losses(state, self._reader, self._settings.cache_key),
            capped=state["capped"],
            ended=state["ended"],
        )
        if not self._finish_window(making, state["delivered"]):
            raise too_short(state, self._reader)
        self.num_delivered = state["delivered"]
        self._resume = None

    def _set_size(self, size: int, first: int | None = None) -> None:
        self._reader.snapshot_every = size
        self._recipe = Recipe(
            self._settings,
            self._scorer,
            self._cache,
            self._running.temperature,
            self._meetings,
            self._filling,
            size,
            first if self._meetings.are_several else None,
        )

    @own_numerics()
    def _make(
        self, number: int, first_index: int, first_delivery: int, carry: Sequence[Kept] = (), **resumed: Any
    ) -> Window:
        """A new window. `resumed`: the terms of one that is made again from a state."""
        running = self._running
        return self._window(
            Terms(
                epoch=self.number,
                number=number,
                tau=running.temperature.settled_tau,
                mean_weight=running.mean_weight,
                acceptance=running.sums.mean_weight if running.sums.total else _TYPICAL_WEIGHT,
                first_index=first_index,
                first_delivery=first_delivery,
                shape=self._shape,
                carry=carry,
                **resumed,
            )
        )

    def _window(self, terms: Terms) -> Window:
        assert self._recipe is not None
        kind = WeightedWindow if self._settings.sampler is None else ResampledWindow
        return kind(self._recipe, self._reader, terms)

    # -- from window to window ---------------------------------------------------------------------

    def _enter(self) -> None:
        """Put the next window that has something to deliver into delivery."""
        if self._failure is not None:
            error, self._failure = self._failure, None
            raise error
        while self._is_last or not self._finish_window(self._making_now):
            if self._is_last:
                self._end()
                self._scorer.check()
                raise EpochEnd

    def _call(self, window: Window, position: int = 0, failure: Exception | None = None) -> None:
        """Finish this rank's share of the window, and call the meeting over it; or say there what has failed."""

        def build() -> Message:
            if failure is not None:
                raise failure
            window.finish()
            if not window.num_taken and self._reader.failed:
                if window is self._making:  # what the loader delivers after the error is this window's
                    self._making = self._window(window.terms)
                self._reader.reraise(self.where, at_once=True)
            self._scorer.check()
            message, rehearsing = window.report(), self._running.rehearsing
            if rehearsing is not None:
                message = replace(message, tallies=rehearsing.tell(window.contents().costs))
            return message

        self._meetings.call(window.terms.place(position), build)

    def _agree(self) -> Agreed:
        """Wait for the outcome of the meeting."""
        settings = self._settings
        messages = self._meetings.outcome()
        agreed = agree(messages, on_uneven=settings.when_uneven, accumulate=settings.accumulate)
        if not self._meetings.has_compared:
            self._meetings.has_compared = True
            tell_same(self._meetings.world, messages)
        if settings.sampler is not None and self._meetings.are_several and not self._meetings.has_told_unlike:
            self._meetings.has_told_unlike = tell_unlike(messages)
        return agreed

    def _finish_window(self, window: Window, position: int = 0) -> bool:
        """Finish the window in the making and begin the next. True if it goes into delivery, from `position` on."""
        reader, running = self._reader, self._running
        started = time.perf_counter()
        if self._progress is not None and window.terms.number == 0:
            self._progress.first_window(window, reader)
        if self._agreed is None:
            if not self._meetings.is_called:
                self._call(window, position)
            self._agreed = self._agree()
        before, current = running.state_dict(), self._mixed(window, self._agreed, position)
        agreed = current.agreed if isinstance(current, Mixed) else self._agreed
        window.settle(agreed)
        now = time.perf_counter()
        running.wait_seconds += now - started
        running.window_seconds, self._entered_at = now - self._entered_at, now
        if window.num_deliveries:
            assert self._recipe is not None
            anchor = described(window, self._recipe, reader, self._shape), before
            # In one statement: a state taken after Ctrl-C must not meet the one without the other.
            self._current, self._anchor, self._position, self._first_position = current, anchor, position, position
        running.absorb(window, agreed)
        if isinstance(current, Mixed):
            current.take_over()
        self._shape = window.shape
        self._agreed, self._is_last = None, agreed.last
        if agreed.last:
            self._making = None
            if self._settings.when_uneven == "stop" and self._meetings.are_several:
                tell_stop(self._meetings.world, self.number, agreed.ended, window.num_left + reader.num_queued_samples)
        else:
            first_delivery = window.terms.first_delivery + window.num_deliveries
            self._making = self._make(window.terms.number + 1, window.next_index, first_delivery, window.carry)
        if not window.num_deliveries:
            return False
        self._num_pulled = self._num_due = 0
        if self._making is not None:
            self._num_due = max(self._making.num_wanted + self._num_queued_wanted - reader.num_queued, 0)
        if self._progress is not None:
            self._progress.line(self.number, window.terms.number, running.metrics())
        return True

    def _mixed(self, window: Window, agreed: Agreed, position: int) -> Window | Mixed:
        """The window with what is rehearsed in it."""
        assert self._recipe is not None
        rehearsing = self._running.rehearsing
        return window if rehearsing is None else Mixed(window, agreed, rehearsing, self._recipe, position)

    def _work_ahead(self, current: Window | Mixed) -> None:
        """Do this delivery's share for the windows to come: pull, score, and meet the other ranks.

        What fails there is raised once this window is delivered.
        """
        share = (self._position + 1 - self._first_position) / max(current.num_deliveries - self._first_position, 1)
        started = self._reader.seconds + self._meetings.seconds
        while self._num_pulled < math.ceil(self._num_due * share) and self._reader.pull():
            self._num_pulled += 1
        if self._failure is None and not self._is_last:
            try:
                self._make_ahead(share)
            except Exception as error:
                self._failure = error
        self._running.wait_seconds += self._reader.seconds + self._meetings.seconds - started

    def _make_ahead(self, share: float) -> None:
        assert self._current is not None
        num, meetings = self._current.num_deliveries, self._meetings
        if not meetings.is_called and self._agreed is None:
            try:
                self._making_now.advance(min(share / _SCORED_BY, 1.0))
            except Exception as error:
                if not meetings.are_several:
                    raise
                self._call(self._making_now, failure=error)
        # Counted in the window's own deliveries, so that all ranks call at the same one, resumed or not.
        is_due = self._position + 1 >= min(math.ceil(_CALLED_BY * num), max(num - 1, 1))
        if meetings.are_several and is_due and not meetings.is_called and self._agreed is None:
            self._call(self._making_now)
        # Whether this was the last batch shall be known, and the windows after it that deliver nothing be counted.
        while self._position + 1 == num and not self._is_last:
            making = self._making_now
            if not meetings.is_called:
                if not meetings.are_several:
                    making.look()
                    if not making.barren:
                        return
                self._call(making)
            self._agreed = self._agree()
            if self._agreed.num_deliveries:
                return
            self._finish_window(making)

    @property
    def _making_now(self) -> Window:
        assert self._making is not None
        return self._making

    @property
    def _num_queued_wanted(self) -> int:
        """Batches that shall be queued for the window after the one in the making."""
        assert self._recipe is not None
        if self._settings.sampler is None:
            return self._recipe.size
        mean = self._running.sums.mean_weight if self._running.sums.total else _TYPICAL_WEIGHT
        return min(math.ceil(self._recipe.size / mean), 8 * self._recipe.size)
