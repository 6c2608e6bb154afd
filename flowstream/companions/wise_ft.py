"""WiSE-FT: between the reference and the tuned model, on the straight line through their weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from flowstream.companions.wrapped import check_number, numbers, plain_name, unwrapped
from flowstream.scoring import adapters

__all__ = ["between", "interpolate", "sweep_alphas"]


@torch.no_grad()
def interpolate(reference: nn.Module, tuned: nn.Module, alpha: float, *, into: nn.Module | None = None) -> nn.Module:
    """θ = (1-α)θ* + αθ of two models of one architecture: a new module like `tuned`, or `into`, filled.

        model = fs.interpolate(reference, tuned, 0.5)

    Every floating parameter and persistent buffer is interpolated, running statistics of BatchNorm included, as in the
    official code (Wortsman et al. 2022, arXiv 2109.01903); integer buffers are the tuned model's. Arithmetic is fp32,
    or fp64 for such tensors, rounded to the dtype of what is filled; α = 0 and α = 1 give the ends to the bit, and what
    is equal at both ends stays as it is. `into` may be either of the two.

    Raises ValueError for α outside [0, 1], for names or shapes that differ, for weights that are tied in one model and
    not in the other, and for models under PEFT.
    """
    check_number("alpha", alpha, least=0.0, most=1.0)
    start, end = _tensors(reference, "reference"), _tensors(tuned, "tuned model")
    model = copy.deepcopy(unwrapped(tuned)) if into is None else into
    target = _tensors(model, "into")
    for other, what in ((start, "the reference"), (target, "`into`")):
        if odd := sorted(other.keys() ^ end.keys()):
            raise ValueError(
                f"{odd[0]!r} is in {what if odd[0] in other else 'the tuned model'} alone ({len(odd)} such): "
                "interpolate models of one architecture"
            )
        for name, tensor in end.items():
            if other[name].shape != tensor.shape:
                raise ValueError(
                    f"{name!r} has shape {list(other[name].shape)} in {what} and {list(tensor.shape)} in the tuned "
                    "model: resize both alike (embeddings: resize_token_embeddings)"
                )
    for names in _tied(target):
        for name in names[1:]:
            if not all(torch.equal(held[names[0]], held[name]) for held in (start, end)):
                raise ValueError(
                    f"{names[0]!r} and {name!r} are one tensor in the model that is filled, and two in the reference "
                    "or in the tuned model: tie them in both (tie_word_embeddings), or in neither"
                )
    for name, *_ in _tied(target):
        tensor = target[name]
        tensor.copy_(between(start[name].to(tensor.device), end[name].to(tensor.device), alpha, tensor.dtype))
    return model


def sweep_alphas(reference: nn.Module, tuned: nn.Module, alphas: Iterable[float]) -> Iterator[tuple[float, nn.Module]]:
    """(α, the model at α) for each α in turn. It is one module, filled anew each time: the third in memory.

        for alpha, model in fs.sweep_alphas(reference, tuned, [0.25, 0.5, 0.75]):
            print(alpha, evaluate(model))

    Raises ValueError as `interpolate` does, for every α before the first.
    """
    alphas = numbers(alphas)
    for alpha in alphas:
        check_number("alpha", alpha, least=0.0, most=1.0)
    model = interpolate(reference, tuned, 1.0)
    return ((alpha, interpolate(reference, tuned, alpha, into=model)) for alpha in alphas)


def between(start: Tensor, end: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """(1-α)·start + α·end, as `dtype`; of integers the end."""
    if alpha == 1 or not end.is_floating_point():
        return end.to(dtype)
    if alpha == 0:
        return start.to(dtype)
    wide = torch.float64 if torch.float64 in (start.dtype, end.dtype) else torch.float32
    return torch.lerp(start.to(wide), end.to(wide), alpha).to(dtype)


def _tied(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Names by tensor: those of tied weights together."""
    names: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.device, tensor.shape) if tensor.numel() else name
        names.setdefault(place, []).append(name)
    return list(names.values())


def _tensors(model: nn.Module, what: str) -> dict[str, Tensor]:
    """Parameters and persistent buffers, sharing their memory."""
    model = unwrapped(model)
    if adapters.unwrapped(model) is not None or adapters.layers_of(list(model.modules())):
        raise ValueError(
            f"the {what} carries PEFT adapters, and interpolating these is not interpolating what they do: merge them "
            "first (merge_and_unload())"
        )
    return {plain_name(name): tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
