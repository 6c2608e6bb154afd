"""The theory behind the weights: Theorem 7.2 and the entropic view of Sanyal et al., and its mirror, with our parts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import flowstream as fs

NUM_STREAMS, NUM_BATCHES, BATCH, DIMENSIONS = 16, 16, 1024, 5
ETA, STEPS = 0.2, 25


@dataclass(frozen=True)
class Setting:
    """y = ⟨θ*, x⟩ before, ỹ = ⟨θ̃*, x̃⟩ with x̃ ~ N(0, Σ̃) when fine-tuned: what the theorem says of them."""

    rho: float
    quantile: float
    """Which quantile of the losses is τ: the theorem holds for every τ, the method takes the median."""

    @property
    def before(self) -> Tensor:
        return torch.tensor([1.0, -0.5, 0.25, 2.0, 0.0], dtype=torch.float64)

    @property
    def after(self) -> Tensor:
        return torch.tensor([0.2, 0.3, -0.4, 1.1, 0.6], dtype=torch.float64)

    @property
    def directions(self) -> tuple[Tensor, Tensor]:
        """ē along θ* - θ̃*, and a unit vector orthogonal to it."""
        along = self.before - self.after
        along = along / along.norm()
        across = torch.eye(DIMENSIONS, dtype=torch.float64)[0]
        across = across - (across @ along) * along
        return along, across / across.norm()

    @property
    def covariance(self) -> Tensor:
        along, across = self.directions
        return torch.eye(DIMENSIONS, dtype=torch.float64) + self.rho * (along.outer(across) + across.outer(along))

    @property
    def mu(self) -> float:
        """(τ/(τ + 2E))^½ at τ = that quantile of (eᵀx̃)², which is E times a χ² of one degree of freedom."""
        normal = torch.distributions.Normal(0.0, 1.0)
        ratio = float(normal.icdf(torch.tensor((1 + self.quantile) / 2, dtype=torch.float64))) ** 2
        return math.sqrt(ratio / (ratio + 2))

    @property
    def second_moment(self) -> Tensor:
        """E[w x̃x̃ᵀ] = μ(I - Q)."""
        along, across = self.directions
        shrunk = 1 - self.mu**2
        q = shrunk * along.outer(along) + self.rho**2 * shrunk * across.outer(across)
        q = q - self.rho * self.mu**2 * (along.outer(across) + across.outer(along))
        return self.mu * (torch.eye(DIMENSIONS, dtype=torch.float64) - q)

    def path(self, steps: int) -> Tensor:
        """θ_K = θ̃* + (I - 2η E[w x̃x̃ᵀ])^K e."""
        step = torch.eye(DIMENSIONS, dtype=torch.float64) - 2 * ETA * self.second_moment
        return self.after + torch.linalg.matrix_power(step, steps) @ (self.before - self.after)


def streamed(setting: Setting, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [n, d], targets [n] and weights [n], as a stream with its own policy and running median gives them."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(NUM_BATCHES * BATCH, DIMENSIONS, generator=draws, dtype=torch.float64)
    x = x @ torch.linalg.cholesky(setting.covariance).T
    y = x @ setting.after
    scorer = fs.FunctionScorer(lambda batch: (batch[1] - batch[0] @ setting.before) ** 2)
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    stream = fs.FlowStream(batches, scorer, temperature=fs.RunningMedian(quantile=setting.quantile), window=2)
    inputs, targets, weights = (torch.cat(parts) for parts in zip(*stream, strict=True))
    return inputs, targets, weights.double()


def descend(setting: Setting, x: Tensor, y: Tensor, weight: Tensor) -> list[Tensor]:
    """θ after each step of gradient descent on the mean weighted squared error, from θ*."""
    theta = torch.nn.Parameter(setting.before.clone())
    optimizer = torch.optim.SGD([theta], lr=ETA)
    path = []
    for _ in range(STEPS):
        (weight * (x @ theta - y) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        path.append(theta.detach().clone())
    return path


def check_within_error(found: list[Tensor], expected: Tensor, *, largest: float) -> None:
    """The mean over independent streams is what was expected, within their own error, which is small enough to tell."""
    each = torch.stack(found)
    error = each.std(0) / math.sqrt(len(found))
    assert error.max() < largest
    assert ((each.mean(0) - expected).abs() <= 4.5 * error + 1e-4).all()


@pytest.mark.parametrize("setting", [Setting(0.0, 0.5), Setting(0.6, 0.5), Setting(0.6, 0.25)], ids=str)
def test_weights_of_a_stream_give_the_moments_and_the_path_of_theorem_7_2(setting: Setting) -> None:
    streams = [streamed(setting, seed) for seed in range(NUM_STREAMS)]
    check_within_error([w.mean() for _, _, w in streams], torch.tensor(setting.mu), largest=0.003)
    moments = [(w[:, None] * x).T @ x / len(x) for x, _, w in streams]
    check_within_error(moments, setting.second_moment, largest=0.004)
    paths = [descend(setting, *stream) for stream in streams]
    for steps in (1, 5, STEPS):
        check_within_error([path[steps - 1] for path in paths], setting.path(steps), largest=0.008)


def test_the_fixture_of_the_median_is_the_papers() -> None:
    assert Setting(0.0, 0.5).mu == pytest.approx(0.430482, abs=1e-6)
    assert Setting(0.0, 0.5).mu ** 2 == pytest.approx(0.185315, abs=1e-6)


def test_the_moments_tell_another_temperature_and_another_correlation_apart() -> None:
    """The check of the theorem has the power to fail."""
    setting = Setting(0.6, 0.5)
    x, _, weight = streamed(setting, 0)
    moment = (weight[:, None] * x).T @ x / len(x)
    assert (moment - Setting(0.6, 0.45).second_moment).abs().max() > 0.01
    assert (moment - Setting(0.5, 0.5).second_moment).abs().max() > 0.01


def entropic(pi: Tensor, loss: Tensor, tau: float) -> Tensor:
    """Σ π f + τ Σ π log π, in nats, of each row of π."""
    return (pi * loss).sum(-1) + tau * torch.special.xlogy(pi, pi).sum(-1)


@pytest.mark.parametrize(
    ("policy", "sign"), [(fs.Flow(), 1), (fs.HardFirst(max_weight=1e6), -1)], ids=["flow", "mirror"]
)
def test_weights_solve_the_entropic_problem_and_the_opposite_tilt_its_mirror(
    policy: fs.policies.Policy, sign: int
) -> None:
    """w/Σw minimises Σπf + τΣπ log π; e^{+f/τ} is what the adversary of DRO takes: f with its sign turned."""
    draws = torch.Generator().manual_seed(0)
    loss = torch.rand(12, generator=draws, dtype=torch.float64) * 3
    tau = float(loss.median())
    weight = policy(loss, tau).double()
    ours = weight / weight.sum()
    assert entropic(ours, sign * loss, tau) == pytest.approx(
        -tau * float(torch.logsumexp(-sign * loss / tau, 0)), rel=1e-6
    )
    # No other distribution does better: random ones, and those next to ours.
    others = -torch.rand(5000, 12, generator=draws, dtype=torch.float64).log()
    others = others / others.sum(1, keepdim=True)
    near = ours + 1e-3 * (others - ours)
    assert (entropic(torch.cat([others, near]), sign * loss, tau) > entropic(ours, sign * loss, tau)).all()
    # And a minimiser that knows nothing of the closed form ends there.
    logits = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], lr=1.0, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16)

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = entropic(logits.softmax(0), sign * loss, tau)
        value.backward()
        return value

    optimizer.step(objective)
    assert (logits.detach().softmax(0) - ours).abs().max() < 1e-6
