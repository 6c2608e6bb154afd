"""What a run will do and take, worked out before it begins: steps, memory of model and reference, cost of scoring."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from flowstream.finetune.loading import Material
from flowstream.finetune.settings import Settings
from flowstream.scoring.estimate import bytes_a_token, size
from flowstream.scoring.job import Budget
from flowstream.temperature import RunningMedian

_TYPICAL_ACCEPTANCE = 0.4
"""Mean weight at τ = median on common loss laws, .37-.43: what resampling keeps."""
_HEAD_BYTES = 2**28
_WARMUP = RunningMedian().warmup_samples
"""The first window has as many samples, over all processes, or all there are: scored before the first step."""
_AHEAD = 256
"""Samples that each process has scored ahead of those it trains on."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes are of one process."""

    num_steps: int
    num_samples: int | None
    """To learn; `None` where shards are not read beforehand."""
    num_tokens: int | None
    num_labelled: int | None
    num_dropped: int
    num_truncated: int
    num_trained: int
    """Samples that training takes, repeats counted, over all processes."""
    num_parameters: int
    num_trainable: int
    model_bytes: int
    training_bytes: int
    """Gradients, twice where processes exchange them, and AdamW's two moments."""
    reference_bytes: int
    """Its weights; 0 where it is the base of the trained model."""
    scoring_bytes: int
    """Of a micro-batch that is scored, and of its losses."""
    num_scored: int
    """Samples that are scored, over all processes, those included that are only read ahead."""
    share_of_training: float
    """Operations of scoring over those of training."""

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each line."""
        data = "shards, read while training"
        if self.num_samples is not None:
            data = f"{self.num_samples:,} samples, {self.num_tokens:,} tokens, {self.num_labelled:,} learned"
        cuts = [(self.num_dropped, "dropped"), (self.num_truncated, "truncated")]
        too_long = ", ".join(f"{num:,} {what}" for num, what in cuts if num)
        total = self.model_bytes + self.training_bytes + self.reference_bytes + self.scoring_bytes
        reference = size(self.reference_bytes) if self.reference_bytes else "the model's own base"
        return [
            ("data", data),
            *([("too long", too_long)] if too_long else []),
            ("steps", f"{self.num_steps:,}, of {self.num_trained:,} samples in all"),
            ("parameters", f"{_short(self.num_parameters)}, {_short(self.num_trainable)} of them trained"),
            ("memory, model", f"{size(self.model_bytes)}, gradients and AdamW {size(self.training_bytes)}"),
            ("memory, reference", f"{reference}, micro-batches and losses {size(self.scoring_bytes)}"),
            ("memory in all", f"{size(total)} a process, and the activations of training"),
            (
                "scoring",
                f"at most {self.num_scored:,.0f} samples, +{self.share_of_training:.0%} of training's operations",
            ),
        ]


def plan_of(
    settings: Settings,
    material: Material,
    model: nn.Module,
    reference: nn.Module | None,
    device: torch.device,
    world_size: int,
) -> Plan:
    """The plan of a run; models may be on the meta device. `reference` is `None` where it is the model's base.

    Raises:
        ValueError: shards, and no number of steps.
    """
    if material.dataset is None and settings.max_steps is None:
        raise ValueError("nobody knows how many samples shards have: give --max-steps")
    dataset = material.dataset
    num_samples = None if dataset is None else len(dataset)
    num_steps = _num_steps(settings, num_samples, world_size)
    num_trained = num_steps * settings.batch_size * settings.accumulate * world_size
    if num_samples is not None and settings.mode == "weight":  # an epoch's last batches may be smaller
        passes, rest = divmod(num_steps, steps_a_pass(settings, num_samples, world_size))
        a_step = settings.batch_size * settings.accumulate * world_size
        num_trained = passes * num_samples + min(rest * a_step, num_samples)
    num_scored = _num_scored(settings, num_samples, num_trained, world_size)
    parameters = list(model.parameters())
    num_parameters, num_trainable = (
        sum(p.numel() for p in found) for found in (parameters, [p for p in parameters if p.requires_grad])
    )
    itemsize = 2 if settings.bf16 else 4
    num_referred = num_parameters if reference is None else sum(p.numel() for p in reference.parameters())
    # Forward, gradients of the activations, those of trained weights; and a second forward.
    training = 2 * num_parameters + 2 * num_parameters + 2 * num_trainable
    training += 2 * num_parameters * settings.gradient_checkpointing
    return Plan(
        num_steps=num_steps,
        num_samples=num_samples,
        num_tokens=None if dataset is None else dataset.num_tokens,
        num_labelled=None if dataset is None else dataset.num_labelled,
        num_dropped=0 if dataset is None else dataset.num_dropped,
        num_truncated=0 if dataset is None else dataset.num_truncated,
        num_trained=num_trained,
        num_parameters=num_parameters,
        num_trainable=num_trainable,
        model_bytes=sum(p.nbytes for p in parameters),
        training_bytes=sum((1 + (world_size > 1)) * p.nbytes + 8 * p.numel() for p in parameters if p.requires_grad),
        reference_bytes=0 if reference is None else num_referred * itemsize,
        scoring_bytes=Budget.of(None, device).tokens * bytes_a_token((reference or model).config, itemsize)
        + _HEAD_BYTES,
        num_scored=num_scored,
        share_of_training=2 * num_referred * num_scored / (training * num_trained),
    )


def steps_a_pass(settings: Settings, num_samples: int, world_size: int) -> int:
    """Optimizer steps in which every sample is seen once, as accumulated batches of all processes."""
    return math.ceil(math.ceil(math.ceil(num_samples / world_size) / settings.batch_size) / settings.accumulate)


def _num_steps(settings: Settings, num_samples: int | None, world_size: int) -> int:
    if settings.max_steps is not None or num_samples is None:
        return settings.max_steps or 1
    steps = settings.epochs * steps_a_pass(settings, num_samples, world_size)
    if settings.mode == "resample":
        steps *= _TYPICAL_ACCEPTANCE
    return max(math.ceil(steps), 1)


def _num_scored(settings: Settings, num_samples: int | None, num_trained: int, world_size: int) -> int:
    """At most so many samples, each once where losses are kept."""
    kept = _TYPICAL_ACCEPTANCE if settings.mode == "resample" else 1
    wanted = max(math.ceil(num_trained / kept), _WARMUP) + _AHEAD * world_size
    if num_samples is None:
        return wanted
    passes = 1 if settings.cache != "none" else math.ceil(num_trained / kept / num_samples)
    return min(wanted, passes * num_samples)


def _short(number: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return f"{number:,}"
