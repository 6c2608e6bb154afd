"""WiSE-FT of modules: the line between two models, its ends to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from companions.loops import batches, frozen_copy, llama, stream_of
from torch import nn

import flowstream as fs
from flowstream.companions.wise_ft import interpolate, sweep_alphas

peft = pytest.importorskip("peft")


def resnetish(seed: int) -> nn.Sequential:
    """With running statistics, and a counter of batches."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
        for _ in range(seed):
            model(torch.randn(5, 1, 4, 4))
    return model


def test_a_tuned_model_is_interpolated_in_one_line_after_the_loop() -> None:
    model, start = llama(), llama()
    stream, optimizer = stream_of(model), torch.optim.SGD(model.parameters(), lr=0.1)
    frozen = frozen_copy(model)  # companion
    for batch in stream:
        labels, weight = batch.pop("labels"), batch.pop("flow_weight")
        fs.weighted_lm_loss(model(**batch).logits, labels, weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    between = interpolate(frozen, model, 0.5)  # companion
    for (name, p), a, b in zip(between.named_parameters(), start.parameters(), model.parameters(), strict=True):
        assert float((p - (0.5 * a + 0.5 * b)).detach().abs().max()) <= 1e-6, name
    ids = batches(1)[0]["input_ids"]
    logits = [m(input_ids=ids).logits for m in (frozen, between, model)]
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[1], logits[2])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_every_floating_tensor_is_interpolated_and_every_integer_the_tuned_one(alpha: float) -> None:
    reference, tuned = resnetish(1), resnetish(3)
    ends = copy.deepcopy(reference.state_dict()), copy.deepcopy(tuned.state_dict())
    model = interpolate(reference, tuned, alpha)
    for name, tensor in model.state_dict().items():
        start, end = ends[0][name], ends[1][name]
        if not tensor.is_floating_point():
            assert name == "1.num_batches_tracked"
            assert int(tensor) == 3
        elif alpha in (0.0, 1.0):
            assert tensor.equal(start if alpha == 0 else end)
        else:
            torch.testing.assert_close(tensor, (1 - alpha) * start + alpha * end, rtol=1e-6, atol=1e-7)
    assert all(tensor.equal(reference.state_dict()[name]) for name, tensor in ends[0].items())
    assert all(tensor.equal(tuned.state_dict()[name]) for name, tensor in ends[1].items())


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_arithmetic_is_fp32_and_the_dtype_that_of_what_is_filled(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    reference, tuned = nn.Linear(9, 9).to(dtypes[0]), nn.Linear(9, 9).to(dtypes[1])
    model = interpolate(reference, tuned, 0.25)
    wanted = torch.lerp(reference.weight.float(), tuned.weight.float(), 0.25).to(dtypes[1])
    assert model.weight.dtype == dtypes[1]
    assert model.weight.equal(wanted)
    filled = nn.Linear(9, 9).double()
    assert interpolate(reference, tuned, 1.0, into=filled) is filled
    assert filled.weight.equal(tuned.weight.double())


def test_what_is_equal_at_both_ends_stays_to_the_bit() -> None:
    model = llama()
    between = interpolate(model, copy.deepcopy(model), 0.3)
    assert all(p.equal(q) for p, q in zip(between.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("end", ["reference", "tuned"])
def test_an_end_may_be_filled_and_tied_weights_once(end: str) -> None:
    reference, tuned = llama(tie_word_embeddings=True), llama(tie_word_embeddings=True)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1
    wanted = interpolate(reference, tuned, 0.4)
    assert wanted.lm_head.weight is wanted.model.embed_tokens.weight
    filled = reference if end == "reference" else tuned
    interpolate(reference, tuned, 0.4, into=filled)
    assert all(p.equal(q) for p, q in zip(filled.parameters(), wanted.parameters(), strict=True))


def test_a_sweep_fills_one_module_again_and_again() -> None:
    reference, tuned = resnetish(1), resnetish(3)
    seen = []
    for alpha, model in sweep_alphas(reference, tuned, [0.75, 0.0, 0.5]):
        seen.append((alpha, id(model)))
        wanted = interpolate(reference, tuned, alpha)
        assert all(a.equal(b) for a, b in zip(model.state_dict().values(), wanted.state_dict().values(), strict=True))
        with torch.no_grad():
            model[3].weight += 1.0  # what is done to it does not last
    assert [alpha for alpha, _ in seen] == [0.75, 0.0, 0.5]
    assert len({place for _, place in seen}) == 1
    assert seen[0][1] not in (id(reference), id(tuned))
    with pytest.raises(ValueError, match=r"alpha is 2: give a number in \[0, 1\]"):
        sweep_alphas(reference, tuned, [0.5, 2])


def test_models_that_differ_are_refused() -> None:
    model: Any = llama()
    with pytest.raises(ValueError, match="'3.bias' is in the tuned model alone"):
        interpolate(nn.Sequential(*resnetish(1)[:3], nn.Linear(12, 2, bias=False)), resnetish(1), 0.5)
    larger = llama()
    larger.resize_token_embeddings(99)
    with pytest.raises(
        ValueError, match=r"'model.embed_tokens.weight' has shape \[99, 32\] in the reference and \[97, 32\]"
    ):
        interpolate(larger, model, 0.5)
    with pytest.raises(ValueError, match="'model.embed_tokens.weight' and 'lm_head.weight' are one tensor"):
        interpolate(model, llama(tie_word_embeddings=True), 0.5)
    for adapted in ((model, 1), (1, model)):
        pair = [
            peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])) if m == 1 else m
            for m in adapted
        ]
        with pytest.raises(ValueError, match=r"carries PEFT adapters.*merge_and_unload\(\)"):
            interpolate(*pair, 0.5)
    for alpha in (-0.1, 1.1, float("nan"), True, "0.5"):
        with pytest.raises(ValueError, match="alpha is"):
            interpolate(model, model, alpha)
