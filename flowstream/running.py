"""What a stream carries from window to window: τ's state, the sums of weights, and counters."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flowstream.digest import Digest
from flowstream.distributed.message import Agreed
from flowstream.making import Window
from flowstream.metrics import WeightSums
from flowstream.rehearsal.rehearsing import Rehearsing
from flowstream.running_temperature import RunningTemperature
from flowstream.scoring.base import Cost
from flowstream.settings import Settings

_logger = logging.getLogger("flowstream")

_MAX_PADDED = 0.05
"""The share of padded batches above which it is told, …"""
_MIN_BATCHES = 20
"""… once there are as many batches."""

_NOTHING_LABELLED = (
    "no sample so far has a label and a finite loss: all weights are 0, and nothing is learned. See that the collate "
    "function leaves labels other than -100; a prompt that fills the whole length leaves none"
)


class Running:
    """Owns what was learned from the windows delivered so far. Windows are absorbed in their order."""

    def __init__(self, settings: Settings, *, speaks: bool = True, rehearsing: Rehearsing | None = None) -> None:
        self._settings = settings
        self.rehearsing = rehearsing
        self._speaks = speaks
        self.temperature = RunningTemperature(settings.temperature, settings.level)
        self.sums = WeightSums()
        self.num_seen = 0
        self.num_emitted = 0
        self.num_delivered = 0
        """Batches that this rank's `next()` has returned, in all epochs."""
        self.num_kept = 0
        self.num_batches = 0
        """Delivered over all ranks, …"""
        self.num_padded = 0
        """… and how many of them had no samples."""
        self.tau = math.nan
        """τ of the window in delivery, in nats."""
        self.cost = Cost()
        self.score_seconds = 0.0
        self.wait_seconds = 0.0
        self.window_seconds = math.nan
        self._told: set[str] = set()
        self._advise_at = 1

    def absorb(self, window: Window, agreed: Agreed) -> None:
        """Take over what a finished window brings, on this rank and on all, as it goes into delivery."""
        self.tau = window.tau if self._settings.needs_loss else math.nan
        self.temperature.update(agreed.digest, agreed.num_seen)
        self.sums += agreed.sums
        self.num_seen += agreed.num_seen
        self.num_kept += agreed.num_kept
        self.num_batches += agreed.num_deliveries * agreed.world_size
        self.num_padded += agreed.num_padded
        self.cost += window.cost
        self.score_seconds += window.score_seconds
        if self._settings.needs_loss and self.num_seen >= self._advise_at:
            self._advise_at = 2 * self.num_seen
            if self.sums.num:
                for name, message in self.temperature.advice(self.tau):
                    self._tell(name, message)
            else:
                self._tell("nothing_labelled", _NOTHING_LABELLED)
        if self.num_batches >= _MIN_BATCHES and self.num_padded > _MAX_PADDED * self.num_batches:
            self._tell(
                "padded",
                f"{self.num_padded} of {self.num_batches} batches over all ranks were of weight 0, to keep ranks of "
                "unequal data in step: their steps are computed for nothing, and BatchNorm and auxiliary losses see "
                'them. Spread the shards more evenly (more, smaller ones), or take on_uneven="stop"',
            )

    def _tell(self, name: str, message: str) -> None:
        if self._speaks and name not in self._told:
            self._told.add(name)
            _logger.warning(message)

    def absorb_parts(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Take over what was delivered of the window in flight, on all ranks (see `WeightedWindow.part`)."""
        num = sum(part["num_seen"] for part in parts)
        self.temperature.update(Digest.merged([Digest.from_bytes(part["digest"]) for part in parts]), num)
        self.sums = sum((WeightSums.from_state_dict(part["sums"]) for part in parts), self.sums)
        self.num_seen += num
        self.num_kept += num

    @property
    def mean_weight(self) -> float | None:
        """Mean weight of the windows so far (of their labelled tokens); `None` before the first."""
        return self.sums.token_mean_weight if self.sums.num else None

    def metrics(self) -> dict[str, float]:
        """See `FlowStream.metrics`."""
        sums, cost = self.sums, self.cost
        return {
            "flow/tau": self.tau,
            "flow/tau_error": self.temperature.tau_error(),
            "flow/mean_weight": sums.mean_weight,
            "flow/ess": sums.ess,
            "flow/samples_seen": float(self.num_seen),
            "flow/samples_emitted": float(self.num_emitted),
            "flow/acceptance": self.num_kept / self.num_seen if self.num_seen else math.nan,
            "flow/nonfinite": sums.nonfinite,
            "flow/empty": sums.empty,
            "flow/cache_hit_rate": cost.num_hits / cost.num_lookups if cost.num_lookups else 0.0,
            "flow/score_seconds": self.score_seconds,
            "flow/wait_seconds": self.wait_seconds,
            "flow/padding_fraction": 1 - cost.num_tokens / cost.num_padded if cost.num_padded else 0.0,
            "flow/padded_batches": float(self.num_padded),
            "flow/window_seconds": self.window_seconds,
            **({} if self.rehearsing is None else self.rehearsing.metrics()),
        }

    def fingerprint(self) -> int:
        """A hash of what ranks must have alike before they go on together."""
        counts = (self.num_delivered, self.num_seen, self.num_kept, self.num_batches, self.num_padded)
        told: tuple[object, ...] = (counts, self.sums, self.temperature.tau())
        if self.rehearsing is not None:
            told += self.rehearsing.fingerprint()
        return int.from_bytes(hashlib.blake2b(repr(told).encode(), digest_size=8).digest(), "little")

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors. Times and costs are this process', and stay with it."""
        return {
            "temperature": self.temperature.state_dict(),
            "sums": self.sums.state_dict(),
            "num_seen": self.num_seen,
            "num_kept": self.num_kept,
            "num_batches": self.num_batches,
            "num_padded": self.num_padded,
            **({} if self.rehearsing is None else {"rehearsal": self.rehearsing.state_dict()}),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Go on from `state`. With `strict=False` a τ of another kind begins anew, and is told."""
        try:
            self.temperature.load_state_dict(state["temperature"])
        except ValueError as error:
            if strict:
                raise
            _logger.warning("τ begins anew, from the losses to come: %s", error)
        self.sums = WeightSums.from_state_dict(state["sums"])
        self.num_seen = state["num_seen"]
        self.num_kept = state["num_kept"]
        self.num_batches = state["num_batches"]
        self.num_padded = state["num_padded"]
        if self.rehearsing is not None:
            self.rehearsing.load_state_dict(state.get("rehearsal"), strict=strict)
