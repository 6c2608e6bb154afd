"""What weights did to a batch, a window, a run: effective sample size and mean weights, from sums that add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["WeightSums", "ess_fraction"]


def ess_fraction(sum_w: float, sum_w2: float, n: float) -> float:
    """Kish's effective sample size over the number of samples, (Σw)²/(n Σw²), in (0, 1]; nan where nothing has weight.

    Over ranks, add the three sums first: a mean of ranks' fractions is not the fraction of the whole.
    Source: Kish 1965, "Survey Sampling".
    """
    return min(sum_w * sum_w / (n * sum_w2), 1.0) if n > 0 and sum_w2 > 0 else float("nan")


@dataclass(frozen=True)
class WeightSums:
    """Sums over weighted samples. `a + b` is the sums of both, so that windows and ranks add up."""

    num: float = 0.0
    """Samples that have a weight: finite loss, at least one label."""
    total: float = 0.0
    """Σ w_i."""
    total_squares: float = 0.0
    """Σ w_i²."""
    num_tokens: float = 0.0
    """Σ n_i, n_i the labelled tokens of sample i."""
    token_total: float = 0.0
    """Σ w_i n_i."""
    nonfinite: float = 0.0
    """Samples whose loss is NaN or infinite: in no sum above."""
    empty: float = 0.0
    """Samples without a label: in no sum above."""

    @classmethod
    def of(cls, weights: ArrayLike, counts: ArrayLike | None = None) -> WeightSums:
        """The sums over samples of finite loss; those whose loss is not are the caller's to leave out and to count.

        Args:
            weights: `[B]`, any float type.
            counts: `[B]`, labelled tokens of each sample, 0 for an empty one; 1 each if left out.

        Raises:
            ValueError: shapes that differ, or a weight that is negative or not finite.
        """
        w = np.asarray(weights, dtype=np.float64).reshape(-1)
        n = np.ones_like(w) if counts is None else np.asarray(counts, dtype=np.float64).reshape(-1)
        if w.shape != n.shape:
            raise ValueError(f"one count a weight is needed, got {w.size} weights and {n.size} counts")
        num_rows, labelled = w.size, n > 0
        w, n = w[labelled], n[labelled]
        wrong = ~(np.isfinite(w) & (w >= 0))
        if wrong.any():
            raise ValueError(f"weights must be finite and not negative, got {w[wrong][0]} among {w.size}")
        return cls(
            num=float(w.size),
            total=float(w.sum()),
            total_squares=float((w * w).sum()),
            num_tokens=float(n.sum()),
            token_total=float((w * n).sum()),
            empty=float(num_rows - w.size),
        )

    def __add__(self, other: WeightSums) -> WeightSums:
        return WeightSums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def mean_weight(self) -> float:
        """Σw/n; nan when no sample was seen."""
        return self.total / self.num if self.num else float("nan")

    @property
    def token_mean_weight(self) -> float:
        """Σ w_i n_i / Σ n_i; nan when no token was seen."""
        return self.token_total / self.num_tokens if self.num_tokens else float("nan")

    @property
    def ess(self) -> float:
        """`ess_fraction` of these sums."""
        return ess_fraction(self.total, self.total_squares, self.num)

    def state_dict(self) -> dict[str, float]:
        """The sums by name, plain floats."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, float]) -> WeightSums:
        """The sums that `state_dict` described.

        Raises:
            ValueError: a sum that is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if set(state) != names:
            raise ValueError(f"a state of WeightSums needs {sorted(names)}, got {sorted(state)}")
        return cls(**{name: float(value) for name, value in state.items()})
