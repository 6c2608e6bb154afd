"""A model made ready to be trained: all that a method's companions may change of the one training loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from flowstream.losses import weighted_lm_loss

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [B, T, V], labels [B, T], weight [B] or [B, T]) → 0-d loss."""


class Learner:
    """Owns a copy of a pre-trained model while it is trained.

    Companions act on it before the first step, in this order: they wrap the model or freeze parts of it, add penalties
    to the loss, replace the loss, and wrap the optimizer.
    """

    def __init__(self, pretrained: nn.Module, *, seed: int = 0) -> None:
        self.seed = seed
        self.model: Any = copy.deepcopy(pretrained).requires_grad_(True)
        self.objective: Objective = weighted_lm_loss
        self.penalties: list[Callable[[], Tensor]] = []
        self.optimizer_wraps: list[Callable[[Optimizer], Optimizer]] = []
        self._start = {name: value.detach() for name, value in pretrained.named_parameters()}

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def num_parameters(self) -> int:
        """Adapters included."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def num_trained(self) -> int:
        return sum(parameter.numel() for parameter in self.trained())

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters that get a gradient."""
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def optimizer(self) -> Optimizer:
        """AdamW without weight decay, wrapped as companions ask. Whoever trains sets the learning rate."""
        optimizer: Optimizer = AdamW(self.trained(), weight_decay=0.0, fused=True)
        for wrap in self.optimizer_wraps:
            optimizer = wrap(optimizer)
        return optimizer

    def loss(self, logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        """The objective and all penalties."""
        loss = self.objective(logits, labels, weight)
        for penalty in self.penalties:
            loss = loss + penalty()
        return loss

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """A copy of all parameters and buffers, named as in the pre-trained model, adapters merged."""
        if not hasattr(self.model, "peft_config"):
            return {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        base = self.model.get_base_model()
        merged = {
            name.replace(".base_layer.", "."): value.detach().clone()
            for name, value in base.state_dict().items()
            if ".lora_" not in name
        }
        for name, module in base.named_modules():
            if hasattr(module, "get_delta_weight") and "default" in module.lora_A:
                merged[f"{name}.weight"] += module.get_delta_weight("default")
        return merged

    @torch.no_grad()
    def distance(self, state: dict[str, Tensor]) -> float:
        """‖Δθ‖₂ of a state to the start, over all parameters; a tied one counts once."""
        norms = [torch.linalg.vector_norm(state[name].float() - start.float()) for name, start in self._start.items()]
        return float(torch.linalg.vector_norm(torch.stack(norms)))
