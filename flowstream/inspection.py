"""What a data set's losses would make of the weights: a row for each of several τ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from flowstream.advice import advice_on
from flowstream.digest import Digest
from flowstream.metrics import WeightSums
from flowstream.policies import Flow
from flowstream.target_ess import tau_at

_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
_FRACTIONS = (0.7, 0.5)
_FLOOR = 1e-6
"""As a stream's, in nats."""


@dataclass(frozen=True, kw_only=True)
class Tilt:
    """What FLOW's weights e^{-f/τ} are at one τ."""

    name: str
    """How a run would choose this τ."""
    tau: float
    mean_weight: float
    ess: float
    """Effective sample size over the number of samples."""
    smallest: float
    largest: float
    hard_share: float
    """Share of all weight on the harder half of the samples; .5 where weights do not tell them apart."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A data set's losses under a reference, and what FLOW would do with them."""

    losses: NDArray[np.float64]
    """`[n]` in nats, in the order of the data; nan or infinite where the reference has none."""
    tilts: tuple[Tilt, ...]
    """By τ as quantile of the losses, then by effective sample size; the median's is what a stream takes by default."""
    advice: tuple[str, ...]
    """What a stream at the median would tell of its τ."""

    @property
    def finite(self) -> NDArray[np.float64]:
        """The losses that are finite, ascending."""
        return np.sort(self.losses[np.isfinite(self.losses)])

    @property
    def median(self) -> float:
        """τ of FLOW."""
        return float(np.median(self.finite))

    def weights(self, tau: float) -> NDArray[np.float64]:
        """FLOW's weight `[n]` of each sample; 0 where its loss is not finite."""
        return _weights(np.where(np.isfinite(self.losses), self.losses, np.inf), tau)

    def easiest(self, num: int) -> list[int]:
        """Positions of the samples of smallest loss, the easiest first; ties in the order of the data."""
        return self._order()[:num]

    def hardest(self, num: int) -> list[int]:
        """Positions of the samples of largest loss, the hardest first, none of them among so many easiest ones."""
        order = self._order()
        return order[max(len(order) - num, num) :][::-1]

    def _order(self) -> list[int]:
        order = np.argsort(self.losses, kind="stable")
        return [int(position) for position in order[np.isfinite(self.losses[order])]]


def inspect_losses(losses: ArrayLike) -> Inspection:
    """Weigh losses `[n]`, in nats, at the τ of several quantiles and of several effective sample sizes.

    Raises:
        ValueError: none of them is finite.
    """
    values = np.asarray(losses, dtype=np.float64).reshape(-1)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError(
            f"none of the {values.size} losses is finite: the model's outputs are NaN, or no sample has a label. "
            "Leave --bf16 out, or take another model"
        )
    digest = Digest(max(8, finite.size))  # a centroid a loss: nothing is averaged
    digest.add(finite)
    taus = {_name_of(q): float(np.quantile(finite, q)) for q in _QUANTILES}
    taus |= {f"ESS/n {fraction:g}": tau_at(digest, fraction) for fraction in _FRACTIONS}
    advice = advice_on(digest, max(taus[_name_of(0.5)], _FLOOR), floor=_FLOOR, quantile=0.5)
    return Inspection(
        losses=values,
        tilts=tuple(_tilt(name, max(tau, _FLOOR), np.sort(finite)) for name, tau in taus.items()),
        advice=tuple(message for _, message in advice),
    )


def _tilt(name: str, tau: float, ascending: NDArray[np.float64]) -> Tilt:
    weights = _weights(ascending, tau)
    sums = WeightSums.of(weights)
    half, middle = divmod(weights.size, 2)
    hard = weights[half + middle :].sum() + (0.5 * weights[half] if middle else 0.0)
    return Tilt(
        name=name,
        tau=tau,
        mean_weight=sums.mean_weight,
        ess=sums.ess,
        smallest=float(weights.min()),
        largest=float(weights.max()),
        hard_share=float(hard / sums.total) if sums.total > 0 else float("nan"),
    )


def _weights(losses: NDArray[np.float64], tau: float) -> NDArray[np.float64]:
    weights: NDArray[np.float64] = Flow()(torch.from_numpy(losses), tau).double().numpy()
    return weights


def _name_of(quantile: float) -> str:
    return "median" if quantile == 0.5 else f"{100 * quantile:.0f} % quantile"
