"""One seed: every method at every learning rate, then those of another cost again within standard's FLOPs, judged."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import flowstream as fs
from flowstream.companions.wise_ft import interpolate
from flowstream.compare.analysis import BASELINE, Judged, Place, best_of, best_point, corners_of, judge, points_of
from flowstream.compare.cells import Cell, CellStore
from flowstream.compare.evaluation import Measures
from flowstream.compare.feeds import Feeds, uniform_subset
from flowstream.compare.learner import Learner
from flowstream.compare.material import Material
from flowstream.compare.methods import WISE, Method, parse_methods, trained
from flowstream.compare.pool import Report
from flowstream.compare.reference import Reference, load_reference
from flowstream.compare.results import RunResult
from flowstream.compare.settings import Settings
from flowstream.compare.training import Rates, afforded_steps, finetune, spending
from flowstream.finetune.quiet import quiet


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that the seeds share, in plain values: tensors do not travel between processes as lightly."""

    settings: Settings
    material: Path
    losses: Path
    """The reference's losses of the samples to learn, found by every stream: scored once, charged to every run."""
    reference: Reference

    @cached_property
    def methods(self) -> tuple[Method, ...]:
        return parse_methods(self.settings.methods)

    def grid(self) -> list[Cell]:
        """The cells of a seed that are trained at equal steps, in order."""
        cells = [
            Cell(budget="equal_steps", method=method.name, learning_rate=rate, strength=strength)
            for method in trained(self.methods)
            for rate in self.settings.learning_rates
            for strength in method.strengths(self.settings)
        ]
        dense = [Cell(budget="equal_steps", method=BASELINE, learning_rate=rate) for rate in self.settings.dense_rates]
        return cells + dense

    def rerun(self) -> tuple[Method, ...]:
        """The methods that are trained anew at equal FLOPs."""
        if "equal_flops" not in self.settings.budget_names:
            return ()
        return tuple(method for method in trained(self.methods) if method.costs_otherwise)


@dataclass(frozen=True, kw_only=True)
class SeedOutcome:
    """Everything that one seed found, in plain values."""

    seed: int
    runs: tuple[RunResult, ...]
    judged: Judged
    num_kept: int
    """Cells that were finished before, and not trained again."""
    num_cells: int


@quiet()
def run_seed(plan: Plan, seed: int, report: Report) -> SeedOutcome:
    """Train what is not yet there, choose on validation, measure the choices on the test split."""
    with CellStore(plan.settings.out / f"seed-{seed}") as store:
        bench = _Bench(plan, seed, store, report)
        for cell in plan.grid():
            bench.at_equal_steps(cell)
        for method in plan.rerun():
            bench.at_equal_flops(method)
        judged = judge(
            bench.results,
            bench.on_test,
            methods=[method.name for method in plan.methods],
            rerun=[method.name for method in plan.methods if method.costs_otherwise],
            budgets=plan.settings.budget_names,
        )
        store.judged(bench.tested)
    return SeedOutcome(
        seed=seed, runs=tuple(bench.results), judged=judged, num_kept=bench.num_kept, num_cells=bench.num_cells
    )


