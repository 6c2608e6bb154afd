"""What fine-tuning is compared by: FLOW, its controls, and its companions, alone or joined as in `flow+l2`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flowstream.companions.dro import Dro
from flowstream.companions.half_fine_tuning import half_fine_tuning
from flowstream.companions.linear_probe import classification_layer
from flowstream.companions.mofo import MoFO
from flowstream.companions.reference_distance import DistanceToReference
from flowstream.companions.wise_ft import interpolate
from flowstream.losses import weighted_cross_entropy
from flowstream.policies import Flow, Permuted, Policy, Uniform

WEIGHTS: dict[str, Policy] = {
    "standard": Uniform(),
    "flow": Flow(),
    "permuted": Permuted(Flow()),
    "resample": Flow(),
}
"""Of these a method has at most one."""
COMPANIONS = ("l2", "l1", "wise", "lora", "mofo", "hft", "dro")


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """How much of a companion."""

    l2: float = 0.01
    """λ of λ·Σ(θ-θ*)² in the loss. The official code's 1e-3 over the number of parameters is no visible pull."""
    l1: float = 1e-4
    """λ of λ·Σ|θ-θ*|."""
    wise: float = 0.5
    """α, the share of the tuned model in WiSE-FT; the paper's."""
    lora: int = 8
    """Rank of the adapters, on all layers but the head, which trains as a whole."""
    mofo: float = 0.1
    """Share of each parameter tensor that moves in a step."""
    dro: float = 1.0
    """τ of DRO on the current losses, nats."""


@dataclass(frozen=True)
class Method:
    """One method: what it weighs by, and which companions it has."""

    name: str
    weights: str
    companions: frozenset[str]
    strengths: Strengths

    @classmethod
    def of(cls, name: str, strengths: Strengths | None = None) -> Method:
        """From a name such as "flow" or "flow+wise". ValueError for one that is none."""
        parts = name.split("+")
        unknown = [part for part in parts if part not in WEIGHTS and part not in COMPANIONS]
        weights = [part for part in parts if part in WEIGHTS]
        if unknown or len(set(parts)) < len(parts) or len(weights) > 1:
            raise ValueError(
                f"method {name!r}: give one of {', '.join(WEIGHTS)}, or companions, {', '.join(COMPANIONS)}, or one "
                "and the others joined, as in flow+l2"
            )
        if "dro" in parts and weights not in ([], ["standard"]):
            raise ValueError(f"method {name!r}: DRO gives weights of its own, of the current losses; take one of both")
        companions = frozenset(parts) - WEIGHTS.keys()
        return cls(name, weights[0] if weights else "standard", companions, strengths or Strengths())

    @property
    def policy(self) -> Policy:
        return WEIGHTS[self.weights]

    @property
    def mode(self) -> Literal["weight", "resample"]:
        return "resample" if self.weights == "resample" else "weight"

    def begun(self, model: nn.Module, *, seed: int) -> nn.Module:
        """The model as the method trains it; `model` itself, or with adapters in it."""
        if "lora" in self.companions:
            model = _adapted(model, self.strengths.lora, seed)
        if "hft" in self.companions:
            half_fine_tuning(model, seed=seed)
        return model

    def optimizer(self, optimizer: Optimizer) -> Optimizer:
        return MoFO(optimizer, fraction=self.strengths.mofo) if "mofo" in self.companions else optimizer

    def penalty(self, model: nn.Module) -> Callable[[], Tensor] | None:
        """What is added to the loss, of the distance to where the model is now."""
        norms: tuple[tuple[Literal["l2", "l1"], float], ...] = (("l2", self.strengths.l2), ("l1", self.strengths.l1))
        terms = [
            DistanceToReference(model, norm=norm, strength=strength, per_parameter=False).penalty
            for norm, strength in norms
            if norm in self.companions
        ]
        return (lambda: torch.stack([term() for term in terms]).sum()) if terms else None

    def loss(self, logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Mean of w·ℓ, as in the official code; of DRO its own."""
        if "dro" in self.companions:
            return Dro(self.strengths.dro).cross_entropy(logits, target)
        return weighted_cross_entropy(logits, target, weight)

    def ended(self, probe: nn.Module, tuned: nn.Module) -> nn.Module:
        """The plain model after the second stage."""
        if "lora" in self.companions:
            merge: Any = tuned
            tuned = merge.merge_and_unload()
        if "wise" in self.companions:
            tuned = interpolate(probe, tuned, self.strengths.wise)
        return tuned.requires_grad_(True)


def _adapted(model: nn.Module, rank: int, seed: int) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("peft is not installed: pip install 'flowstream[peft]'") from None
    head = classification_layer(model)
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name != head and getattr(module, "groups", 1) == 1
    ]
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, modules_to_save=[head])
    adapted: nn.Module = get_peft_model(model, config)
    return adapted
