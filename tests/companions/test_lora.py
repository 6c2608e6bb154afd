"""LoRA beside the stream: the base is the reference, adapters train, and the loop stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from companions.loops import NUM_STEPS, TAU, assert_alike, by_hand, frozen_copy, llama, stream_of, trainable
from conftest import build
from torch import Tensor, nn

import flowstream as fs

peft = pytest.importorskip("peft")


def adapted(model: nn.Module, **settings: Any) -> Any:
    """With the same adapters each time, none of them at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, **settings))


def sgd(model: nn.Module, rate: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)


def stepped(model: nn.Module, rate: float = 0.1) -> Any:
    """A step by hand, on the parameters that train."""

    def step(loss: Tensor) -> None:
        parameters = list(trainable(model).values())
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data = p.data - rate * g

    return step


def test_a_causal_model_under_lora_equals_the_loop_by_hand() -> None:
    model = adapted(llama(), target_modules=["q_proj", "down_proj"])  # companion
    stream, optimizer = stream_of(model), sgd(model)
    for batch in stream:
        labels, weight = batch.pop("labels"), batch.pop("flow_weight")
        fs.weighted_lm_loss(model(**batch).logits, labels, weight).backward()
        optimizer.step()
        optimizer.zero_grad()

    twin = adapted(llama(), target_modules=["q_proj", "down_proj"])
    by_hand(twin, frozen_copy(llama()), stepped(twin))
    assert_alike(model, twin)
    assert any(bool((p != 0).any()) for name, p in trainable(model).items() if "lora_B" in name)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_an_image_classifier_with_a_trained_head_equals_the_loop_by_hand(family: str) -> None:
    def classifier() -> Any:
        if family == "vit":
            return build("vit", num_hidden_layers=1, num_channels=1)
        from transformers import ResNetConfig, ResNetForImageClassification

        config = ResNetConfig(
            num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=5
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return ResNetForImageClassification(config).eval()

    targets = ["q_proj"] if family == "vit" else ["convolution"]
    if family == "vit" and not any(name.endswith("q_proj") for name, _ in classifier().named_modules()):
        targets = ["query"]
    settings = {"target_modules": targets, "modules_to_save": ["classifier"]}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(NUM_STEPS, 4, 1, 16, 16, generator=generator)
    loader = [{"pixel_values": rows, "labels": torch.arange(4)} for rows in images]

    model = adapted(classifier(), **settings).eval()  # companion
    stream = fs.FlowStream(loader, fs.ClassifierScorer(model), temperature=fs.FixedTemperature(TAU))
    optimizer = sgd(model, 0.02)
    for batch in stream:
        logits = model(pixel_values=batch["pixel_values"]).logits
        fs.weighted_cross_entropy(logits, batch["labels"], batch["flow_weight"]).backward()
        optimizer.step()
        optimizer.zero_grad()

    twin, frozen = adapted(classifier(), **settings).eval(), frozen_copy(classifier())
    step = stepped(twin, 0.02)
    for rows in images:
        with torch.no_grad():  # the base's own head scores, not the one that is trained
            losses = F.cross_entropy(frozen(pixel_values=rows).logits, torch.arange(4), reduction="none")
        each = F.cross_entropy(twin(pixel_values=rows).logits, torch.arange(4), reduction="none")
        step((torch.exp(-losses / TAU) * each).mean())
    assert_alike(model, twin)
    names = trainable(model)
    assert {"lora" if "lora" in name else "classifier" if "classifier" in name else name for name in names} == {
        "lora",
        "classifier",
    }
    head = next(p for name, p in names.items() if "classifier" in name and p.ndim == 2)
    base = next(p for name, p in classifier().named_parameters() if "classifier" in name and p.ndim == 2)
    assert not torch.allclose(head, base)
