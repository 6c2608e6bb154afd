"""KL-DRO of the current losses: value, gradient and stability, against definitions."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from companions.loops import NUM_STEPS, assert_alike, batches, llama, moved, sample_losses, stream_of
from torch import Tensor

from flowstream.companions import dro
from flowstream.companions.dro import Dro


def losses(num: int = 6, scale: float = 1.0) -> Tensor:
    return (torch.rand(num, generator=torch.Generator().manual_seed(0)) * 3 * scale).requires_grad_()


def test_docstring_examples_run() -> None:
    assert doctest.testmod(dro).failed == 0


def test_a_loop_over_a_stream_equals_the_loop_by_hand() -> None:
    model, twin = llama(), llama()
    stream, optimizer = stream_of(model), torch.optim.SGD(model.parameters(), lr=0.02)
    robust = Dro(0.5)  # companion
    for batch in stream:
        labels = batch.pop("labels")
        batch.pop("flow_weight")
        robust.lm_loss(model(**batch).logits, labels).backward()  # companion
        optimizer.step()
        optimizer.zero_grad()

    plain = torch.optim.SGD(twin.parameters(), lr=0.02)
    for batch in batches(NUM_STEPS):
        current = sample_losses(twin, batch["input_ids"])
        weight = torch.softmax(current.detach() / 0.5, 0)  # e^{+f/τ} / Σ, of the current losses
        (weight * current).sum().backward()
        plain.step()
        plain.zero_grad()
    assert_alike(model, twin)
    assert moved(model, llama()) > 1e-3


@pytest.mark.parametrize("tau", [0.05, 1.0, 50.0])
def test_value_and_gradient_are_the_definition(tau: float) -> None:
    f = losses()
    value = Dro(tau)(f)
    value.backward()
    exact = f.detach().double().numpy()
    wanted = tau * np.log(np.mean(np.exp((exact - exact.max()) / tau))) + exact.max()
    assert float(value.detach()) == pytest.approx(wanted, rel=1e-6)
    assert f.grad is not None
    torch.testing.assert_close(f.grad, torch.softmax(f.detach() / tau, 0))
    step = 1e-5
    for place in range(len(f)):
        high, low = exact.copy(), exact.copy()
        high[place] += step
        low[place] -= step
        slope = (tau * np.log(np.mean(np.exp(high / tau))) - tau * np.log(np.mean(np.exp(low / tau)))) / (2 * step)
        assert float(f.grad[place]) == pytest.approx(slope, abs=1e-6)


def test_no_distribution_on_the_batch_does_worse_than_its_value() -> None:
    f, tau = losses().detach(), 0.7
    generator = torch.Generator().manual_seed(1)
    others = torch.softmax(3 * torch.randn(500, len(f), generator=generator), 1)
    best = torch.softmax(f / tau, 0)[None]

    def objective(weights: Tensor) -> Tensor:
        divergence = (weights * (weights.clamp(min=1e-30) * len(f)).log()).sum(1)
        return (weights * f).sum(1) - tau * divergence

    value = Dro(tau)(f)
    torch.testing.assert_close(objective(best)[0], value)
    assert bool((objective(others) <= value + 1e-6).all())


def test_it_goes_from_the_largest_loss_to_the_mean() -> None:
    f = losses().detach()
    torch.testing.assert_close(Dro(1e-3)(f), f.max(), atol=3e-3, rtol=0)
    torch.testing.assert_close(Dro(1e4)(f), f.mean(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_finite_at_a_ratio_of_ten_thousand(dtype: torch.dtype) -> None:
    f = torch.tensor([0.0, 50.0, 100.0], dtype=dtype, requires_grad=True)
    value = Dro(0.01)(f)
    value.backward()
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(100.0 - 0.01 * math.log(3), rel=1e-5)
    assert f.grad is not None
    assert f.grad.tolist() == [0.0, 0.0, 1.0]


def test_samples_without_a_label_are_left_out() -> None:
    logits = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(1))
    labels[1] = -100
    labels[2, :3] = -100
    with torch.no_grad():
        logits[1] = math.nan
    value = Dro(0.5).lm_loss(logits, labels)
    wanted = []
    for row in (0, 2, 3):
        kept = [t for t in range(4) if labels[row, t + 1] != -100]
        wanted.append(F.cross_entropy(logits[row, kept], labels[row, 1:][kept]))
    torch.testing.assert_close(value, 0.5 * torch.stack(wanted).div(0.5).exp().mean().log())
    value.backward()
    assert logits.grad is not None
    assert bool((logits.grad[1] == 0).all())
    assert bool(torch.isfinite(logits.grad).all())


def test_cross_entropy_takes_classes_and_probabilities() -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = torch.tensor([0, 2, -100, 1, 1])
    kept = target != -100
    hard = F.cross_entropy(logits[kept], target[kept], reduction="none")
    torch.testing.assert_close(Dro(0.5).cross_entropy(logits, target), 0.5 * hard.div(0.5).exp().mean().log())
    soft = torch.softmax(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), 1)
    each = F.cross_entropy(logits, soft, reduction="none")
    torch.testing.assert_close(Dro(0.5).cross_entropy(logits, soft), 0.5 * each.div(0.5).exp().mean().log())


def test_without_any_label_loss_and_gradient_are_zero() -> None:
    logits = torch.full((2, 4, 5), math.nan, requires_grad=True)
    classes = torch.randn(2, 5, requires_grad=True)
    value = Dro(1.0).lm_loss(logits, torch.full((2, 4), -100))
    value = value + Dro(1.0).cross_entropy(classes, torch.full((2,), -100)) + Dro(1.0)(torch.zeros(0))
    value.backward()
    assert float(value.detach()) == 0
    for given in (logits, classes):
        assert given.grad is not None
        assert bool((given.grad == 0).all())


def test_what_cannot_be_is_refused() -> None:
    for temperature in (0.0, -1.0, math.inf, math.nan, True):
        with pytest.raises(ValueError, match="temperature is"):
            Dro(temperature)
    with pytest.raises(ValueError, match=r"losses have shape \[2, 2\]"):
        Dro(1.0)(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"losses .* torch.int64"):
        Dro(1.0)(torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels \[2, 5\]"):
        Dro(1.0).lm_loss(torch.zeros(2, 4, 5), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="label 9 is outside the 5 classes"):
        Dro(1.0).cross_entropy(torch.zeros(2, 5), torch.tensor([9, 0]))
    with pytest.raises(ValueError, match="target \\[2, 5\\] of torch.int64"):
        Dro(1.0).cross_entropy(torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.long))