class _Bench:
    """Owns one seed's reference, feeds and finished cells."""

    def __init__(self, plan: Plan, seed: int, store: CellStore, report: Report) -> None:
        self._plan, self._settings, self._seed, self._report = plan, plan.settings, seed, report
        self._store = store
        self.tested: dict[Place, Measures] = store.tested()
        self.results: list[RunResult] = []
        self.num_kept = self.num_cells = 0
        self._kept: set[tuple[Cell, int]] = set()

    def at_equal_steps(self, cell: Cell) -> None:
        """A cell of the grid."""
        self._cell(cell, self._settings.steps)

    def at_equal_flops(self, method: Method) -> None:
        """A method once more, at the learning rate that validation has chosen, for the steps that it can afford.

        By a schedule of its own: to stop a longer run early would compare models at a high learning rate.
        """
        own = [run for run in self.results if run.method == method.name]
        chosen = best_point(own)
        if chosen is None:  # all diverged
            return
        cell = replace(Cell.of(chosen), budget="equal_flops")
        if (found := self._store.result(cell)) is not None:
            self._cell(cell, found.points[-1].step)
            return
        allowance = max(run.points[-1].flops for run in self.results if run.method == BASELINE)
        rates = Rates.of(own[0].num_parameters, own[0].num_trained, self._plan.reference.num_parameters)
        with self._feeds.open(method.feed, self._subset(method)) as feed:
            steps = afforded_steps(spending(feed), rates, allowance)
        if steps:
            self._cell(cell, steps)

    def on_test(self, place: Place) -> Measures:
        """The test split's measures of a point."""
        if place not in self.tested:
            self.tested[place] = self._test.measure(self._restored(place))
        return self.tested[place]

    def _cell(self, cell: Cell, steps: int) -> None:
        """A cell, and those of the models between the reference and its points."""
        method = Method.parse(cell.method)
        self.num_cells += 1
        wise = replace(method, companions=(*method.companions, WISE))
        is_between = wise in self._plan.methods and cell.learning_rate in self._settings.learning_rates
        between = replace(cell, method=wise.name)
        interpolated = self._store.result(between) if is_between else None
        result = self._store.result(cell)
        is_removed = is_between and interpolated is None  # or not yet finished: then the parameters are there
        if result is None or (
            is_removed and not self._store.has_parameters(cell, [point.step for point in result.points])
        ):
            result = self._train(method, cell, steps)
            self._store.finish(cell, result)
        else:
            self.num_kept += 1
        self.results.append(result)
        self._kept |= {(cell, point.step) for point in result.points}
        if is_between:
            if interpolated is None:
                interpolated = self._interpolate(cell, between, result)
                self._store.finish(between, interpolated)
            self.results.append(interpolated)
        # Of those seen so far: when a comparison goes on, more cells may be finished than have been looked at.
        self._store.let_go(self._kept - (needed := self._needed()))
        self._kept &= needed
        self._report(f"seed {self._seed}: {cell.method}, {cell.learning_rate:.2g}")

    def _train(self, method: Method, cell: Cell, steps: int) -> RunResult:
        torch.manual_seed(self._seed)  # of adapters and dropout: a cell does not depend on those before it
        learner = Learner(self._reference, seed=self._seed)
        method.equip(learner, self._settings, cell.strength)
        with self._feeds.open(method.feed, self._subset(method)) as feed:
            run = finetune(
                learner,
                feed,
                learning_rate=cell.learning_rate,
                steps=steps,
                measured_at=self._settings.measured_steps(steps),
                measure=self._validation.measure,
                keep=lambda step, state: self._store.keep(cell, step, state),
                trace_every=self._settings.window,
                max_grad_norm=self._settings.max_grad_norm,
            )
        return run.result(
            seed=self._seed,
            budget=cell.budget,
            method=cell.method,
            learning_rate=cell.learning_rate,
            num_reference=self._plan.reference.num_parameters,
            strength=cell.strength,
        )

    def _interpolate(self, cell: Cell, between: Cell, result: RunResult) -> RunResult:
        """Of all points of a run, the models between; nothing more is trained, so that they cost what the run cost."""
        points = []
        for point in result.points:
            for alpha in self._settings.interpolations:
                place = Place(cell.budget, between.method, cell.learning_rate, point.step, cell.strength, alpha)
                measures = self._validation.measure(self._restored(place))
                points.append(
                    replace(
                        point,
                        alpha=alpha,
                        target_loss=measures.target_loss,
                        exact_match=measures.exact_match,
                        retained_loss=measures.retained_loss,
                        distance=alpha * point.distance,
                    )
                )
        return replace(result, method=between.method, points=tuple(points))

    def _restored(self, place: Place) -> Any:
        """The model as it stood at a point. It is overwritten by the next."""
        base = Cell.of(place) if place.alpha is None else replace(Cell.of(place), method=_base(place.method))
        self._tuned.load_state_dict(self._store.parameters(base, place.step))
        if place.alpha is None:
            return self._tuned
        return interpolate(self._reference, self._tuned, place.alpha, into=self._tuned)

    def _needed(self) -> set[tuple[Cell, int]]:
        """Whose parameters validation may yet choose."""
        places = set(corners_of(points_of(self.results, "equal_steps", BASELINE)))
        for budget, name in {(run.budget, run.method) for run in self.results}:
            if found := points_of(self.results, budget, name):
                places.add(best_of(found))
        return {
            (replace(Cell.of(place), method=_base(place.method)), place.step)
            for place in places
            if place not in self.tested
        }

    def _subset(self, method: Method) -> frozenset[int] | None:
        """Of a subsample, as many samples as resampling keeps of a pass."""
        if method.feed != "subsample":
            return None
        num_samples = len(self._material.train)
        num_kept = max(self._settings.batch_size, round(self._plan.reference.mean_weight * num_samples))
        return uniform_subset(num_samples, num_kept, self._seed)

    @cached_property
    def _material(self) -> Material:
        return Material.load(self._plan.material)

    @cached_property
    def _validation(self) -> Any:
        return self._material.split("validation")

    @cached_property
    def _test(self) -> Any:
        return self._material.split("test")

    @cached_property
    def _reference(self) -> Any:
        return load_reference(self._material.model)

    @cached_property
    def _tuned(self) -> Any:
        return copy.deepcopy(self._reference)

    @cached_property
    def _feeds(self) -> Feeds:
        return Feeds(
            open_loader=lambda subset: self._material.loader(
                batch_size=self._settings.batch_size, seed=self._seed, only=subset
            ),
            lengths=self._material.train.lengths.tolist(),
            seed=self._seed,
            scorer=fs.CausalLMScorer(self._reference),
            window=self._settings.window,
            warmup_samples=self._settings.warmup_samples,
            cache=self._plan.losses,
        )


def _base(method: str) -> str:
    return Method.parse(method).base.name


def num_cells(plan: Plan, seeds: Sequence[int]) -> int:
    """At most so many are trained."""
    return len(seeds) * (len(plan.grid()) + len(plan.rerun()))
