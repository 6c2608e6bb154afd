"""A window in delivery with rehearsed batches between the loader's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowstream.batch import device_of, fields, moved
from flowstream.delivery import Delivery, denominator_of, in_order, step_counts
from flowstream.distributed.message import MAX_STEPS, Agreed, Phase
from flowstream.making import Contents, Recipe, Window
from flowstream.numerics import own_numerics
from flowstream.recollate import cost_of
from flowstream.rehearsal.rehearsing import Rehearsing
from flowstream.scoring.base import Scores
from flowstream.weighing import flatten, num_labelled, place


class Mixed:
    """The deliveries of a window that is agreed upon, with rehearsed batches between them.

    These are collated when they are delivered; or at once, where the labels of a step must be known ahead.
    """

    @own_numerics()
    def __init__(self, window: Window, agreed: Agreed, rehearsing: Rehearsing, recipe: Recipe, position: int) -> None:
        contents = window.contents()
        model = contents.model if contents.model is not None else recipe.filling.model
        has_denominator = "denominator" in recipe.settings.include
        self.terms = window.terms
        self.plan = plan = rehearsing.plan(
            agreed,
            contents.costs,
            0 if model is None else cost_of(model),
            (window.terms.epoch, window.terms.number),
            MAX_STEPS * recipe.settings.accumulate if has_denominator else None,
        )
        self.window = window
        self._rehearsing = rehearsing
        self._recipe = recipe
        self._names = None if model is None else set(fields(model))
        self._device = torch.device("cpu") if model is None else device_of(model)
        self._collated: dict[int, tuple[Any, Scores]] = {}
        self._within = _within(plan.order)
        self.agreed = self._with_counts(agreed, contents, position) if has_denominator and plan.order else agreed
        """… and the labels of each step, with the rehearsed ones."""

    @property
    def num_deliveries(self) -> int:
        return len(self.plan.order)

    @own_numerics()
    def deliver(self, position: int) -> Any:
        """The batch at `position`, complete."""
        number = self._within[position]
        if not self.plan.order[position]:
            return self.window.deliver(number)
        batch, score = self._collate(number)
        settings = self._recipe.settings
        samples = torch.tensor(self.plan.groups[number])
        weight = _placed(torch.full((len(samples),), self._rehearsing.spec.weight), score, settings.level)
        loss = torch.from_numpy(self._rehearsing.prior.loss[samples.numpy()])
        marked = place(samples + 1, score, "sample") - 1  # -1 between documents
        available = {
            "flow_loss": _placed(loss, score, settings.level),
            "flow_tau": torch.tensor(self.window.tau),
            "flow_index": torch.full((len(marked),), -1),
            "flow_weight": weight,
        }
        if "denominator" in settings.include:
            available["flow_denominator"] = denominator_of(position, replace(self.agreed, steps=()), settings)
        is_weighted = settings.sampler is None
        extras = in_order({k: v for k, v in available.items() if not is_weighted or k != "flow_weight"}, settings)
        done = Delivery(batch, weight if is_weighted else None, extras, marked).complete(settings)
        self._collated.pop(number, None)
        return done

    def take_over(self) -> None:
        """The window goes into delivery, or has nothing to deliver: what was planned counts."""
        self._rehearsing.take_over(self.plan)
        if self.plan.order:
            self._rehearsing.ledger.prune(self.plan.number)

    def note(self, position: int) -> None:
        """The batch at `position` is delivered."""
        ledger, is_rehearsed = self._rehearsing.ledger, self.plan.order[position]
        ledger.delivered[is_rehearsed] += self.plan.costs[position]
        if is_rehearsed:
            ledger.note(self.plan.number, self.plan.groups[self._within[position]])

    def num_samples_at(self, position: int) -> int:
        """Of the loader's samples."""
        return 0 if self.plan.order[position] else self.window.num_samples_at(self._within[position])

    def num_own(self, position: int) -> int:
        """The loader's batches among the first deliveries."""
        return position - sum(self.plan.order[:position])

    def _collate(self, number: int) -> tuple[Any, Scores]:
        """A rehearsed batch, and what it looks like to a scorer."""
        if number in self._collated:
            return self._collated[number]
        spec, group = self._rehearsing.spec, self.plan.groups[number]
        batch = spec.collate_fn([spec.prior[i] for i in group])
        names = set(fields(batch))
        if self._names is not None and names != self._names:
            name = sorted(names ^ self._names, key=str)[0]
            has, lacks = ("prior", "loader's") if name in names else ("loader's", "prior")
            raise ValueError(
                f"the {has} batches have the field {name!r}, and the {lacks} have not: let collate_fn make prior "
                "batches with the fields of the loader's"
            )
        (score,) = self._recipe.scorer.begin([batch], level=self._recipe.settings.level, needs_loss=False).finish()
        if len(score.loss) != len(group):
            raise ValueError(
                f"collate_fn made {len(score.loss)} samples of {len(group)} prior ones: rehearsal needs a row, or a "
                "packed document, for each"
            )
        return moved(batch, self._device), score

    def _with_counts(self, agreed: Agreed, contents: Contents, position: int) -> Agreed:
        """The labels of each step over all ranks: they meet once more, since none knew what the others would draw."""
        meetings, settings, order = self._recipe.meetings, self._recipe.settings, self.plan.order
        meeting = replace(self.terms.place(position), phase=Phase.REHEARSED)

        def build() -> Any:
            own = [*contents.labelled, *[0] * len(order)]
            labelled = []
            for is_rehearsed, number in zip(order, self._within, strict=True):
                if is_rehearsed:
                    self._collated[number] = self._collate(number)
                    labelled.append(num_labelled(self._collated[number][1]))
                else:
                    labelled.append(own[number])
            return replace(meeting, counts=step_counts(labelled, settings))

        messages = meetings.meet(meeting, build)
        counts = tuple(sum(column) for column in zip(*(message.counts for message in messages), strict=True))
        steps = tuple(i // settings.accumulate for i, is_rehearsed in enumerate(order) if not is_rehearsed)
        return replace(agreed, counts=counts, steps=steps)


def _within(order: list[bool]) -> list[int]:
    """Of each delivery, its number among those of its kind."""
    count = [0, 0]
    numbers = []
    for is_rehearsed in order:
        numbers.append(count[is_rehearsed])
        count[is_rehearsed] += 1
    return numbers


def _placed(values: Tensor, score: Scores, level: Any) -> Tensor:
    """One value a sample where the loss function reads weights; 0 where nothing is labelled."""
    flat = flatten([score], level)
    return place(torch.where(flat.labelled, values[flat.sample], 0.0), score, level)
