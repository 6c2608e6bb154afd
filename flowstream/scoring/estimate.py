"""What scoring will take, told before it begins: memory on the reference's device, and operations beside training's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flowstream.scoring.adapters import bare_modules
from flowstream.scoring.reference import Reference


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of a language model's scoring. Bytes are what stays on the device while the model trains."""

    device: torch.device
    num_parameters: int
    """Of the reference; with experts, more than a token meets."""
    weight_bytes: int
    """Of the reference; 0 where it is the base of the model that trains, with adapters."""
    activation_bytes: int
    """Of a micro-batch that fills the token budget."""
    head_bytes: int
    """Of the chunked losses."""
    share_of_training: float
    """Operations of scoring a token over those of training on it: 1/3 (2N of 6N) for a model of the reference's size;
    1/2 where only adapters train, without gradients of the weights (2N of 4N)."""

    @property
    def total_bytes(self) -> int:
        """Beside the training's own."""
        return self.weight_bytes + self.activation_bytes + self.head_bytes

    def __str__(self) -> str:
        weights = size(self.weight_bytes) if self.weight_bytes else "none (the model's own base)"
        pool = ", in a pool of their own" if self.device.type == "cuda" else ""
        return (
            f"{self.num_parameters / 1e6:,.1f} M parameters on {self.device}; memory: weights {weights}, micro-batches "
            f"{size(self.activation_bytes)}, losses {size(self.head_bytes)}{pool}; operations: "
            f"+{self.share_of_training:.0%} of training's on the tokens that are not in the cache, without padding"
        )


def estimate(reference: Reference, num_tokens: int, head_bytes: int) -> Estimate:
    """What scoring micro-batches of `num_tokens` takes, from the reference's configuration.

    A decoder layer holds, at its widest, the residual stream, its norm in fp32 and in the model's dtype, and three
    tensors of the MLP's width; attention that is not packed is counted without its scores, which no kernel keeps.
    """
    modules = [module for _, module in bare_modules(reference.model)]
    tensors = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
    return Estimate(
        device=reference.device,
        num_parameters=sum(p.numel() for p in tensors.values()),
        weight_bytes=0 if reference.adapted and not reference.copied else sum(p.nbytes for p in tensors.values()),
        activation_bytes=num_tokens * bytes_a_token(reference.config, reference.dtype.itemsize),
        head_bytes=head_bytes,
        share_of_training=1 / 2 if reference.adapted else 1 / 3,
    )


def bytes_a_token(config: Any, itemsize: int) -> int:
    """What a decoder layer holds of each token, at its widest."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    inner = _number(config, "intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * hidden
    return (3 * hidden + 3 * inner) * itemsize + 2 * 4 * hidden


def _number(config: Any, *names: str) -> int:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 0)


def size(num_bytes: int) -> str:
    """Bytes, as one reads them."""
    return f"{num_bytes / 2**30:.1f} GB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MB"
