"""The one fine-tuning loop: AdamW, warm-up and cosine, clipping, the learner's loss; measured along the way."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowstream.compare.evaluation import Measures
from flowstream.compare.feeds import Feed
from flowstream.compare.learner import Learner
from flowstream.compare.results import PointResult, RunResult, TauWindow


@dataclass(frozen=True)
class Spent:
    """What a run has cost by some step."""

    train_tokens: int
    score_tokens: int
    """Tokens that the reference has scored, each sample counted once."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """FLOPs a token. Training: forward 2N, backward through activations 2N, gradients 2 a trained parameter."""

    train: float
    score: float
    """2N."""

    @classmethod
    def of(cls, num_parameters: int, num_trained: int, num_reference: int) -> "Rates":
        return cls(train=4.0 * num_parameters + 2.0 * num_trained, score=2.0 * num_reference)

    def flops(self, spent: Spent) -> float:
        """Of all that was spent."""
        return self.train * spent.train_tokens + self.score * spent.score_tokens


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run as it stood after some steps."""

    step: int
    validation: Measures
    spent: Spent
    distance: float
    """‖Δθ‖₂ over all parameters."""
    clip_rate: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """One method at one learning rate, from the checkpoint to the last step."""

    points: tuple[Point, ...]
    windows: tuple[TauWindow, ...]
    spent: tuple[Spent, ...]
    """After each step."""
    num_samples: int
    """Distinct samples trained on."""
    num_parameters: int
    num_trained: int
    seconds: float
    """Wall time without the evaluations."""
    score_seconds: float
    acceptance: float

    def result(
        self,
        *,
        seed: int,
        budget: str,
        method: str,
        learning_rate: float,
        num_reference: int,
        strength: float | None = None,
    ) -> RunResult:
        """In plain values; scoring is charged for a reference of so many parameters."""
        rates = Rates.of(self.num_parameters, self.num_trained, num_reference)
        return RunResult(
            seed=seed,
            budget=budget,
            method=method,
            learning_rate=learning_rate,
            strength=strength,
            points=tuple(
                PointResult(
                    step=point.step,
                    target_loss=point.validation.target_loss,
                    exact_match=point.validation.exact_match,
                    retained_loss=point.validation.retained_loss,
                    train_tokens=point.spent.train_tokens,
                    score_tokens=point.spent.score_tokens,
                    flops=rates.flops(point.spent),
                    distance=point.distance,
                    clip_rate=point.clip_rate,
                )
                for point in self.points
            ),
            num_samples=self.num_samples,
            num_parameters=self.num_parameters,
            num_trained=self.num_trained,
            seconds=self.seconds,
            score_seconds=self.score_seconds,
            acceptance=self.acceptance,
        )


def finetune(
    learner: Learner,
    feed: Feed,
    *,
    learning_rate: float,
    steps: int,
    measured_at: frozenset[int],
    measure: Callable[[Any], Measures],
    keep: Callable[[int, dict[str, Tensor]], None],
    trace_every: int,
    max_grad_norm: float = 1.0,
) -> Run:
    """Train on a feed; every method runs through this same loop.

    `keep` gets the parameters at each point measured, so that the test split is touched for the chosen ones only.
    """
    model, optimizer = learner.model, learner.optimizer()
    device = learner.device
    points: list[Point] = []
    windows: list[TauWindow] = []
    seen: set[int] = set()
    spent: list[Spent] = []
    train_tokens, measuring = 0, 0.0
    num_cut = torch.zeros((), device=device)
    start = time.perf_counter()
    model.train()
    for step, batch in enumerate(feed.take(steps), start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step - 1, steps, learning_rate)
        seen.update(batch.pop("sample").tolist())
        train_tokens += int(batch["attention_mask"].sum())
        batch = {name: value.to(device) for name, value in batch.items()}
        labels = batch.pop("labels")
        weight = batch.pop("flow_weight", torch.ones(len(labels), device=device))
        learner.loss(model(**batch, use_cache=False).logits, labels, weight).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        num_cut += norm > max_grad_norm
        optimizer.step()
        optimizer.zero_grad()
        spent.append(Spent(train_tokens, feed.score_tokens()))
        if step % trace_every == 0 and (metrics := feed.metrics()):
            tau, error, ess = (metrics[f"flow/{name}"] for name in ("tau", "tau_error", "ess"))
            windows.append(TauWindow(step=step, tau=tau, tau_error=error, ess=ess))
        if step in measured_at:
            before = time.perf_counter()
            state = learner.state()
            points.append(
                Point(
                    step=step,
                    validation=measure(model),
                    spent=spent[-1],
                    distance=learner.distance(state),
                    clip_rate=float(num_cut) / step,
                )
            )
            keep(step, state)
            model.train()
            measuring += time.perf_counter() - before
    metrics = feed.metrics()
    return Run(
        points=tuple(points),
        windows=tuple(windows),
        spent=tuple(spent),
        num_samples=len(seen),
        num_parameters=learner.num_parameters,
        num_trained=learner.num_trained,
        seconds=time.perf_counter() - start - measuring,
        score_seconds=metrics.get("flow/score_seconds", 0.0),
        acceptance=metrics.get("flow/acceptance", 1.0),
    )


def learning_rate_at(step: int, num_steps: int, peak: float, warmup: float = 0.03) -> float:
    """Linear warm-up over a share of the steps, then half a cosine down to zero."""
    num_warmup = max(1, round(warmup * num_steps))
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / (num_steps - num_warmup)))


def afforded_steps(spent: Iterable[Spent], rates: Rates, allowance: float) -> int:
    """Steps that an allowance of FLOPs pays for, from what a run would have spent after each."""
    num_steps = 0
    for each in spent:
        if rates.flops(each) > allowance:
            break
        num_steps += 1
    return num_steps


def spending(feed: Feed) -> Iterable[Spent]:
    """What a run on the feed would have spent after each of its steps, without end; nothing is trained."""
    train_tokens = 0
    for batch in feed.take(None):
        train_tokens += int(batch["attention_mask"].sum())
        yield Spent(train_tokens, feed.score_tokens())
