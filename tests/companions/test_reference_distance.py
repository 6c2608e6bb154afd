"""The pull to the reference: equal to plain loops, in the loss and decoupled, whatever wraps the model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from companions.loops import assert_alike, by_hand, frozen_copy, llama, moved, stream_of, trainable
from torch import Tensor, nn

import flowstream as fs
from flowstream.companions import reference_distance
from flowstream.companions.mofo import MoFO
from flowstream.companions.reference_distance import DistanceToReference

peft = pytest.importorskip("peft")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.frozen = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.frozen(self.embed(ids)))


def linear(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def nudged(model: nn.Module, seed: int = 1) -> nn.Module:
    """Each trainable entry moved a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_penalised_loop_equals_the_loop_by_hand(norm: Any, shared: bool) -> None:
    model, twin, frozen = llama(), llama(), frozen_copy(llama())
    stream, strength = stream_of(model), {"l2": 50.0, "l1": 5.0}[norm]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    distance = DistanceToReference(
        model, norm=norm, strength=strength, reference=frozen if shared else None
    )  # companion
    for batch in stream:
        labels, weight = batch.pop("labels"), batch.pop("flow_weight")
        loss = fs.weighted_lm_loss(model(**batch).logits, labels, weight)
        loss = loss + distance.penalty()  # companion
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    num = sum(p.numel() for p in twin.parameters())

    def step(loss: Tensor) -> None:
        plain.zero_grad()
        loss.backward()
        for p, s in zip(twin.parameters(), frozen.parameters(), strict=True):
            p.grad += strength / num * (2 * (p - s) if norm == "l2" else (p - s).sign()).detach()
        plain.step()

    by_hand(twin, frozen, step)
    assert_alike(model, twin)
    assert moved(model, frozen) > 1e-3


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_decoupled_loop_equals_the_loop_by_hand_under_a_schedule(norm: Any) -> None:
    model, twin, frozen = llama(), llama(), frozen_copy(llama())
    stream, strength = stream_of(model), {"l2": 100.0, "l1": 0.1}[norm]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, eps=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
    DistanceToReference(model, norm=norm, strength=strength).decouple(optimizer)  # companion
    for batch in stream:
        labels, weight = batch.pop("labels"), batch.pop("flow_weight")
        fs.weighted_lm_loss(model(**batch).logits, labels, weight).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    plain = torch.optim.AdamW(twin.parameters(), lr=2e-3, weight_decay=0.01, eps=1e-3)
    lowering = torch.optim.lr_scheduler.LinearLR(plain, 1.0, 0.1, 10)

    @torch.no_grad()
    def pull() -> None:
        rate = plain.param_groups[0]["lr"] * strength
        for p, s in zip(twin.parameters(), frozen.parameters(), strict=True):
            if norm == "l2":
                p.sub_(rate * (p - s))
            else:  # soft threshold
                p.copy_(s + (p - s).sign() * ((p - s).abs() - rate).clamp(min=0))

    def step(loss: Tensor) -> None:
        plain.zero_grad()
        loss.backward()
        plain.step()
        pull()
        lowering.step()

    by_hand(twin, frozen, step)
    assert_alike(model, twin)
    assert moved(model, frozen) > 1e-3
    if norm == "l1":
        at_start = sum(int((p == s).sum()) for p, s in zip(model.parameters(), frozen.parameters(), strict=True))
        assert at_start > 0.05 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("per_parameter", [False, True])
def test_value_gradient_and_distance_are_the_formulas(norm: Any, per_parameter: bool) -> None:
    model = linear()
    start = copy.deepcopy(model)
    distance = DistanceToReference(model, norm=norm, strength=3.0, per_parameter=per_parameter)
    assert distance.penalty().item() == 0.0
    distance.penalty().backward()
    assert all(bool((p.grad == 0).all()) for p in model.parameters())  # also the subgradient of |0|
    nudged(model)
    model.zero_grad()
    (2 * distance.penalty()).backward()
    wanted = copy.deepcopy(model)
    apart = torch.cat(
        [(p - s.detach()).flatten() for p, s in zip(wanted.parameters(), start.parameters(), strict=True)]
    )
    value = 3.0 * (apart.square() if norm == "l2" else apart.abs()).sum() / (len(apart) if per_parameter else 1)
    wanted.zero_grad()
    (2 * value).backward()
    torch.testing.assert_close(distance.penalty(), value)
    for ours, theirs in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(distance.distance(), apart.detach().norm(p=2 if norm == "l2" else 1))
    assert not distance.distance().requires_grad


def test_frozen_parameters_do_not_count_and_tied_ones_count_once() -> None:
    model = Tied()
    distance = DistanceToReference(model, strength=1.0, reference=copy.deepcopy(model))
    assert distance.num_parameters == 28
    nudged(model)
    model.frozen.weight.data += 1.0
    start = Tied()
    start.load_state_dict(model.state_dict())
    distance.penalty().backward()
    assert model.frozen.weight.grad is None
    before = model.embed.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.embed.weight.grad.zero_()
    handle = DistanceToReference(model, strength=1.0, reference=nudged(start)).decouple(optimizer)
    optimizer.step()
    torch.testing.assert_close(model.embed.weight, (before + start.embed.weight) / 2)
    handle.remove()
    after = model.embed.weight.detach().clone()
    optimizer.step()
    assert model.embed.weight.equal(after)


