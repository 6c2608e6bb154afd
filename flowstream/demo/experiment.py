"""The runs: pre-train once, then fine-tune by every method, at every learning rate, for every seed."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise, product
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

import flowstream as fs
from flowstream.demo.analysis import Judged, Place, judge
from flowstream.demo.evaluation import EvaluationSplit, decode_answers
from flowstream.demo.feeds import BASELINE, METHODS, Feeds, uniform_subset
from flowstream.demo.offline import OfflineFlow, score_offline
from flowstream.demo.pretraining import ModelSize
from flowstream.demo.problems import Problem
from flowstream.demo.results import PointResult, ProblemSample, RunResult, TauWindow
from flowstream.demo.shards import Encoder, open_shards
from flowstream.demo.training import Run, finetune

_NUM_SHOWN = 3
"""Problems shown from each end of difficulty."""

Report = Callable[[str], None]
"""Told of every run that is done."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the experiment is, apart from its seeds."""

    model: ModelSize = field(default_factory=ModelSize)
    max_train_chars: int | None = None
    """Bound on the pre-training text."""
    num_problems: int = 2048
    num_shards: int = 8
    num_validation: int = 64
    num_test: int = 256
    num_text_chunks: int = 40
    """Chunks of held-out text on the validation split; twice as many on the test split."""
    learning_rates: tuple[float, ...] = (1.25e-4, 2.5e-4, 5e-4)
    """Every method runs at each of them; standard fine-tuning also half-way between, so that its curve is dense."""
    batch: int = 8
    steps: int = 96
    measured_at: tuple[float, ...] = (0.125, 0.25, 0.5, 0.7, 1.0)
    """Shares of the steps after which a run is measured; .5 and .7 are near what resampling and weighting can afford
    of standard's FLOPs."""
    window: int = 8
    """Batches in a window of the stream."""
    warmup_samples: int = 256
    num_decoded: int = 64
    """Test problems whose answers are decoded for the answer accuracy."""
    max_processes: int = 8
    """Seeds run side by side, one process each, as far as cores reach."""

    def runs(self) -> Iterator[tuple[float, str]]:
        """Learning rate and method of every run of a seed, in order."""
        rates = sorted(self.learning_rates)
        yield from product(rates, METHODS)
        yield from ((math.sqrt(low * high), BASELINE) for low, high in pairwise(rates))

    @property
    def measured_steps(self) -> frozenset[int]:
        """The steps after which a run is measured."""
        return frozenset(max(1, round(share * self.steps)) for share in self.measured_at)


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that the seeds share: a checkpoint, fine-tuning shards, and the text and problems to measure on."""

    settings: Settings
    checkpoint: Path
    shards: tuple[Path, ...]
    problems: tuple[Problem, ...]
    """The fine-tuning set; a problem's number is its place."""
    validation: tuple[Problem, ...]
    test: tuple[Problem, ...]
    validation_text: list[list[int]]
    """Chunks of held-out text as tokens; lists, since tensors do not travel between processes as lightly."""
    test_text: list[list[int]]

    def encoder(self) -> Encoder:
        """The checkpoint's tokenizer."""
        return Encoder(AutoTokenizer.from_pretrained(self.checkpoint))

    def model(self) -> LlamaForCausalLM:
        """A fresh copy of the checkpoint."""
        model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(self.checkpoint)
        return model

    def loader(self, encoder: Encoder, seed: int) -> Iterable[dict[str, Tensor]]:
        """The fine-tuning set in the order of a seed."""
        return open_shards(self.shards, encoder, batch=self.settings.batch, seed=seed)

    def splits(self, encoder: Encoder) -> dict[str, EvaluationSplit]:
        """What to measure on."""
        return {
            "validation": EvaluationSplit(self.validation, self.validation_text, encoder),
            "test": EvaluationSplit(self.test, self.test_text, encoder),
        }


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
    """Fine-tune by every method at every learning rate with one seed: the same order of problems for all of them."""
    settings = task.settings
    torch.manual_seed(seed)
    encoder = task.encoder()
    splits = task.splits(encoder)
    reference = task.model().eval()
    num_parameters = sum(parameter.numel() for parameter in reference.parameters())
    feeds = Feeds(
        shards=task.shards,
        encoder=encoder,
        lengths=[len(encoder.encode(problem.question, problem.worked).ids) for problem in task.problems],
        batch=settings.batch,
        seed=seed,
        scorer=fs.CausalLMScorer(reference),
        window=settings.window,
        warmup_samples=settings.warmup_samples,
        offline=score_offline(reference, task.loader(encoder, seed), len(task.problems)),
    )
    runs: dict[tuple[str, float], Run] = {}
    for learning_rate, method in settings.runs():
        subset = None
        if method == "subsampled":
            num_kept = runs["resampled", learning_rate].num_samples
            subset = uniform_subset(len(task.problems), num_kept, seed)
        with feeds.open(method, subset) as feed:
            runs[method, learning_rate] = finetune(
                task.checkpoint,
                feed,
                learning_rate=learning_rate,
                steps=settings.steps,
                measured_at=settings.measured_steps,
                measure=splits["validation"].measure,
                trace_every=settings.window,
            )
        report(f"seed {seed}: {METHODS[method]}, {learning_rate:.2g}")

    def restore(place: Place) -> LlamaForCausalLM:
        method, learning_rate, step = place
        model = task.model()
        model.load_state_dict(runs[method, learning_rate].snapshots[step])
        return model

    results = [_result(seed, method, rate, run, num_parameters) for (method, rate), run in runs.items()]
    judged = judge(
        results,
        lambda place: splits["test"].measure(restore(place)),
        lambda place: splits["test"].answer_accuracy(restore(place), settings.num_decoded),
    )
    offline, chosen = feeds.offline, judged.choices["equal_steps"][BASELINE]
    assert chosen is not None  # every point of a run fits its own steps
    return SeedOutcome(
        seed=seed,
        num_parameters=num_parameters,
        reference={name: asdict(split.measure(reference)) for name, split in splits.items()},
        tau=offline.tau,
        ess=offline.effective_fraction,
        losses=tuple(offline.loss.tolist()),
        runs=tuple(results),
        judged=judged,
        windows=runs["weighted", min(settings.learning_rates)].windows,
        samples=_samples(task, offline, restore((BASELINE, chosen.learning_rate, chosen.step)), encoder),
    )


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


def _result(seed: int, method: str, learning_rate: float, run: Run, num_parameters: int) -> RunResult:
    points = tuple(
        PointResult(
            step=point.step,
            target_loss=point.validation.target_loss,
            exact_match=point.validation.exact_match,
            retained_loss=point.validation.retained_loss,
            train_tokens=point.train_tokens,
            score_tokens=point.score_tokens,
            flops=num_parameters * (6.0 * point.train_tokens + 2.0 * point.score_tokens),
        )
        for point in run.points
    )
    return RunResult(
        seed=seed,
        method=method,
        learning_rate=learning_rate,
        points=points,
        num_samples=run.num_samples,
        seconds=run.seconds,
        score_seconds=run.score_seconds,
        acceptance=run.acceptance,
    )
