"""Half fine-tuning: which half is frozen, what then trains, and that all ranks agree on it."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from companions.loops import assert_alike, by_hand, frozen_copy, llama, moved, stream_of
from torch import Tensor, nn

import flowstream as fs
from flowstream.companions.half_fine_tuning import half_fine_tuning

peft = pytest.importorskip("peft")

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def frozen_of(names: tuple[str, ...], block: str, parts: tuple[str, ...]) -> int:
    return sum(name.startswith(block) and any(part in name for part in parts) for name in names)


def test_a_loop_over_a_stream_equals_the_loop_by_hand() -> None:
    model, twin, frozen = llama(), llama(), frozen_copy(llama())
    stream = stream_of(model)
    mask = half_fine_tuning(model, seed=3)  # companion
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in stream:
        labels, weight = batch.pop("labels"), batch.pop("flow_weight")
        fs.weighted_lm_loss(model(**batch).logits, labels, weight).backward()
        optimizer.step()
        optimizer.zero_grad()

    def step(loss: Tensor) -> None:
        for (name, p), g in zip(
            twin.named_parameters(), torch.autograd.grad(loss, list(twin.parameters())), strict=True
        ):
            if name not in mask.frozen:
                p.data = p.data - 0.1 * g

    by_hand(twin, frozen, step)
    assert_alike(model, twin)
    assert moved(model, frozen) > 1e-3


@pytest.mark.parametrize("num_layers", [1, 4, 5])
def test_of_every_block_half_of_each_category_is_frozen(num_layers: int) -> None:
    model = llama(num_hidden_layers=num_layers)
    mask = half_fine_tuning(model)
    blocks = [f"model.layers.{number}." for number in range(num_layers)]
    assert {frozen_of(mask.frozen, block, ATTENTION) for block in blocks} == {2}
    assert {frozen_of(mask.frozen, block, ("layernorm",)) for block in blocks} == {1}
    thirds = Counter(frozen_of(mask.frozen, block, FEED_FORWARD) for block in blocks)
    assert thirds == Counter({2: num_layers // 2, 1: num_layers - num_layers // 2}) - Counter()
    outside = {name for name in mask.frozen if not name.startswith("model.layers.")}
    assert not outside  # embeddings, last norm and head train
    by_flag = tuple(sorted(name for name, p in model.named_parameters() if not p.requires_grad))
    assert by_flag == tuple(sorted(mask.frozen))
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad) / sum(p.numel() for p in model.parameters())
    assert mask.fraction == pytest.approx(counted)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "t5", "bert", "vit", "mixtral", "phi"])
def test_other_transformers_are_halved_too(tiny: Any, family: str) -> None:
    model = tiny(family)
    names = dict(model.named_parameters())
    mask = half_fine_tuning(model)
    inside = [name for name in names if any(part.isdigit() for part in name.split("."))]
    assert set(mask.frozen) <= set(inside)
    assert 0.25 <= len(mask.frozen) / len(inside) <= 0.6
    for name in mask.frozen:  # a bias goes with its weight
        if name.endswith(".weight") and (bias := name.removesuffix("weight") + "bias") in names:
            assert bias in mask.frozen


def test_a_resnet_is_halved_by_module_type() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(config)
    mask = half_fine_tuning(model)
    units = {name.rpartition(".")[0] for name in mask.frozen}
    for kind in (nn.Conv2d, nn.BatchNorm2d):
        of_kind = {name for name, module in model.named_modules() if isinstance(module, kind)}
        assert len(units & of_kind) == len(of_kind) // 2 > 0
    assert not any("classifier" in name for name in mask.frozen)


def test_the_half_depends_on_seed_and_round_alone() -> None:
    first, second = llama(num_hidden_layers=2), llama(num_hidden_layers=2)
    torch.manual_seed(1)
    mask = half_fine_tuning(first, seed=5)
    torch.manual_seed(2)
    assert half_fine_tuning(second, seed=5).frozen == mask.frozen
    before, rounds = mask.frozen, set()
    for number in range(6):
        mask.reselect(number)
        rounds.add(mask.frozen)
        assert {n for n, p in first.named_parameters() if not p.requires_grad} == set(mask.frozen)
    assert len(rounds) > 4
    mask.reselect(0)
    assert mask.frozen == before
    assert half_fine_tuning(llama(num_hidden_layers=2), seed=6).frozen != before


def test_restore_lets_train_what_trained_before_and_nothing_else() -> None:
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    mask = half_fine_tuning(model)
    mask.reselect(1)
    mask.restore()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert (mask.frozen, mask.fraction) == ((), 1.0)


def test_an_optimizer_made_before_neither_moves_nor_decays_the_frozen_half() -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    ids = torch.arange(3, 11)[None]
    model(input_ids=ids, labels=ids).loss.backward()  # gradients are there when the mask comes
    mask = half_fine_tuning(model)
    before = copy.deepcopy(model)
    optimizer.step()
    changed = {n for (n, p), q in zip(model.named_parameters(), before.parameters(), strict=True) if not p.equal(q)}
    assert changed == {name for name, _ in model.named_parameters()} - set(mask.frozen)


def test_of_adapters_half_is_frozen_in_pairs() -> None:
    model = peft.get_peft_model(llama(num_hidden_layers=2), peft.LoraConfig(r=2, target_modules=list(ATTENTION)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    mask = half_fine_tuning(model)
    assert set(mask.frozen) < trained
    assert len(mask.frozen) == len(trained) / 2
    pairs = Counter(name.partition(".lora_")[0] for name in mask.frozen)
    assert set(pairs.values()) == {2}


def test_what_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ValueError, match="1 matrices of the Linear train"):
        half_fine_tuning(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="0 matrices"):
        half_fine_tuning(frozen_copy(llama()))
    lone = llama().requires_grad_(False)
    lone.lm_head.weight.requires_grad_(True)
    lone.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="no two matrices of one kind train in a block"):
        half_fine_tuning(lone)
    assert lone.lm_head.weight.requires_grad
    for number in (-1, 1.5, True):
        with pytest.raises(ValueError, match="round is"):
            half_fine_tuning(llama(), round=number)  # type: ignore[arg-type]
