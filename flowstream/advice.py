"""What a user is told about τ, once each: that it is at its floor, in a gap of the losses, or too large to weigh."""

from __future__ import annotations

import numpy as np

from flowstream.digest import Digest
from flowstream.target_ess import ess_at

__all__ = ["advice_on"]

_UNIFORM_ESS = 0.97

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
    "ESS/n is {ess:.3f} at τ = {tau:.4g} nats: the weights are nearly uniform and carry no information. Weighting is "
    "then training with a smaller step, resampling a random part of the data. Try a stronger reference, or a smaller "
    "τ, such as TargetESS(0.7) with normalize=True (on the command line --target-ess 0.7 --normalize)."
)


def advice_on(
    losses: Digest, tau: float, *, floor: float = 0.0, quantile: float | None = None
) -> list[tuple[str, str]]:
    """What there is to say about τ, (name, message) each; a name is for telling a message once.

    Args:
        losses: the running distribution; where it is empty, τ is compared with its floor only.
        tau: τ in nats.
        floor: the smallest τ, in nats; 0 where τ is fixed.
        quantile: the share of the losses that τ is the quantile of; None where it is none.
    """
    found = []
    if tau <= floor:
        found.append(("tau_at_floor", _AT_FLOOR.format(floor=floor)))
    if not losses.total_weight > 0:
        return found
    if quantile is not None and _is_in_gap(losses, quantile):
        low, high = (losses.quantile(min(max(quantile + step, 0.0), 1.0)) for step in (-0.05, 0.05))
        found.append(("tau_in_gap", _IN_GAP.format(tau=tau, low=low, high=high)))
    ess = ess_at(losses, tau)
    if ess > _UNIFORM_ESS:
        found.append(("weights_nearly_uniform", _UNIFORM.format(ess=ess, tau=tau)))
    return found


def _is_in_gap(digest: Digest, q: float) -> bool:
    """Whether a band about the quantile is far wider, in nats, than the bands beside it, and wide for τ."""
    size = digest.effective_size
    half = max(0.01, size**-0.5) if size else 1.0
    if size < 64 or not 3 * half < q < 1 - 3 * half:
        return False
    nodes = [digest.quantile(q + k * half) for k in (-3, -1, 1, 3)]
    left, middle, right = np.diff(nodes)
    return bool(middle > 5 * max(left, right) and middle > 0.1 * abs(digest.quantile(q)))
