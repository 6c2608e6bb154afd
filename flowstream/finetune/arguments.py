"""What transformers' trainer, and FLOW in it, are told of the settings of a run."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import torch
from transformers import TrainingArguments

from flowstream.finetune.plan import Plan
from flowstream.finetune.pretrained import load_reference
from flowstream.finetune.settings import Settings
from flowstream.integrations.config import FlowConfig
from flowstream.temperature import RunningMedian, TargetESS, Temperature

_SHARES = 10
"""Evaluations and checkpoints of a run, unless it is said otherwise."""


def arguments_of(settings: Settings, plan: Plan, *, has_sets: bool, is_resumed: bool) -> TrainingArguments:
    """Of the trainer. Under torchrun they join its processes."""
    share = max(math.ceil(plan.num_steps / _SHARES), 1)
    is_on_cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(settings.out),
        max_steps=plan.num_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.floor(settings.warmup * plan.num_steps),
        weight_decay=settings.weight_decay,
        label_smoothing_factor=settings.label_smoothing,
        bf16=settings.bf16,
        **_checkpointing(settings),
        logging_steps=settings.log_steps,
        logging_first_step=True,
        eval_strategy="steps" if has_sets else "no",
        eval_steps=settings.eval_steps or share,
        eval_on_start=has_sets and not is_resumed,
        save_steps=settings.save_steps or share,
        save_total_limit=2,
        report_to=["tensorboard"] if settings.tensorboard else [],
        seed=settings.seed,
        use_cpu=is_on_cpu,
        ddp_backend="gloo" if is_on_cpu and "WORLD_SIZE" in os.environ else None,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level_replica="error",
    )


def flow_of(settings: Settings, device: torch.device) -> FlowConfig:
    """Of the stream, with the reference loaded to `device`."""
    is_weighted = settings.mode == "weight"
    return FlowConfig(
        reference="base",
        scorer=load_reference(settings, device),
        mode=settings.mode,
        level=settings.level,
        temperature=temperature_of(settings),
        normalize=settings.normalize,
        include=("loss",) if is_weighted else ("loss", "weight"),
        cache=None if settings.cache == "none" else settings.cache,
        seed=settings.seed,
    )


def temperature_of(settings: Settings) -> Temperature:
    """τ as asked for."""
    return RunningMedian(quantile=settings.quantile) if settings.target_ess is None else TargetESS(settings.target_ess)


def _checkpointing(settings: Settings) -> dict[str, Any]:
    """transformers 5.20 has renamed it."""
    names = {each.name for each in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: True} if settings.gradient_checkpointing else {}
