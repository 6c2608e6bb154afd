"""Policies: the loss of a sample under the reference, and the temperature τ, give its weight.

A policy is any callable `(loss, tau) → weight`. The ones here are frozen dataclasses; all are pure.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from flowstream.randomness import permutation

__all__ = [
    "Flow",
    "HardFirst",
    "Permuted",
    "Policy",
    "Probability",
    "Threshold",
    "Uniform",
    "check_weight",
    "describe",
    "needs_scores",
]

Policy: TypeAlias = Callable[[Tensor, Tensor | float], Tensor]
"""(loss [...] in nats, tau as a float or a tensor that broadcasts against it) → weight [...] in fp32.

A policy that sets `needs_scores = False` is called without anything having been scored.
"""


@dataclasses.dataclass(frozen=True)
class Flow:
    """w = exp(-f/τ): samples that the reference finds easy keep the most weight.

    Loss [...] in nats, any float dtype; weight [...] fp32 in [0, 1], computed in fp64. Raises ValueError for τ ≤ 0.
    Source: Sanyal et al., ICML 2025, arXiv 2502.02797, Algorithm 1, with τ the median of f.

    >>> Flow()(torch.tensor([0.0, 1.0, 2.0]), 2.0)
    tensor([1.0000, 0.6065, 0.3679])
    """

    needs_scores: ClassVar[bool] = True

    def __call__(self, loss: Tensor, tau: Tensor | float) -> Tensor:
        """Weight [...] fp32 of loss [...]."""
        return torch.exp(-_ratio(loss, tau)).float()


@dataclasses.dataclass(frozen=True)
class Uniform:
    """w = 1, whatever the loss: plain fine-tuning. Takes no scores, and τ may be anything."""

    needs_scores: ClassVar[bool] = False

    def __call__(self, loss: Tensor, tau: Tensor | float) -> Tensor:
        """Ones [...] fp32, of the shape of loss [...]."""
        return torch.ones_like(loss, dtype=torch.float32)


@dataclasses.dataclass(frozen=True)
class HardFirst:
    """w = min(exp(+f/τ), max_weight): the opposite tilt, which favours what the reference finds hard.

    Weight [...] fp32 in [1, max_weight] (all max_weight where that is below 1); it never overflows. Raises ValueError
    for τ ≤ 0 or a `max_weight` that is not finite and above 0.
    Without the cap this is the inner problem of KL-constrained DRO, on frozen losses (arXiv 1911.08731, §2), where one
    outlier takes all the mass; proper DRO uses the *current* loss.
    """

    max_weight: float
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.max_weight < math.inf:
            raise ValueError(f"HardFirst(max_weight={self.max_weight}): give a finite number above 0, such as 10")

    def __call__(self, loss: Tensor, tau: Tensor | float) -> Tensor:
        """Weight [...] fp32 of loss [...]."""
        capped = _ratio(loss, tau).clamp(max=math.log(self.max_weight))
        return torch.exp(capped).clamp(max=self.max_weight).float()


@dataclasses.dataclass(frozen=True)
class Threshold:
    """w = 1 where f ≤ max_loss, else 0; τ is not used.

    `max_loss` in nats: log 2.5 = .916 is what selective token masking takes, with `level="token"`.
    Source: selective token masking, arXiv 2501.14315. Raises ValueError where `max_loss` is NaN or negative.
    """

    max_loss: float
    needs_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.max_loss >= 0:
            raise ValueError(f"Threshold(max_loss={self.max_loss}): give a loss in nats, 0 or above, such as 0.916")

    def __call__(self, loss: Tensor, tau: Tensor | float) -> Tensor:
        """Weight [...] fp32, 0 or 1, of loss [...]."""
        return (loss <= self.max_loss).float()


@dataclasses.dataclass(frozen=True)
class Probability:
    """w = exp(-f), the probability that the reference gives the label; τ is not used.

    Weight [...] fp32 in [0, 1], computed in fp64. Source: PriFT-prob, arXiv 2606.09396.
    """

    needs_scores: ClassVar[bool] = True

    def __call__(self, loss: Tensor, tau: Tensor | float) -> Tensor:
        """Weight [...] fp32 of loss [...]."""
        return torch.exp(-loss.double()).float()


@dataclasses.dataclass(frozen=True)
class Permuted:
    """The weights of `policy`, shuffled over samples: the control that tells information from a smaller step.

    Calling it gives the inner policy's weights in place; `permute` then shuffles those of a whole window.

    >>> weight = Permuted(Flow())(torch.tensor([0.0, 1.0, 2.0]), 2.0)
    >>> Permuted(Flow()).permute([weight], [torch.tensor([True, True, True])], seed=(0, 0, 0, 0))
    [tensor([0.6065, 1.0000, 0.3679])]
    """

    policy: Policy

    @property
    def needs_scores(self) -> bool:
        """Whether the inner policy needs scores."""
        return needs_scores(self.policy)

    def __call__(self, loss: Tensor, tau: Tensor | float) -> Tensor:
        """Weight [...] of loss [...] from the inner policy, not yet shuffled."""
        return self.policy(loss, tau)

    def permute(self, weights: Sequence[Tensor], valid: Sequence[Tensor], seed: tuple[int, ...]) -> list[Tensor]:
        """Shuffle a window's weights over all its valid entries; the others stay as they are.

        `weights`: one tensor a batch, of any shapes (one weight a sample: spread over a pack's tokens afterwards);
        `valid`: bool tensors of the same shapes; `seed`: (seed, epoch, window, rank), of which the result is a pure
        function. Returns new tensors. Raises ValueError where the two lists do not match.
        """
        if [w.shape for w in weights] != [v.shape for v in valid]:
            raise ValueError(
                f"permute got weights of shapes {[list(w.shape) for w in weights]} and valid of shapes "
                f"{[list(v.shape) for v in valid]}; give one bool tensor a batch, of its weights' shape"
            )
        if not weights:
            return []
        pooled = torch.cat([w[v] for w, v in zip(weights, valid, strict=True)])
        order = torch.from_numpy(permutation(pooled.numel(), seed, use="permuted"))
        shuffled = pooled[order.to(pooled.device)]
        counts = [int(v.sum()) for v in valid]
        permuted = []
        for weight, mask, part in zip(weights, valid, torch.split(shuffled, counts), strict=True):
            permuted.append(weight.clone())
            permuted[-1][mask] = part
        return permuted


def check_weight(weight: object, loss: Tensor) -> Tensor:
    """What a policy gave, as an fp32 weight [...] without gradient, 0 where loss [...] is NaN or infinite.

    Raises ValueError unless it is a floating tensor of the loss's shape, finite and ≥ 0 wherever the loss is finite.
    """
    remedy = "return a floating tensor of the loss's shape, finite and 0 or above"
    if not isinstance(weight, Tensor):
        raise ValueError(f"the policy returned {type(weight).__name__}, not a tensor; {remedy}")
    if weight.shape != loss.shape:
        raise ValueError(f"the policy returned shape {list(weight.shape)} for losses {list(loss.shape)}; {remedy}")
    if not weight.is_floating_point():
        raise ValueError(f"the policy returned dtype {weight.dtype}; {remedy} (`.float()` of a mask will do)")
    checked = torch.where(loss.isfinite(), weight.detach().float(), 0.0)
    bad = ~(checked.isfinite() & (checked >= 0))
    if bool(bad.any()):
        raise ValueError(
            f"the policy returned weight {checked[bad][0].item():g} for a loss of {loss[bad][0].item():g} nats "
            f"({int(bad.sum())} of {bad.numel()} weights are negative, NaN or infinite in fp32); {remedy}"
        )
    return checked


def needs_scores(policy: object) -> bool:
    """Whether a policy reads the losses; a callable that does not say so does."""
    return bool(getattr(policy, "needs_scores", True))


def describe(policy: object) -> str:
    """A name that is equal in every process: a dataclass with its fields, a function by its qualified name.

    Two lambdas of one scope, and two closures of one function, are told apart by nothing here: prefer a dataclass.

    >>> describe(Permuted(HardFirst(max_weight=10.0)))
    'Permuted(policy=HardFirst(max_weight=10.0))'
    """
    if isinstance(policy, functools.partial):
        fixed = [_show(a) for a in policy.args] + [f"{k}={_show(v)}" for k, v in sorted(policy.keywords.items())]
        return f"partial({', '.join([describe(policy.func), *fixed])})"
    named = policy if hasattr(policy, "__qualname__") else type(policy)
    module, name = getattr(named, "__module__", None), named.__qualname__
    name = name if module in (None, __name__) else f"{module}.{name}"
    if dataclasses.is_dataclass(policy) and not isinstance(policy, type):
        fields = [f"{f.name}={_show(getattr(policy, f.name))}" for f in dataclasses.fields(policy)]
        return f"{name}({', '.join(fields)})"
    return name


def _show(value: object) -> str:
    return describe(value) if callable(value) else repr(value)  # the repr of a function is its address


def _ratio(loss: Tensor, tau: Tensor | float) -> Tensor:
    """f/τ in fp64, so that its rounding is not what the exponential sees."""
    positive = tau > 0
    if isinstance(positive, Tensor):  # a look at a tensor on a GPU would wait for the GPU
        positive = not positive.is_cpu or bool(positive.all())
    if not positive:
        raise ValueError(f"tau is {tau}, and a temperature is above 0; give the temperature a floor")
    return loss.double() / tau
