"""Policies: weights against closed forms in numpy, the shuffled control, and what a user's callable may return."""

import dataclasses
import doctest
import functools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from flowstream import policies
from flowstream.policies import (
    Flow,
    HardFirst,
    Permuted,
    Probability,
    Threshold,
    Uniform,
    check_weight,
    describe,
    needs_scores,
)

SEED = (0, 1, 2, 3)
no_deadline = settings(deadline=None)
ALL = [Flow(), Uniform(), HardFirst(10.0), Threshold(0.916), Probability(), Permuted(Flow())]
losses = npst.arrays(
    np.float32, npst.array_shapes(max_dims=3, max_side=5), elements=st.floats(0, 1e4, width=32, allow_subnormal=False)
)
taus = st.floats(1e-6, 1e6)


def test_docstring_examples_run():
    assert doctest.testmod(policies).failed == 0


@no_deadline
@given(losses, taus)
def test_flow_equals_exp_of_minus_loss_over_tau(loss, tau):
    weight = Flow()(torch.from_numpy(loss), tau).numpy()
    assert weight.dtype == np.float32
    np.testing.assert_allclose(weight, np.exp(-loss.astype(np.float64) / tau), rtol=1e-6, atol=1e-37)


@no_deadline
@given(losses, taus, st.floats(0.01, 1e6))
def test_hard_first_equals_the_capped_opposite_tilt_and_never_overflows(loss, tau, max_weight):
    weight = HardFirst(max_weight)(torch.from_numpy(loss), tau).numpy()
    exponent = np.minimum(loss.astype(np.float64) / tau, 700.0)
    np.testing.assert_allclose(weight, np.minimum(np.exp(exponent), max_weight), rtol=1e-6)


@no_deadline
@given(losses)
def test_threshold_and_probability_ignore_tau(loss):
    tensor = torch.from_numpy(loss)
    np.testing.assert_array_equal(Threshold(0.916)(tensor, math.nan).numpy(), (loss <= np.float32(0.916)))
    np.testing.assert_allclose(
        Probability()(tensor, math.nan).numpy(), np.exp(-loss.astype(np.float64)), rtol=1e-6, atol=1e-37
    )


def test_uniform_is_one_and_needs_no_scores():
    assert Uniform()(torch.zeros(2, 3), math.nan).equal(torch.ones(2, 3))
    assert not needs_scores(Uniform())
    assert not needs_scores(Permuted(Uniform()))
    assert all(needs_scores(p) for p in ALL if p != Uniform())
    assert needs_scores(lambda loss, tau: loss)


@pytest.mark.parametrize("policy", ALL, ids=describe)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_every_policy_keeps_the_shape_and_gives_fp32(policy, dtype):
    loss = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    for tau in (0.7, torch.tensor(0.7), torch.full((3, 1), 0.7), np.float64(0.7)):
        weight = policy(loss, tau)
        assert weight.shape == loss.shape
        assert weight.dtype == torch.float32
        check_weight(weight, loss)
        torch.testing.assert_close(weight, policy(loss, 0.7))


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, torch.tensor(0.0), torch.tensor([1.0, math.nan])])
@pytest.mark.parametrize("policy", [Flow(), HardFirst(2.0)], ids=describe)
def test_tau_that_is_not_above_zero_is_refused(policy, tau):
    with pytest.raises(ValueError, match="a temperature is above 0"):
        policy(torch.ones(2), tau)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_hard_first_refuses_a_cap_that_caps_nothing(value):
    with pytest.raises(ValueError, match="finite number above 0"):
        HardFirst(value)


@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_threshold_refuses_what_no_loss_meets(value):
    with pytest.raises(ValueError, match="in nats"):
        Threshold(value)


# Permuted


def window(num_batches=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4,), (3,), (2, 5), (0,), (6,)][:num_batches]
    weights = [torch.rand(shape, generator=generator) for shape in shapes]
    valid = [torch.rand(shape, generator=generator) < 0.7 for shape in shapes]
    return weights, valid


def test_permuting_keeps_the_windows_weights_and_leaves_invalid_entries_alone():
    weights, valid = window()
    before = [w.clone() for w in weights]
    permuted = Permuted(Flow()).permute(weights, valid, SEED)
    pool, shuffled = (torch.cat([w[v] for w, v in zip(ws, valid, strict=True)]) for ws in (weights, permuted))
    assert not pool.equal(shuffled)
    assert pool.sort().values.equal(shuffled.sort().values)
    for w, p, v in zip(weights, permuted, valid, strict=True):
        assert p.shape == w.shape
        assert p[~v].equal(w[~v])
    assert all(w.equal(b) for w, b in zip(weights, before, strict=True)), "the arguments were written to"


def test_permuting_crosses_batches():
    weights, valid = [torch.zeros(50), torch.ones(50)], [torch.ones(50, dtype=torch.bool)] * 2
    first, second = Permuted(Flow()).permute(weights, valid, SEED)
    assert 0 < first.sum() < 50
    assert first.sum() + second.sum() == 50


