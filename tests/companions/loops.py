"""What tests of companions share: a stream over a tiny Llama, its weights by hand, and the loop that is companion's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from conftest import build
from torch import Tensor, nn

import flowstream as fs

TAU = 4.0
NUM_STEPS = 10
Batch = dict[str, Tensor]


def llama(**config: Any) -> Any:
    """Of one layer, and sure of itself, so that its losses differ, and the weights with them."""
    model = build("llama", **({"num_hidden_layers": 1} | config))
    with torch.no_grad():
        model.get_output_embeddings().weight *= 4
    return model


def batches(num: int = NUM_STEPS, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (num, 2, 8), generator=generator)
    return [{"input_ids": rows, "labels": rows.clone()} for rows in ids]


def stream_of(model: nn.Module) -> fs.FlowStream:
    """FLOW weights from a frozen copy of the model as it is now (of a PEFT model: its base)."""
    return fs.FlowStream(batches(), fs.CausalLMScorer(model), temperature=fs.FixedTemperature(TAU))


def sample_losses(model: Any, ids: Tensor) -> Tensor:
    """[B] mean next-token losses, in the plainest way."""
    logits = model(input_ids=ids).logits
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nll.view(len(ids), -1).mean(1)


def by_hand(model: Any, frozen: Any, step: Callable[[Tensor], Any]) -> None:
    """`NUM_STEPS` steps with weights e^{-f/τ} of the frozen model; `step` takes the loss and does all else."""
    for batch in batches():
        with torch.no_grad():
            weight = torch.exp(-sample_losses(frozen, batch["input_ids"]) / TAU)
        step((weight * sample_losses(model, batch["input_ids"])).mean())


def frozen_copy(model: nn.Module) -> Any:
    return copy.deepcopy(model).requires_grad_(False).eval()


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_alike(one: nn.Module, other: nn.Module, *, tolerance: float = 1e-6) -> None:
    """All parameters within `tolerance`."""
    other_parameters = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        apart = float((parameter - other_parameters[name]).detach().abs().max())
        assert apart <= tolerance, f"{name} is {apart} apart"


def moved(model: nn.Module, start: nn.Module) -> float:
    """The largest change of a parameter."""
    starts = dict(start.named_parameters())
    return max(float((p - starts[n]).detach().abs().max()) for n, p in model.named_parameters())
