"""One seed: every method at every learning rate, then each scoring method again within standard's FLOPs."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import flowstream as fs
from flowstream.compare.analysis import BASELINE, Judged, Place, best_point, judge
from flowstream.compare.feeds import uniform_subset
from flowstream.compare.learner import Learner
from flowstream.compare.pool import Report
from flowstream.compare.results import RunResult, TauWindow
from flowstream.compare.training import Rates, Run, afforded_steps, finetune
from flowstream.demo.evaluation import decode_answers
from flowstream.demo.feeds import METHODS, SCORING, Feeds
from flowstream.demo.offline import OfflineFlow, score_offline
from flowstream.demo.results import ProblemSample
from flowstream.demo.shards import Encoder
from flowstream.demo.task import Task

_NUM_SHOWN = 3
"""Problems shown from each end of difficulty."""


@dataclass(frozen=True, kw_only=True)
class SeedOutcome:
    """Everything that one seed found, in plain values."""

    seed: int
    num_parameters: int
    reference: dict[str, dict[str, float]]
    """Split → the measures of the checkpoint."""
    tau: float
    """The offline median, nats."""
    ess: float
    """ESS/n of the offline weights."""
    losses: tuple[float, ...]
    """The reference's loss of every fine-tuning problem, by its number."""
    runs: tuple[RunResult, ...]
    judged: Judged
    windows: tuple[TauWindow, ...]
    """What the weighted stream told of τ along its way."""
    samples: tuple[ProblemSample, ...]
    """The easiest and the hardest problems, and what standard fine-tuning's chosen model answers to them."""


def run_seed(task: Task, seed: int, report: Report) -> SeedOutcome:
    """Fine-tune by every method with one seed: the same order of problems for all of them."""
    bench = _Bench(task, seed, report)
    settings = task.settings
    for learning_rate, method in settings.grid():
        bench.run("equal_steps", method, learning_rate, settings.steps)
    allowance = max(run.points[-1].flops for run in bench.results if run.method == BASELINE)
    for method in SCORING:
        own = [run for run in bench.results if run.method == method]
        chosen = best_point(own)
        if chosen is None:
            continue
        rates = Rates.of(bench.num_parameters, bench.num_parameters, bench.num_parameters)
        afforded = afforded_steps(bench.runs[chosen[:3]].spent, rates, allowance)
        # Fewer steps by a schedule of its own: to stop a longer run early would compare models at a high learning rate.
        bench.run("equal_flops", method, chosen.learning_rate, afforded)
    judged = judge(
        bench.results,
        lambda place: bench.splits["test"].measure(bench.restore(place)),
        lambda place: bench.splits["test"].answer_accuracy(bench.restore(place), settings.num_decoded),
        methods=METHODS,
        rerun=SCORING,
    )
    offline, standard = bench.feeds.offline, judged.choices["equal_steps"][BASELINE]
    assert standard is not None  # standard fine-tuning is its own budget
    place = Place("equal_steps", BASELINE, standard.learning_rate, standard.step)
    weighted = bench.runs["equal_steps", "weighted", min(settings.learning_rates)]
    return SeedOutcome(
        seed=seed,
        num_parameters=bench.num_parameters,
        reference={name: asdict(split.measure(bench.reference)) for name, split in bench.splits.items()},
        tau=offline.tau,
        ess=offline.effective_fraction,
        losses=tuple(offline.loss.tolist()),
        runs=tuple(bench.results),
        judged=judged,
        windows=weighted.windows,
        samples=_samples(task, offline, bench.restore(place), bench.encoder),
    )


class _Bench:
    """Owns one seed's reference, feeds and finished runs."""

    def __init__(self, task: Task, seed: int, report: Report) -> None:
        settings = task.settings
        torch.manual_seed(seed)
        self.runs: dict[tuple[str, str, float], Run] = {}
        self.results: list[RunResult] = []
        self.snapshots: dict[Place, dict[str, Tensor]] = {}
        self.encoder = task.encoder()
        self.splits = task.splits(self.encoder)
        self.reference = task.model().eval()
        self.num_parameters = sum(parameter.numel() for parameter in self.reference.parameters())
        self.feeds = Feeds(
            shards=task.shards,
            encoder=self.encoder,
            lengths=[len(self.encoder.encode(problem.question, problem.worked).ids) for problem in task.problems],
            batch=settings.batch,
            seed=seed,
            scorer=fs.CausalLMScorer(self.reference),
            window=settings.window,
            warmup_samples=settings.warmup_samples,
            offline=score_offline(self.reference, task.loader(self.encoder, seed), len(task.problems)),
        )
        self._task, self._seed, self._report = task, seed, report

    def run(self, budget: str, method: str, learning_rate: float, steps: int) -> None:
        """One run from the checkpoint; none of less than a step."""
        settings = self._task.settings
        if steps >= 1:
            subset = None
            if method == "subsampled":
                num_kept = self.runs[budget, "resampled", learning_rate].num_samples
                subset = uniform_subset(len(self._task.problems), num_kept, self._seed)
            with self.feeds.open(method, subset) as feed:
                run = finetune(
                    Learner(self.reference, seed=self._seed),
                    feed,
                    learning_rate=learning_rate,
                    steps=steps,
                    measured_at=settings.measured_steps | {steps},
                    measure=self.splits["validation"].measure,
                    keep=lambda step, state: self.snapshots.update({Place(budget, method, learning_rate, step): state}),
                    trace_every=settings.window,
                )
            self.runs[budget, method, learning_rate] = run
            self.results.append(
                run.result(
                    seed=self._seed,
                    budget=budget,
                    method=method,
                    learning_rate=learning_rate,
                    num_reference=self.num_parameters,
                )
            )
        self._report(f"seed {self._seed}: {METHODS[method]}, {learning_rate:.2g}")

    def restore(self, place: Place) -> LlamaForCausalLM:
        """The model as it stood at a point."""
        model = self._task.model()
        model.load_state_dict(self.snapshots[place])
        return model


def _samples(task: Task, offline: OfflineFlow, model: LlamaForCausalLM, encoder: Encoder) -> tuple[ProblemSample, ...]:
    order = offline.loss.argsort().tolist()
    shown = order[:_NUM_SHOWN] + order[-_NUM_SHOWN:]
    problems = [task.problems[number] for number in shown]
    decoded = decode_answers(model, encoder, [problem.question for problem in problems])
    return tuple(
        ProblemSample(
            level=problem.level,
            question=problem.question,
            worked=problem.worked,
            loss=float(offline.loss[number]),
            weight=float(offline.weight[number]),
            decoded=answer,
        )
        for number, problem, answer in zip(shown, problems, decoded, strict=True)
    )
