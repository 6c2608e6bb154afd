"""The frozen model that all methods start from: its losses of the samples to learn, scored once for every run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import flowstream as fs
from flowstream.compare.evaluation import Measures
from flowstream.compare.fingerprint import fingerprint_of
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
    """ESS/n of these weights: 1 where they are all alike. All three are NaN where nothing was scored."""
    fingerprint: str = ""
    """Of its weights; none where an earlier version wrote it."""

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


def score(
    material: Material,
    losses: Path,
    *,
    levels: Sequence[Level] = ("sample",),
    on_scored: Callable[[int, int], None] = lambda done, of: None,
) -> Reference:
    """Look at the reference, and fill the cache of its losses, once: as a whole, so that no run ever meets half of one.

    What a killed process has scored is found again. `on_scored(done, all)` is told of samples, once a level each.
    Without `levels` nothing is scored.
    """
    model = load_reference(material.model)
    partial = losses.with_name(f"{losses.name}.partial")
    cache = losses if losses.exists() else partial  # scored, but killed before it was told
    scorer = fs.CausalLMScorer(model)
    of_samples = np.full(len(material.train) if "sample" in levels else 0, np.nan)
    done = 0
    for level in levels:
        for batch in _scored(material, scorer, cache, level):
            numbers = batch["sample"].numpy()
            if level == "sample":
                of_samples[numbers] = batch["flow_loss"].double().numpy()
            done += len(numbers)
            on_scored(done, len(levels) * len(material.train))
    if cache.exists():
        cache.rename(losses)
    tau, mean_weight, ess = _weights(of_samples)
    return Reference(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        validation=material.split("validation").measure(model),
        tau=tau,
        mean_weight=mean_weight,
        ess=ess,
        fingerprint=fingerprint_of(model.state_dict()),
    )


def _weights(losses: Any) -> tuple[float, float, float]:
    """τ, the mean of e^{-f/τ}, and ESS/n, of losses `[n]`; NaN where there are none."""
    if not len(losses):
        return math.nan, math.nan, math.nan
    tau = float(np.sort(losses)[(len(losses) - 1) // 2])
    weight = np.exp(-losses / tau)
    return tau, float(weight.mean()), float(weight.sum() ** 2 / (weight**2).sum() / len(weight))


def _scored(material: Material, scorer: Any, cache: Path, level: Level) -> Iterator[dict[str, Any]]:
    """All samples once, with their losses, which the cache then has."""
    with fs.FlowStream(
        material.loader(batch_size=_BATCH, seed=None),
        scorer,
        level=level,
        temperature=fs.FixedTemperature(1.0),
        include=("loss",),
        cache=cache,
    ) as stream:
        yield from stream
