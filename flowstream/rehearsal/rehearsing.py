"""Rehearsal under way: what was learned of damage, what is owed, and the plan of each window that follows from it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowstream.distributed.meetings import Meetings
from flowstream.distributed.message import Agreed
from flowstream.distributed.world import World
from flowstream.rehearsal.damage import Damage
from flowstream.rehearsal.draws import Draws
from flowstream.rehearsal.ledger import Ledger
from flowstream.rehearsal.marks import labels_of, marks_of, samples_in
from flowstream.rehearsal.planning import Plan, plan
from flowstream.rehearsal.prior import Prior, prepared
from flowstream.rehearsal.settled import Settled, settled_from
from flowstream.rehearsal.spec import Rehearsal

_logger = logging.getLogger("flowstream")

_NO_FEEDBACK = (
    "a whole window's rehearsed samples went by without feedback: the rates of damage stay what they were, and samples "
    "are drawn as at the beginning. Call stream.feedback(batch, …) for each rehearsed batch, or take "
    "Rehearsal(…, strategy='random')"
)

_TOO_EARLY = "nothing is rehearsed before the stream's first next(), and nothing is known of the prior data"


class Rehearsing:
    """Owns a stream's rehearsal, on this rank. Windows are planned, and the plans taken over, in their order."""

    def __init__(self, spec: Rehearsal, world: World, *, accumulate: int = 1) -> None:
        self.spec = spec
        self._world = world
        self._accumulate = accumulate
        self._prior: Prior | None = None
        self._draws: Draws | None = None
        self._settled: Settled | None = None
        self._ledger: Ledger | None = None
        self._is_strict = True
        self._told = False

    def prepare(self, meetings: Meetings) -> None:
        """Ask the prior model, once, and have the ranks count damage from now on: a collective."""
        if self._prior is not None:
            return
        prior = prepared(self.spec, meetings)
        bins = prior.bins
        self._check(bins.fingerprint)
        num = len(bins.members)
        if self._settled is None or self._ledger is None:
            nothing = Damage.unknown(num, self.spec.prior_counts, self.spec.half_life)
            self._settled = Settled(bins=bins.fingerprint, damage=nothing, cursors=(0,) * num)
            self._ledger = Ledger(num)
        self._prior = prior
        self._draws = Draws(bins, seed=self.spec.seed, rank=self._world.rank, world_size=self._world.world_size)
        meetings.count_tallies(2 * num + 2)

    @property
    def prior(self) -> Prior:
        """The prior data. `ValueError` before the stream's first `next()`."""
        if self._prior is None:
            raise ValueError(_TOO_EARLY)
        return self._prior

    @property
    def settled(self) -> Settled:
        if self._settled is None:
            raise ValueError(_TOO_EARLY)
        return self._settled

    @property
    def ledger(self) -> Ledger:
        if self._ledger is None:
            raise ValueError(_TOO_EARLY)
        return self._ledger

    # -- for the user ------------------------------------------------------------------------------

    def rates(self) -> NDArray[np.float64]:
        """[K] estimated rates of damage, over all ranks, as of the window in delivery."""
        return self.settled.damage.rates

    def counts(self) -> NDArray[np.float64]:
        """[K] samples that each rate rests on; older ones count less."""
        return np.array(self.settled.damage.num)

    @property
    def names(self) -> tuple[str, ...]:
        """[K] what each bin is."""
        return self.prior.bins.names

    @property
    def sizes(self) -> NDArray[np.int64]:
        """[K] prior samples in each bin."""
        return self.prior.bins.sizes

    def metrics(self) -> dict[str, float]:
        """`flow/rehearsed_fraction`: of the compute of what this rank delivered; `flow/damage_rate`: of all bins."""
        fraction = rate = math.nan
        if self._ledger is not None:
            new, rehearsed = self._ledger.delivered
            fraction = rehearsed / (new + rehearsed) if new + rehearsed else math.nan
        if self._prior is not None and self.spec.strategy == "mix-cd":
            sizes = self.sizes
            rate = float((self.rates() * sizes).sum() / sizes.sum())
        return {"flow/rehearsed_fraction": fraction, "flow/damage_rate": rate}

    def feedback(self, batch: Any, correct: Any | None, *, logits: Tensor | None, labels: Tensor | None) -> None:
        """See `FlowStream.feedback`."""
        marked = marks_of(batch)
        samples = samples_in(marked)
        if not samples:
            return
        if (correct is None) == (logits is None):
            raise ValueError("feedback takes either `correct`, one bool a rehearsed sample, or `logits` with `labels`")
        if logits is not None:
            right = self._judged(logits, labels_of(batch) if labels is None else labels, marked, samples)
        else:
            right = _tensor(correct, "correct", "bools").detach().cpu()
            if right.shape != (len(samples),):
                raise ValueError(
                    f"correct has shape {list(right.shape)} for {len(samples)} rehearsed samples: give one bool each, "
                    f"[{len(samples)}]"
                )
            if not bool(((right == 0) | (right == 1)).all()):
                raise ValueError(f"correct holds {right[(right != 0) & (right != 1)][0]:g}: give bools, or 0 and 1")
        self.ledger.settle(samples)
        if self.spec.strategy == "random":
            return
        num = len(self.settled.cursors)
        for sample, is_right in zip(samples, right.bool().tolist(), strict=True):
            k = int(self.prior.bins.of[sample])
            self.ledger.pending[k] += 1
            self.ledger.pending[num + k] += bool(self.prior.was_correct[sample]) and not is_right

    def _judged(self, logits: Any, labels: Any, marked: Tensor, samples: Sequence[int]) -> Tensor:
        if labels is None:
            raise ValueError("feedback from logits needs the batch's labels: feedback(batch, logits=…, labels=…)")
        spec = self.spec
        if spec.strategy == "mix-cd" and spec.reads_tokens and spec.reference is None:
            raise ValueError(
                f"a {type(spec.scorer).__name__} has no model that tells whether the label at t is predicted at t or "
                f"at t - 1, which {spec.criterion!r} must know: give `correct` in place of logits, or Rehearsal a "
                "function as criterion"
            )
        logits, labels = _tensor(logits, "logits", "a tensor"), _tensor(labels, "labels", "a tensor")
        if marked.ndim == 1:
            if len(labels) != len(marked):
                raise ValueError(f"labels have {len(labels)} rows, and the rehearsed batch {len(marked)}")
            return self.spec.judge.right(logits, labels)
        number = {sample: i for i, sample in enumerate(samples)}
        owner = torch.tensor([number.get(sample, -1) for sample in marked.flatten().tolist()]).view(marked.shape)
        return self.spec.judge.right(logits, labels, owner, len(samples))

    # -- for the epoch -----------------------------------------------------------------------------

    def tell(self, costs: Sequence[int]) -> tuple[int, ...]:
        """What this rank brings to the next window's meeting. `costs`: of the batches that it has for it."""
        settled = self.settled
        return (
            *self.ledger.tell(settled.num_agreed),
            sum(costs) - settled.over_told,
            settled.untold_cost,
        )

    def plan(self, agreed: Agreed, costs: Sequence[int], room: int, place: tuple[int, int], limit: int | None) -> Plan:
        """The next window, with what is rehearsed in it (see `planning.plan`). Changes nothing."""
        assert self._draws is not None
        return plan(
            self.settled,
            agreed,
            self.prior,
            self._draws,
            ratio=self.spec.ratio,
            accumulate=self._accumulate,
            costs=costs,
            room=room,
            place=place,
            limit=limit,
        )

    def take_over(self, plan: Plan) -> None:
        """The plan's window is agreed upon."""
        self._settled = plan.after
        if self.ledger.is_neglected(plan.number) and self.spec.strategy == "mix-cd" and not self._told:
            self._told = True
            if self._world.speaks:
                _logger.warning(_NO_FEEDBACK)

    def begin(self) -> None:
        """An epoch begins, not from a state."""
        self.ledger.reclaim(self.settled.num_agreed)

    # -- state -------------------------------------------------------------------------------------

    def fingerprint(self) -> tuple[object, ...]:
        """What all ranks must have alike."""
        now = self.settled
        return (now.bins, now.damage, now.num_agreed, now.new_cost, now.rehearsed_cost, now.num_rehearsed)

    def state_dict(self) -> dict[str, Any] | None:
        """What was settled, plain values; `None` before anything was. The ledger's state is its own."""
        return None if self._settled is None else asdict(self._settled)

    def load_state_dict(self, state: Mapping[str, Any] | None, *, strict: bool = True) -> None:
        """Go on from what was settled."""
        if state is None:
            return
        self._is_strict = strict
        self._settled = settled_from(state)
        if strict and (known := self.spec.measured.get("prior")) is not None:
            self._check(known.bins.fingerprint)

    def ledger_state(self) -> dict[str, Any] | None:
        return None if self._ledger is None else self._ledger.state_dict()

    def load_ledger(self, state: Mapping[str, Any] | None) -> None:
        if state is not None:
            self._ledger = Ledger.from_state_dict(state)

    def _check(self, bins: str) -> None:
        """Whether what was learned is of these bins. Else `ValueError`, or it is forgotten."""
        if self._settled is None or self._settled.bins == bins:
            return
        if self._is_strict:
            raise ValueError(
                f"the state is of a rehearsal with {self._settled.bins}, this one has {bins}: rehearse the same prior "
                "data with the same bins and prior model, or load_state_dict(state, strict=False)"
            )
        _logger.warning("rates of damage begin anew: the state's bins (%s) are others", self._settled.bins)
        self._settled = self._ledger = None

    def take_part(self) -> None:
        """What was put together of all ranks' states, for this one."""
        if self._settled is None or self._ledger is None:
            return
        world = self._world
        self._settled = replace(
            self._settled,
            cursors=tuple(-(-cursor // world.world_size) for cursor in self._settled.cursors),
            untold_cost=world.part_of(self._settled.untold_cost),
            over_told=world.part_of(self._settled.over_told),
        )
        state = self._ledger.state_dict()
        state["pending"] = [world.part_of(count) for count in state["pending"]]
        state["told"] = {key: [world.part_of(count) for count in tally] for key, tally in state["told"].items()}
        state["delivered"] = [world.part_of(cost) for cost in state["delivered"]]
        self._ledger = Ledger.from_state_dict(state)


def _tensor(value: Any, name: str, wanted: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is a {type(value).__name__} that no tensor can be made of: give {wanted}") from None
