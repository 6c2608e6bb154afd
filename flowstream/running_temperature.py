"""The running state of a temperature, which a stream owns: the losses so far, and the τ they give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from flowstream.advice import advice_on
from flowstream.digest import Digest
from flowstream.digest_message import MAX_VALUES
from flowstream.target_ess import tau_at, tau_error_at
from flowstream.tdigest_backend import PackageDigest
from flowstream.temperature import (
    BatchMedian,
    FixedTemperature,
    RunningMedian,
    TargetESS,
    Temperature,
    WindowMedian,
)

__all__ = ["RunningTemperature"]

Level = Literal["sample", "token"]
Scope = Literal["stream", "window", "batch"]

_AUTO_FLOOR: dict[str, float] = {"sample": 1e-6, "token": 0.05}
_MIN_BATCH = 8
_RUNNING_CENTROIDS = 2000
_STATE_VERSION = 1


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
        self._digest = self._empty()
        uses_package = isinstance(spec, RunningMedian | TargetESS) and spec.backend == "tdigest"
        self._package_digest = PackageDigest() if uses_package else None

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
            return tau_error_at(self._digest, self.tau())
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
        digest = Digest(MAX_VALUES)  # a message's room, so that nothing is averaged on the way there
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
            self._digest = self._empty()
            self._digest.merge(window)
        elif not self._is_frozen:
            decay = 1.0 if self._half_life is None else 2.0 ** (-num_samples / self._half_life)
            if self._package_digest is not None:
                self._package_digest.update(window, decay, f"flowstream {self.num_samples}")
                self._digest = self._package_digest.to_digest()
            else:
                if decay != 1.0:
                    self._digest.scale(decay)
                self._digest.merge(window)
        # τ is read after every window anyway; and a state then holds 2,000 centroids, not 16,000 losses beside them.
        self._digest.compress()
        self.num_samples += num_samples

    def _empty(self) -> Digest:
        # Finer than the messages of windows: it never travels, and τ is read from it.
        return Digest(_RUNNING_CENTROIDS, None if isinstance(self.spec, TargetESS) else _quantile_of(self.spec))

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
        reads_quantile = not isinstance(self.spec, FixedTemperature | TargetESS)
        quantile = _quantile_of(self.spec) if reads_quantile else None
        return advice_on(self._digest, tau, floor=self.floor, quantile=quantile)

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
        ours = self.state_dict()
        for field in ("version", "spec", "level", "backend"):
            if state.get(field) != ours[field]:
                raise ValueError(
                    f"the temperature's state has {field} {state.get(field)!r}, this stream {ours[field]!r}"
                )
        if self._package_digest is None:
            self._digest = Digest.from_state_dict(state["digest"])
        else:
            self._package_digest = PackageDigest.from_state_dict(state["digest"])
            self._digest = self._package_digest.to_digest()
        self.num_samples = int(state["num_samples"])


def _quantile_of(spec: Temperature) -> float:
    return spec.quantile if isinstance(spec, RunningMedian) else 0.5


def _tau_of(digest: Digest, spec: Temperature) -> float:
    """τ, before its floor, from a digest that is not empty."""
    return tau_at(digest, spec.fraction) if isinstance(spec, TargetESS) else digest.quantile(_quantile_of(spec))
