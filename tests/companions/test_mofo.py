"""MoFO: the entries that move are those of a plain loop, and it stands wherever an optimizer does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from companions.loops import assert_alike, batches, by_hand, frozen_copy, llama, moved, stream_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import flowstream as fs
from flowstream.companions.mofo import MoFO, largest


def linear() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), **({"lr": 0.05} | options))


def train(model: nn.Module, optimizer: Any, steps: int = 1, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(5, 3, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_loop_over_a_stream_equals_the_loop_by_hand() -> None:
    model, twin, frozen = llama(), llama(), frozen_copy(llama())
    stream = stream_of(model)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-4)
    optimizer = MoFO(optimizer, fraction=0.1)  # companion
    for batch in stream:
        labels, weight = batch.pop("labels"), batch.pop("flow_weight")
        fs.weighted_lm_loss(model(**batch).logits, labels, weight).backward()
        optimizer.step()
        optimizer.zero_grad()

    first = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    second = copy.deepcopy(first)
    number = 0

    def step(loss: Tensor) -> None:
        nonlocal number
        number += 1
        for (name, p), g in zip(
            twin.named_parameters(), torch.autograd.grad(loss, list(twin.parameters())), strict=True
        ):
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            direction = (first[name] / (1 - 0.9**number)) / ((second[name] / (1 - 0.999**number)).sqrt() + 1e-4)
            size = first[name].abs()
            cut = size.flatten().sort(descending=True).values[int(0.1 * size.numel()) - 1]
            p.data = torch.where(size >= cut, p.data * (1 - 1e-2 * 0.1) - 1e-2 * direction, p.data)

    by_hand(twin, frozen, step)
    assert_alike(model, twin)
    assert moved(model, frozen) > 1e-3


@pytest.mark.parametrize("fraction", [0.1, 0.29, 0.5])
def test_exactly_the_fraction_of_every_tensor_moves_in_a_step(fraction: float) -> None:
    model = llama()
    optimizer = MoFO(adamw(model, weight_decay=0.5), fraction=fraction)
    for batch in batches(3):
        before = copy.deepcopy(model)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for now, old in zip(model.parameters(), before.parameters(), strict=True):
            assert int((now != old).sum()) <= max(1, int(fraction * now.numel() + 1e-6))
    wide = nn.Linear(100, 1, bias=False)
    optimizer = MoFO(adamw(wide), fraction=fraction)
    before = copy.deepcopy(wide)
    wide(torch.rand(1, 100) + 0.1).sum().backward()
    optimizer.step()
    assert int((wide.weight != before.weight).sum()) == round(100 * fraction)


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 0.5, -2.0]), min_size=1, max_size=24),
    st.floats(0.01, 1.0),
    st.integers(1, 3),
)
def test_the_chosen_are_those_of_a_stable_sort(values: list[float], fraction: float, num_blocks: int) -> None:
    momentum = torch.tensor(values * num_blocks).roll(1)
    chosen = largest(momentum, fraction, num_blocks)
    for block, mask in zip(momentum.chunk(num_blocks), chosen.chunk(num_blocks), strict=True):
        order = sorted(range(len(block)), key=lambda place: (-abs(float(block[place])), place))
        assert mask.nonzero().flatten().tolist() == sorted(order[: max(1, int(len(block) * fraction + 1e-6))])


def test_blocks_split_a_parameter_or_leave_it_whole() -> None:
    model = linear()
    optimizer = MoFO(adamw(model), fraction=0.34, blocks=lambda p: 2 if p.shape == (4, 3) else 0)
    before = copy.deepcopy(model)
    model(torch.ones(1, 3)).sum().backward()
    momentum = 0.1 * model[0].weight.grad
    optimizer.step()
    changed = model[0].weight != before[0].weight
    for half, mask in zip(momentum.chunk(2), changed.chunk(2), strict=True):
        live = int((half != 0).sum())
        assert int(mask.sum()) == 2 if live >= 2 else int(mask.sum()) >= live  # of six; AdamW decays the rest of them
    assert bool((model[2].bias != before[2].bias).all())
    uneven = MoFO(adamw(model), blocks=lambda p: 3)
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(ValueError, match=r"blocks gives 3 for a parameter of shape \[4, 3\]"):
        uneven.step()


@pytest.mark.parametrize("kind", ["plain", "foreach", "fused", "SGD", "NAdam"])
def test_any_optimizer_with_momentum_is_filtered_and_keeps_all_moments(kind: str) -> None:
    def inner(model: nn.Module) -> torch.optim.Optimizer:
        if kind == "SGD":
            return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        if kind == "NAdam":
            return torch.optim.NAdam(model.parameters(), lr=0.05)
        return adamw(model, foreach=kind == "foreach", fused=kind == "fused")

    model, plain = linear(), linear()
    filtered, usual = MoFO(inner(model), fraction=0.25), inner(plain)
    train(model, filtered)
    train(plain, usual)
    for ours, theirs, start in zip(model.parameters(), plain.parameters(), linear().parameters(), strict=True):
        kept = ours == theirs
        assert bool((kept | (ours == start)).all())  # each entry: the whole step, or none
        name = "momentum_buffer" if kind == "SGD" else "exp_avg"
        assert filtered.state[ours][name].equal(usual.state[theirs][name])
        assert bool((filtered.state[ours][name].abs() * kept).max() == filtered.state[ours][name].abs().max())


def test_with_a_fraction_of_one_it_is_the_inner_optimizer_to_the_bit() -> None:
    model, plain = linear(), linear()
    train(model, MoFO(adamw(model), fraction=1.0), 3)
    train(plain, adamw(plain), 3)
    assert_alike(model, plain, tolerance=0)


def test_groups_schedules_closures_and_missing_gradients() -> None:
    model = linear()
    inner = torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.1}], lr=0.2)
    optimizer = MoFO(inner, fraction=0.5)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    before = copy.deepcopy(model)
    calls = []

    def closure() -> Any:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model[2](torch.ones(1, 4)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) is not None
    schedule.step()
    assert calls == [True]
    assert [group["lr"] for group in inner.param_groups] == pytest.approx([0.01, 0.02])
    assert moved(model[0], before[0]) == 0
    assert moved(model[2], before[2]) > 0
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    hooked = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(1))
    optimizer.step()
    assert hooked == [1]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    model = linear()
    optimizer = MoFO(adamw(model), fraction=0.3)
    train(model, optimizer, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, 3, seed=1)

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = linear()
    resumed.load_state_dict(saved["model"])
    again = MoFO(adamw(resumed), fraction=0.3)
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, 3, seed=1)
    assert_alike(resumed, model, tolerance=0)
    plain = adamw(linear())
    plain.load_state_dict(saved["optimizer"])  # the inner optimizer's own
    clone = copy.deepcopy(again)
    assert (clone.fraction, type(clone.optimizer)) == (0.3, torch.optim.AdamW)
    assert clone.state_dict()["state"].keys() == again.state_dict()["state"].keys()


def test_a_grad_scaler_unscales_before_it_and_skips_it() -> None:
    model, plain = linear(), linear()
    train(plain, MoFO(adamw(plain), fraction=0.3))
    optimizer = MoFO(adamw(model, fused=True), fraction=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    generator = torch.Generator().manual_seed(0)
    loss = model(torch.randn(5, 3, generator=generator)).square().sum()
    for factor in (float("inf"), 1.0):
        scaler.scale(loss * factor).backward(retain_graph=True)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if factor != 1.0:
            assert moved(model, linear()) == 0
    assert_alike(model, plain)


def test_accelerate_prepares_it() -> None:
    from accelerate import Accelerator

    plain = linear()
    train(plain, MoFO(adamw(plain), fraction=0.3), 3)
    model = linear()
    accelerator = Accelerator(cpu=True)
    prepared, optimizer, schedule = accelerator.prepare(
        model, made := MoFO(adamw(model), fraction=0.3), torch.optim.lr_scheduler.ConstantLR(made, 1.0)
    )
    assert isinstance(optimizer.optimizer, MoFO)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        accelerator.backward(prepared(torch.randn(5, 3, generator=generator)).square().sum())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert_alike(model, plain)


def test_trainer_takes_it_beside_the_pull_to_the_reference(tmp_path: Path) -> None:
    from trainers import Texts, collate
    from transformers import Trainer, TrainingArguments

    from flowstream.companions.reference_distance import DistanceToReference

    model = llama()
    before = copy.deepcopy(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="steps", save_steps=2, logging_strategy="no", disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    optimizer = MoFO(torch.optim.AdamW(model.parameters(), lr=1e-2), fraction=0.05)  # companion
    DistanceToReference(model, strength=1.0).decouple(optimizer)
    trainer = Trainer(model, arguments, train_dataset=Texts(), data_collator=collate, optimizers=(optimizer, None))
    trainer.train()
    changed = sum(int((p != q).sum()) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    assert 0 < changed <= 0.15 * sum(p.numel() for p in model.parameters())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-8)  # Trainer's own linear schedule, at its end
    after = copy.deepcopy(model)

    model.load_state_dict(before.state_dict())
    optimizer = MoFO(torch.optim.AdamW(model.parameters(), lr=1e-2), fraction=0.05)
    resumed = DistanceToReference(model, strength=1.0)
    resumed.decouple(optimizer)
    trainer = Trainer(model, arguments, train_dataset=Texts(), data_collator=collate, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_alike(model, after)


def test_what_has_no_momentum_is_refused_and_nothing_has_moved() -> None:
    model = linear()
    with pytest.raises(ValueError, match="SGD has momentum=0"):
        MoFO(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = MoFO(torch.optim.Adagrad(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="state of Adagrad has neither of exp_avg, momentum_buffer"):
        train(model, optimizer)
    assert moved(model, linear()) == 0
    for fraction in (0.0, -0.1, 1.5, float("nan"), True):
        with pytest.raises(ValueError, match="fraction is"):
            MoFO(adamw(model), fraction=fraction)
    with pytest.raises(ValueError, match=r"give a torch.optim.Optimizer"):
        MoFO(model.parameters())  # type: ignore[arg-type]


def test_sparse_gradients_are_refused_and_nothing_has_moved() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    before = table.weight.detach().clone()
    optimizer = MoFO(torch.optim.SGD(table.parameters(), lr=0.1, momentum=0.9))
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="a gradient is sparse"):
        optimizer.step()
    assert torch.equal(table.weight, before)
