"""The frozen model that all methods start from: its losses of the samples to learn, scored once for every run."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import flowstream as fs
from flowstream.compare.evaluation import Measures
from flowstream.compare.material import Material
from flowstream.scoring.base import Level

_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What is known of it, in plain values."""

    num_parameters: int
    validation: Measures
    """Before fine-tuning."""
    tau: float
    """The median of its losses, nats."""
    mean_weight: float
    """Of e^{-f/τ}: the share that resampling keeps."""
    ess: float
    """ESS/n of these weights: 1 where they are all alike."""

    def as_plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def of_plain(found: dict[str, Any]) -> Reference:
        """As `as_plain` gives it."""
        return Reference(**{**found, "validation": Measures(**found["validation"])})


def load_reference(name: str) -> Any:
    """The checkpoint, frozen, in fp32, on a GPU where there is one."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval().requires_grad_(False)
    return model.to("cuda") if torch.cuda.is_available() else model


def score(material: Material, losses: Path, *, by_token: bool) -> Reference:
    """Fill the cache of losses, once: as a whole, so that no run ever meets half of one."""
    model = load_reference(material.model)
    scorer = fs.CausalLMScorer(model)
    partial = losses.with_name(f"{losses.name}.partial")
    for path in (partial, losses):
        shutil.rmtree(path, ignore_errors=True)
    of_samples = _pass(material, scorer, partial, "sample")
    if by_token:
        _pass(material, scorer, partial, "token")
    partial.rename(losses)
    tau = float(np.sort(of_samples)[(len(of_samples) - 1) // 2])
    weight = np.exp(-of_samples / tau)
    return Reference(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        validation=material.split("validation").measure(model),
        tau=tau,
        mean_weight=float(weight.mean()),
        ess=float(weight.sum() ** 2 / (weight**2).sum() / len(weight)),
    )


def _pass(material: Material, scorer: Any, cache: Path, level: Level) -> Any:
    """The samples' losses `[n]`, NaN for tokens, whose losses are in the cache alone."""
    found = np.full(len(material.train), np.nan)
    with fs.FlowStream(
        material.loader(batch_size=_BATCH, seed=None),
        scorer,
        level=level,
        temperature=fs.FixedTemperature(1.0),
        include=("loss",),
        cache=cache,
    ) as stream:
        for batch in stream:
            if level == "sample":
                found[batch["sample"].numpy()] = batch["flow_loss"].double().numpy()
    return found