def test_differences_of_bf16_parameters_are_taken_in_fp32() -> None:
    model = nn.Linear(64, 64, bias=False).bfloat16()
    start = model.weight.detach().clone()
    distance = DistanceToReference(model, strength=1.0, per_parameter=False)
    with torch.no_grad():
        model.weight += 0.02 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    apart = model.weight.detach().float() - start.float()
    value = distance.penalty()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.detach(), apart.square().sum())
    value.backward()
    assert model.weight.grad.equal((2 * apart).bfloat16())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    distance.decouple(optimizer)
    before = model.weight.detach().clone()
    model.weight.grad.zero_()
    optimizer.step()
    assert model.weight.equal((before.float() - 0.25 * apart).bfloat16())


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_of_a_model_under_lora_the_adapters_stay_near_their_start(norm: Any) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(llama(), config)
    start = {name: p.detach().clone() for name, p in trainable(model).items()}
    distance = DistanceToReference(model, norm=norm, strength=1.0)
    assert distance.state_dict().keys() == start.keys()
    nudged(model)
    wanted = sum(
        ((p.detach() - start[n]).square() if norm == "l2" else (p.detach() - start[n]).abs()).sum()
        for n, p in trainable(model).items()
    ) / sum(p.numel() for p in start.values())
    torch.testing.assert_close(distance.penalty().detach(), wanted)
    with pytest.raises(ValueError, match="has no parameter 'base_model.*lora_A.*leave `reference` out"):
        DistanceToReference(model, strength=1.0, reference=llama())


def test_names_are_the_models_own_when_it_is_compiled_before_or_after() -> None:
    reference, model = linear(), linear()
    distance = DistanceToReference(torch.compile(nudged(model), backend="eager"), strength=1.0, reference=reference)
    assert distance.penalty().item() > 0
    compiled = torch.compile(reference, backend="eager")
    assert DistanceToReference(model, strength=1.0, reference=compiled).penalty().item() > 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skips_pulls_nothing(fused: bool) -> None:
    model = linear()
    distance = DistanceToReference(model, strength=1.0)
    nudged(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, fused=fused)
    distance.decouple(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(model)
    for factor in (math.inf, 1.0):
        scaler.scale(model(torch.ones(2, 3)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert (moved(model, before) == 0) == (factor == math.inf)


def test_what_has_no_gradient_in_a_step_stays() -> None:
    model = linear()
    distance = DistanceToReference(model, strength=1.0)
    optimizer = torch.optim.SGD(nudged(model).parameters(), lr=0.5)
    distance.decouple(optimizer)
    before = model[0].weight.detach().clone()
    model[2](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert model[0].weight.equal(before)


def test_small_buckets_and_a_tensor_lr_give_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size, rate in ((2**26, 0.1), (5, 0.1), (5, torch.tensor(0.1))):
        monkeypatch.setattr(reference_distance, "_BUCKET", size)
        model = linear()
        distance = DistanceToReference(model, norm="l1", strength=0.5)
        optimizer = torch.optim.AdamW(nudged(model).parameters(), lr=rate, foreach=False)
        distance.decouple(optimizer)
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert found[0].equal(found[1])
    torch.testing.assert_close(found[0], found[2])


def test_it_works_under_accelerate_and_around_mofo() -> None:
    from accelerate import Accelerator

    model = linear()
    optimizer = MoFO(torch.optim.AdamW(model.parameters(), lr=0.1))
    model, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
    distance = DistanceToReference(model, strength=10.0)
    distance.decouple(optimizer)
    nudged(model)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert float(distance.distance()) < 1e-6  # lr · strength is 1


def test_the_start_survives_a_resume() -> None:
    model = linear()
    distance = DistanceToReference(model, strength=1.0)
    nudged(model)
    resumed = copy.deepcopy(model)  # as loaded from a checkpoint
    other = DistanceToReference(resumed, strength=1.0)
    assert other.penalty().item() == 0
    other.load_state_dict(distance.state_dict())
    assert other.penalty().item() == distance.penalty().item() > 0
    assert DistanceToReference(model, strength=1.0, reference=linear()).state_dict() == {}

    state = distance.state_dict()
    with pytest.raises(ValueError, match="the state lacks '2.bias'"):
        other.load_state_dict({name: value for name, value in state.items() if name != "2.bias"})
    with pytest.raises(ValueError, match="has, unlike this run, 'more'"):
        other.load_state_dict(state | {"more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'0.bias' has shape \[9\] in the state and \[4\]"):
        other.load_state_dict(state | {"0.bias": torch.zeros(9)})


def test_what_cannot_be_is_refused() -> None:
    model = linear()
    with pytest.raises(ValueError, match="'0.weight' of the reference is the tensor that is trained"):
        DistanceToReference(model, strength=1.0, reference=model)
    with pytest.raises(ValueError, match=r"'2.weight' has shape \[5, 4\] in the reference and \[2, 4\]"):
        DistanceToReference(
            model, strength=1.0, reference=nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5, bias=True))
        )
    with pytest.raises(ValueError, match="nothing is trained"):
        DistanceToReference(frozen_copy(model), strength=1.0)
    with pytest.raises(ValueError, match="norm is 'l3'"):
        DistanceToReference(model, norm="l3", strength=1.0)  # type: ignore[arg-type]
    for strength in (-1.0, math.inf, math.nan, True, "1"):
        with pytest.raises(ValueError, match="strength is"):
            DistanceToReference(model, strength=strength)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"'2.weight' \(2 such\) is in no group of the SGD"):
        DistanceToReference(model, strength=1.0).decouple(optimizer)
    distance = DistanceToReference(model, strength=1.0)
    model[2] = nn.Linear(4, 9)
    with pytest.raises(ValueError, match=r"'2.weight' is a Parameter of \[9, 4\]"):
        distance.penalty()
    del model[2]
    with pytest.raises(ValueError, match=r"'2.bias' is no longer in the model"):
        distance.penalty()