@pytest.mark.parametrize("other", [(1, 1, 2, 3), (0, 0, 2, 3), (0, 1, 3, 3), (0, 1, 2, 0), (0, 1, 2), (0, 1, 2, 3, 0)])
def test_permuting_is_a_pure_function_of_the_seed(other):
    weights, valid = [torch.arange(64.0)], [torch.ones(64, dtype=torch.bool)]
    policy = Permuted(Flow())
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    (once,), (again,), (elsewhere,) = (policy.permute(weights, valid, seed) for seed in (SEED, SEED, other))
    assert once.equal(again)
    assert not once.equal(elsewhere)
    assert state[0].equal(torch.random.get_rng_state())
    assert (state[1] == np.random.get_state()[1]).all()


def test_permuting_carries_no_information_about_place():
    """Over many windows each weight lands in each place equally often (largest of 64 z-scores)."""
    weights, valid = [torch.arange(8.0)], [torch.ones(8, dtype=torch.bool)]
    num_windows = 4000
    counts = np.zeros((8, 8))
    for w in range(num_windows):
        (permuted,) = Permuted(Flow()).permute(weights, valid, (0, 0, w, 0))
        counts[np.arange(8), permuted.long().numpy()] += 1
    z = (counts - num_windows / 8) / math.sqrt(num_windows * (1 / 8) * (7 / 8))
    assert abs(z).max() < 4.5


def test_permuting_nothing_is_nothing():
    assert Permuted(Flow()).permute([], [], SEED) == []
    (kept,) = Permuted(Flow()).permute([torch.ones(3)], [torch.zeros(3, dtype=torch.bool)], SEED)
    assert kept.equal(torch.ones(3))


def test_permuting_refuses_masks_of_another_shape():
    with pytest.raises(ValueError, match=r"weights of shapes \[\[3\]\] and valid of shapes \[\[2\]\]"):
        Permuted(Flow()).permute([torch.ones(3)], [torch.ones(2, dtype=torch.bool)], SEED)


# What a user's callable returns


def test_check_weight_gives_fp32_without_gradient_and_zero_where_the_loss_is_not_finite():
    loss = torch.tensor([1.0, math.nan, math.inf])
    weight = torch.tensor([0.5, math.nan, 7.0], dtype=torch.float64, requires_grad=True)
    checked = check_weight(weight, loss)
    assert checked.equal(torch.tensor([0.5, 0.0, 0.0]))
    assert checked.dtype == torch.float32
    assert not checked.requires_grad


@pytest.mark.parametrize(
    ("weight", "found"),
    [
        (0.5, "float, not a tensor"),
        (np.ones(2, np.float32), "ndarray, not a tensor"),
        (None, "NoneType, not a tensor"),
        (torch.ones(2, 1), r"shape \[2, 1\] for losses \[2\]"),
        (torch.ones(2, dtype=torch.bool), r"dtype torch.bool"),
        (torch.tensor([1.0, -0.5]), r"weight -0.5 for a loss of 2 nats \(1 of 2"),
        (torch.tensor([math.nan, 1.0]), "weight nan for a loss of 1 nats"),
        (torch.tensor([1.0, math.inf]), "weight inf for a loss of 2 nats"),
        (torch.tensor([1e300, 1.0], dtype=torch.float64), "weight inf for a loss of 1 nats"),
    ],
)
def test_check_weight_says_what_it_found(weight, found):
    with pytest.raises(ValueError, match=found) as error:
        check_weight(weight, torch.tensor([1.0, 2.0]))
    assert "; return a floating tensor of the loss's shape" in str(error.value)


# Names for the configuration's hash


@dataclasses.dataclass(frozen=True)
class Tempered:
    power: float
    inner: object

    def __call__(self, loss, tau):
        return self.inner(loss, tau) ** self.power


class Plain:
    def __call__(self, loss, tau):
        return loss


def my_policy(loss, tau, scale=1.0):
    return scale * loss


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        (Flow(), "Flow()"),
        (HardFirst(max_weight=10.0), "HardFirst(max_weight=10.0)"),
        (Permuted(Threshold(0.916)), "Permuted(policy=Threshold(max_loss=0.916))"),
        (my_policy, f"{__name__}.my_policy"),
        (Permuted(my_policy), f"Permuted(policy={__name__}.my_policy)"),
        (Plain(), f"{__name__}.Plain"),
        (Tempered(0.5, Flow()), f"{__name__}.Tempered(power=0.5, inner=Flow())"),
        (functools.partial(my_policy, scale=2.0), f"partial({__name__}.my_policy, scale=2.0)"),
        (torch.nn.Identity(), "torch.nn.modules.linear.Identity"),
    ],
)
def test_describe_names_a_policy_without_its_address(policy, name):
    assert describe(policy) == name


def test_built_in_policies_are_described_by_their_repr():
    for policy in ALL:
        assert describe(policy) == repr(policy)
    assert len({describe(policy) for policy in ALL}) == len(ALL)


def test_another_process_draws_the_same_permutation():
    code = (
        "import torch; from flowstream.policies import *;"
        "print(Permuted(Flow()).permute([torch.arange(9.)], [torch.ones(9, dtype=torch.bool)], (0, 1, 2, 3)))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    here = Permuted(Flow()).permute([torch.arange(9.0)], [torch.ones(9, dtype=torch.bool)], SEED)
    assert there == str(here)
