"""The temperature τ, as a user asks for it: frozen specs, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal

__all__ = ["BatchMedian", "FixedTemperature", "RunningMedian", "TargetESS", "Temperature", "WindowMedian"]

Backend = Literal["numpy", "tdigest"]


@dataclass(frozen=True, kw_only=True)
class RunningMedian:
    """τ is the median of all losses so far, or of recent ones: the τ of FLOW (arXiv 2502.02797), made a stream's."""

    quantile: float = 0.5
    """Another quantile than the median, in (0, 1)."""
    warmup_samples: int = 1024
    """The first window grows to this many samples, over all ranks, and uses its own median."""
    half_life_samples: float | None = None
    """A loss counts half after this many samples over all ranks; None: for ever."""
    floor: float | Literal["auto"] = "auto"
    """τ is never below, in nats. "auto": 1e-6 for samples, .05 for tokens."""
    freeze_after_samples: int | None = None
    """τ stays what it is once this many samples were seen over all ranks."""
    backend: Backend = "numpy"
    """What keeps the running state: our digest, or the package `tdigest` (extra of that name; the slower one)."""

    def __post_init__(self) -> None:
        _check_share("RunningMedian(quantile)", self.quantile)
        _check_running(self)


@dataclass(frozen=True, kw_only=True)
class WindowMedian:
    """τ of a window is the median of that window's own losses."""

    floor: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        _check_floor(self)


@dataclass(frozen=True, kw_only=True)
class BatchMedian:
    """τ of a batch is the median of that batch's own losses, on this rank. It needs batches of 8."""

    floor: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        _check_floor(self)


@dataclass(frozen=True)
class FixedTemperature:
    """τ is `value` nats, from an earlier run or a paper."""

    value: float

    def __post_init__(self) -> None:
        _check_positive("FixedTemperature(value)", self.value)


@dataclass(frozen=True)
class TargetESS:
    """τ is where weights e^{-f/τ} over the running distribution have this effective sample size. Ours, not the paper's.

    ESS/n grows with τ, from the share of samples at the smallest loss to 1. Where that share is above the target, no τ
    reaches it, and τ is the median.
    """

    fraction: float
    """ESS/n to reach, in (0, 1)."""
    _: KW_ONLY
    warmup_samples: int = 1024
    half_life_samples: float | None = None
    floor: float | Literal["auto"] = "auto"
    freeze_after_samples: int | None = None
    backend: Backend = "numpy"

    def __post_init__(self) -> None:
        _check_share("TargetESS(fraction)", self.fraction)
        _check_running(self)


Temperature = RunningMedian | WindowMedian | BatchMedian | FixedTemperature | TargetESS


def _check_running(spec: RunningMedian | TargetESS) -> None:
    name = type(spec).__name__
    _check_floor(spec)
    if spec.warmup_samples < 1:
        raise ValueError(f"{name}(warmup_samples) must be at least 1, got {spec.warmup_samples!r}")
    if spec.half_life_samples is not None:
        _check_positive(f"{name}(half_life_samples)", spec.half_life_samples)
    if spec.freeze_after_samples is not None:
        _check_positive(f"{name}(freeze_after_samples)", spec.freeze_after_samples)
    if spec.backend not in ("numpy", "tdigest"):
        raise ValueError(f'{name}(backend) must be "numpy" or "tdigest", got {spec.backend!r}')


def _check_floor(spec: RunningMedian | WindowMedian | BatchMedian | TargetESS) -> None:
    if spec.floor != "auto":
        _check_positive(f"{type(spec).__name__}(floor)", spec.floor)


def _check_positive(name: str, value: object) -> None:
    if not (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _check_share(name: str, value: object) -> None:
    if not (isinstance(value, int | float) and 0 < value < 1):
        raise ValueError(f"{name} must lie between 0 and 1, got {value!r}")
