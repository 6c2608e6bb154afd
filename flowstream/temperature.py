"""The temperature τ: what a user asks for (frozen specs), and the running state of it that a stream owns."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flowstream.digest import Digest

__all__ = [
    "BatchMedian",
    "FixedTemperature",
    "RunningMedian",
    "RunningTemperature",
    "TargetESS",
    "Temperature",
    "WindowMedian",
]

Backend = Literal["numpy", "tdigest"]
Level = Literal["sample", "token"]
Scope = Literal["stream", "window", "batch"]

_AUTO_FLOOR: dict[str, float] = {"sample": 1e-6, "token": 0.05}
_MIN_BATCH = 8
_RUNNING_CENTROIDS = 2000
_UNIFORM_ESS = 0.97
_STATE_VERSION = 1

_AT_FLOOR = (
    "τ is at its floor of {floor:g} nats: half of the losses or more lie below, and the weights cut hard between them "
    "and the rest. The reference may have been trained on this data. Try another reference, a higher quantile, "
    "or a larger floor."
)
_IN_GAP = (
    "τ = {tau:.4g} nats lies in a gap of the losses, between about {low:.4g} and {high:.4g}: two kinds of samples are "
    "mixed in equal parts, and a slight change of the mixture moves τ across. Try another quantile, "
    "or FixedTemperature(value)."
)
_UNIFORM = (
    "ESS/n is {ess:.3f} at τ = {tau:.4g} nats: the weights are nearly uniform and carry no information, so this is "
    "training with a smaller step. Try a stronger reference, or a smaller τ: TargetESS(0.7), or a lower quantile."
)


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


class RunningTemperature:
    """The state behind a spec: owns the digest of losses, over all ranks, of the windows that were merged so far.

    Losses and τ are in nats. Everything is a function of the windows merged, in their order: ranks that merge the same
    windows hold the same τ to the bit.

    Args:
        spec: one of the five specs.
        level: what a loss belongs to: a sample or a token.

    Raises:
        ValueError: an unknown level.
        ImportError: `backend="tdigest"` without the package.
    """

    def __init__(self, spec: Temperature, level: Level = "sample") -> None:
        if level not in _AUTO_FLOOR:
            raise ValueError(f'level must be "sample" or "token", got {level!r}')
        self.spec = spec
        self.level = level
        self.num_samples = 0
        # Finer than the messages of windows: it never travels, and τ is read from it.
        self._digest = Digest(_RUNNING_CENTROIDS)
        uses_package = isinstance(spec, RunningMedian | TargetESS) and spec.backend == "tdigest"
        self._package_digest = _PackageDigest() if uses_package else None

    # -- what the stream must know -----------------------------------------------------------------

    @property
    def needs_scores(self) -> bool:
        """Whether τ depends on losses."""
        return not isinstance(self.spec, FixedTemperature)

    @property
    def warmup_samples(self) -> int:
        """Samples, over all ranks, that the first window must have."""
        return self.spec.warmup_samples if isinstance(self.spec, RunningMedian | TargetESS) else 0

    @property
    def scope(self) -> Scope:
        """What τ is shared by: the stream, a window (over all ranks), or a batch (of one rank)."""
        if isinstance(self.spec, BatchMedian):
            return "batch"
        return "window" if isinstance(self.spec, WindowMedian) else "stream"

    @property
    def floor(self) -> float:
        """The smallest τ, in nats; 0 where τ is fixed."""
        if isinstance(self.spec, FixedTemperature):
            return 0.0
        return _AUTO_FLOOR[self.level] if self.spec.floor == "auto" else float(self.spec.floor)

    # -- τ -----------------------------------------------------------------------------------------

    def tau(self, own: Digest | None = None) -> float:
        """τ of the next window: from the windows merged so far; from its own losses where there are none, or by scope.

        Args:
            own: digest of the window itself, over all ranks.
        """
        if isinstance(self.spec, FixedTemperature):
            return self.spec.value
        if own is not None and own.total_weight > 0 and (self.scope != "stream" or not self._digest.total_weight > 0):
            return max(_tau_of(own, self.spec), self.floor)
        if not self._digest.total_weight > 0:
            return self.floor
        if self._package_digest is not None and isinstance(self.spec, RunningMedian):
            return max(self._package_digest.quantile(self.spec.quantile), self.floor)
        return max(_tau_of(self._digest, self.spec), self.floor)

    @property
    def settled_tau(self) -> float | None:
        """τ of the next window as far as it is known before its losses are: None where they decide."""
        if isinstance(self.spec, FixedTemperature):
            return self.spec.value
        return self.tau() if self.scope == "stream" and self._digest.total_weight > 0 else None

    def batch_tau(self, losses: ArrayLike) -> float:
        """Median of a batch's finite losses `[B]`, for `BatchMedian`.

        Raises:
            ValueError: fewer than 8 losses.
        """
        values = np.asarray(losses, dtype=np.float64).reshape(-1)
        if values.size < _MIN_BATCH:
            raise ValueError(
                f"BatchMedian needs batches of at least {_MIN_BATCH} losses, got {values.size}: "
                "enlarge the batches, or use RunningMedian() or WindowMedian()"
            )
        values = values[np.isfinite(values)]
        return max(float(np.median(values)), self.floor) if values.size else self.floor

    def tau_error(self) -> float:
        """Standard error of τ as an estimate of the source's: 0 where τ is fixed, nan where it is unknown.

        `±1.96` of it covers the true value in nine cases of ten or more. Samples are taken as independent.
        """
        if isinstance(self.spec, FixedTemperature):
            return 0.0
        if isinstance(self.spec, BatchMedian) or not self._digest.total_weight > 0:
            return float("nan")
        if isinstance(self.spec, TargetESS):
            return _target_ess_error(self._digest, _tau_of(self._digest, self.spec))
        return self._digest.standard_error(_quantile_of(self.spec))

    # -- windows -----------------------------------------------------------------------------------

    def window_digest(
        self,
        losses: ArrayLike,
        seed: tuple[int, ...] = (),
        world_size: int = 1,
        sample_index: ArrayLike | None = None,
    ) -> Digest:
        """The digest of a window's finite losses on one rank, decayed within the window if there is a half-life.

        Args:
            losses: `[N]` in the stream's order; NaN and infinite ones are left out, but age the others.
            seed: the window's identity, for a digest that draws random numbers; this one draws none.
            world_size: ranks, which see as many samples at the same time: the ages are counted over all of them.
            sample_index: `[N]` int, the window's sample that each loss belongs to (tokens); 0…N-1 if left out.
        """
        values = np.asarray(losses, dtype=np.float64).reshape(-1)
        finite = np.isfinite(values)
        digest = Digest()
        half_life = self._half_life
        if half_life is None or not values.size:
            digest.add(values[finite])
            return digest
        index = np.arange(values.size) if sample_index is None else np.asarray(sample_index).reshape(-1)
        if index.shape != values.shape:
            raise ValueError(f"one sample index a loss is needed, got {index.size} for {values.size} losses")
        ages = (index.max() - index) * float(world_size)
        digest.add(values[finite], np.exp2(-ages[finite] / half_life))
        return digest

    def update(self, window: Digest, num_samples: int) -> None:
        """Merge the digest of a window, over all ranks: the past decays by the window's length first.

        Args:
            window: merged `window_digest`s of all ranks.
            num_samples: samples in the window over all ranks, whatever their losses.

        Raises:
            ValueError: a negative `num_samples`.
        """
        if num_samples < 0:
            raise ValueError(f"num_samples must not be negative, got {num_samples!r}")
        if self.scope != "stream":
            self._digest = window.copy()
        elif not self._is_frozen:
            decay = 1.0 if self._half_life is None else 2.0 ** (-num_samples / self._half_life)
            if self._package_digest is not None:
                self._package_digest.update(window, decay, f"flowstream {self.num_samples}")
                self._digest = self._package_digest.to_digest()
            else:
                if decay != 1.0:
                    self._digest.scale(decay)
                self._digest.merge(window)
        self.num_samples += num_samples

    @property
    def _half_life(self) -> float | None:
        return self.spec.half_life_samples if isinstance(self.spec, RunningMedian | TargetESS) else None

    @property
    def _is_frozen(self) -> bool:
        limit = self.spec.freeze_after_samples if isinstance(self.spec, RunningMedian | TargetESS) else None
        return limit is not None and self.num_samples >= limit

    # -- advice and state --------------------------------------------------------------------------

    def advice(self, tau: float) -> list[tuple[str, str]]:
        """What a user should hear about this τ, (name, message) each: at its floor, in a gap, or weights uniform."""
        found = []
        if self.needs_scores and tau <= self.floor:
            found.append(("tau_at_floor", _AT_FLOOR.format(floor=self.floor)))
        if self._digest.total_weight > 0:
            q = _quantile_of(self.spec)
            if not isinstance(self.spec, FixedTemperature | TargetESS) and _is_in_gap(self._digest, q):
                low, high = (self._digest.quantile(min(max(q + step, 0.0), 1.0)) for step in (-0.05, 0.05))
                found.append(("tau_in_gap", _IN_GAP.format(tau=tau, low=low, high=high)))
            ess = _ess(self._digest, tau)
            if ess > _UNIFORM_ESS:
                found.append(("weights_nearly_uniform", _UNIFORM.format(ess=ess, tau=tau)))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors (`torch.load(weights_only=True)`)."""
        own = self._digest if self._package_digest is None else self._package_digest
        return {
            "version": _STATE_VERSION,
            "spec": type(self.spec).__name__,
            "level": self.level,
            "backend": "numpy" if self._package_digest is None else "tdigest",
            "num_samples": self.num_samples,
            "digest": own.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, to the bit.

        Raises:
            ValueError: a state of another version, spec, level or backend; nothing is changed then.
        """
        for field in ("version", "spec", "level", "backend"):
            expected = self.state_dict()[field]
            if state.get(field) != expected:
                raise ValueError(f"the temperature's state has {field} {state.get(field)!r}, this stream {expected!r}")
        if self._package_digest is None:
            self._digest = Digest.from_state_dict(state["digest"])
        else:
            self._package_digest = _PackageDigest.from_state_dict(state["digest"])
            self._digest = self._package_digest.to_digest()
        self.num_samples = int(state["num_samples"])


class _PackageDigest:
    """A running `tdigest.TDigest`: fed a window's centroids, in an order and with draws that its seed fixes.

    The package inserts a value in some 30 µs, hence centroids and only so many of them. The sums in its tree depend on
    the order of insertion in their last digits, hence a tree rebuilt after every window: a reloaded one is the same.
    """

    centroids_per_window = 128

    def __init__(self) -> None:
        self._tree = Digest().to_tdigest()
        self._num_values = 0
        self._sum_squares = 0.0

    def update(self, window: Digest, decay: float, seed: str) -> None:
        few = Digest(self.centroids_per_window)
        few.merge(window)
        centroids = list(zip(few.means.tolist(), few.weights.tolist(), strict=True))
        tree = _tree_of([(c["m"], c["c"] * decay) for c in self._tree.centroids_to_list()])
        state = random.getstate()
        try:
            random.seed(seed)
            random.shuffle(centroids)
            for mean, weight in centroids:
                tree.update(mean, weight)
        finally:
            random.setstate(state)
        self._tree = _tree_of([(c["m"], c["c"]) for c in tree.centroids_to_list()])
        self._num_values += window.num_values
        self._sum_squares = self._sum_squares * decay * decay + window.sum_squares

    def quantile(self, q: float) -> float:
        return float(self._tree.percentile(100 * q))

    def to_digest(self) -> Digest:
        return Digest.from_tdigest(self._tree, num_values=self._num_values, sum_squares=self._sum_squares)

    def state_dict(self) -> dict[str, Any]:
        return {
            "centroids": [(c["m"], c["c"]) for c in self._tree.centroids_to_list()],
            "num_values": self._num_values,
            "sum_squares": self._sum_squares,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> _PackageDigest:
        result = cls()
        result._tree = _tree_of(state["centroids"])
        result._num_values, result._sum_squares = state["num_values"], state["sum_squares"]
        return result


def _tree_of(centroids: list[tuple[float, float]]) -> Any:
    """A `tdigest.TDigest` with these (mean, count), those without weight left out, inserted in their order."""
    from tdigest import TDigest
    from tdigest.tdigest import Centroid

    tree = TDigest()
    for mean, count in centroids:
        if count > 0:
            tree.C.insert(mean, Centroid(mean, count))
            tree.n += count
    return tree


def _quantile_of(spec: Temperature) -> float:
    return spec.quantile if isinstance(spec, RunningMedian) else 0.5


def _tau_of(digest: Digest, spec: Temperature) -> float:
    """τ, before its floor, from a digest that is not empty."""
    if isinstance(spec, TargetESS):
        return _target_ess_tau(digest, spec.fraction)
    return digest.quantile(_quantile_of(spec))


def _ess(digest: Digest, tau: float) -> float:
    """ESS/n of weights e^{-f/τ} over a distribution of losses: (E w)² / E w², read off the centroids."""
    means, shares = digest.means, digest.weights / digest.total_weight
    weights = np.exp(-(means - means[0]) / tau)
    return float((shares * weights).sum() ** 2 / (shares * weights**2).sum())


def _target_ess_tau(digest: Digest, fraction: float) -> float:
    """The τ at which ESS/n is `fraction`, by bisection in log τ; ESS/n grows with τ (log E e^{-sf} is convex in s)."""
    span = digest.maximum - digest.minimum
    low, high = np.log(max(span, 1e-300) * 1e-9), np.log(max(span, 1e-300) * 1e9)
    if _ess(digest, np.exp(low)) >= fraction:
        return digest.quantile(0.5)
    for _ in range(60):
        middle = 0.5 * (low + high)
        if _ess(digest, np.exp(middle)) < fraction:
            low = middle
        else:
            high = middle
    return float(np.exp(0.5 * (low + high)))


def _target_ess_error(digest: Digest, tau: float) -> float:
    """Delta method: the standard error of (E w)²/E w² at this τ, over its slope in τ."""
    means, shares = digest.means, digest.weights / digest.total_weight
    weights: NDArray[np.float64] = np.exp(-(means - means[0]) / tau)
    first, second = (shares * weights).sum(), (shares * weights**2).sum()
    influence = 2 * first / second * (weights - first) - (first / second) ** 2 * (weights**2 - second)
    error = np.sqrt((shares * influence**2).sum() / digest.effective_size)
    step = 1e-4
    slope = (_ess(digest, tau * (1 + step)) - _ess(digest, tau * (1 - step))) / (2 * step * tau)
    return float(error / slope) if slope > 0 else float("nan")


def _is_in_gap(digest: Digest, q: float) -> bool:
    """Whether a band about the quantile is far wider, in nats, than the bands beside it, and wide for τ."""
    size = digest.effective_size
    half = max(0.01, size**-0.5) if size else 1.0
    if size < 64 or not 3 * half < q < 1 - 3 * half:
        return False
    nodes = [digest.quantile(q + k * half) for k in (-3, -1, 1, 3)]
    left, middle, right = np.diff(nodes)
    return bool(middle > 5 * max(left, right) and middle > 0.1 * abs(digest.quantile(q)))


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
    if not (isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _check_share(name: str, value: object) -> None:
    if not (isinstance(value, int | float) and 0 < value < 1):
        raise ValueError(f"{name} must lie between 0 and 1, got {value!r}")
