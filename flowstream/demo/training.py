"""A plain PyTorch fine-tuning loop: AdamW, warm-up and cosine, clipping, `weighted_lm_loss`; measured along the way."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import flowstream as fs
from flowstream.demo.evaluation import Measures
from flowstream.demo.feeds import Feed
from flowstream.demo.results import TauWindow

_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Spent:
    """What a run has cost by some step."""

    train_tokens: int
    score_tokens: int
    """Tokens that the reference has scored, each problem counted once."""

    def flops(self, num_parameters: int) -> float:
        """6N a trained token, 2N a scored one."""
        return num_parameters * (6.0 * self.train_tokens + 2.0 * self.score_tokens)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run as it stood after some steps."""

    step: int
    validation: Measures
    spent: Spent


@dataclass(frozen=True, kw_only=True)
class Run:
    """One method at one learning rate, from the checkpoint to the last step."""

    points: tuple[Point, ...]
    snapshots: dict[int, dict[str, Tensor]]
    """Step → the model's parameters at that point, so that the test split is touched for the chosen ones only."""
    windows: tuple[TauWindow, ...]
    spent: tuple[Spent, ...]
    """After each step."""
    num_samples: int
    """Distinct problems trained on."""
    seconds: float
    """Wall time without the evaluations."""
    score_seconds: float
    acceptance: float


def finetune(
    checkpoint: Path,
    feed: Feed,
    *,
    learning_rate: float,
    steps: int,
    measured_at: frozenset[int],
    measure: Callable[[LlamaForCausalLM], Measures],
    trace_every: int,
) -> Run:
    """Fine-tune a fresh copy of the checkpoint on a feed; every method runs through this same loop."""
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    points: list[Point] = []
    snapshots: dict[int, dict[str, Tensor]] = {}
    windows: list[TauWindow] = []
    seen: set[int] = set()
    spent: list[Spent] = []
    train_tokens, measuring = 0, 0.0
    start = time.perf_counter()
    model.train()
    for step, batch in enumerate(feed.take(steps), start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step - 1, steps, learning_rate)
        seen.update(batch.pop("sample").tolist())
        labels = batch.pop("labels")
        weight = batch.pop("flow_weight", torch.ones(len(labels)))
        loss = fs.weighted_lm_loss(model(**batch, use_cache=False).logits, labels, weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        train_tokens += int(batch["attention_mask"].sum())
        spent.append(Spent(train_tokens, feed.score_tokens()))
        if step % trace_every == 0 and (metrics := feed.metrics()):
            tau, error, ess = (metrics[f"flow/{name}"] for name in ("tau", "tau_error", "ess"))
            windows.append(TauWindow(step=step, tau=tau, tau_error=error, ess=ess))
        if step in measured_at:
            before = time.perf_counter()
            measures = measure(model)
            model.train()
            points.append(Point(step=step, validation=measures, spent=spent[-1]))
            snapshots[step] = {name: value.clone() for name, value in model.state_dict().items()}
            measuring += time.perf_counter() - before
    metrics = feed.metrics()
    return Run(
        points=tuple(points),
        snapshots=snapshots,
        windows=tuple(windows),
        spent=tuple(spent),
        num_samples=len(seen),
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
