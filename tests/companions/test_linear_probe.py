"""A new head on a frozen body, against a plain loop over the body's features; and the original head put back."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from flowstream.companions.linear_probe import classification_layer, linear_probe, with_original_head

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """A normalisation that must not learn from probing, and dropout that must not act."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(6, 4)

    def features(self, image: Tensor) -> Tensor:
        return self.body(image).mean((2, 3))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
        net(torch.randn(16, 3, 8, 8))
    return net.train()


@pytest.fixture
def resnet() -> Any:
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=4, num_channels=3
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ResNetForImageClassification(config).train()


def batches(num: int = 5, num_classes: int = 3, size: int = 8) -> list[Batch]:
    draws = torch.Generator().manual_seed(1)
    images = torch.randn(num, 6, 3, size, size, generator=draws)
    return [(x, torch.randint(num_classes, (6,), generator=draws)) for x in images]


def probe(model: nn.Module, head: Any, loader: Any, **options: Any) -> Any:
    torch.manual_seed(7)
    return linear_probe(model, head, loader, **({"steps": 5} | options))


def plain(net: Net, head: nn.Linear, loader: list[Batch], *, learning_rate: float = 0.01) -> nn.Linear:
    """The same, as one would write it for this net."""
    net, head = copy.deepcopy(net).eval(), copy.deepcopy(head)
    optimizer = torch.optim.SGD(head.parameters(), lr=learning_rate, momentum=0.9, weight_decay=5e-4)
    for x, y in loader:
        loss = F.cross_entropy(head(net.features(x).detach()), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


def same(one: nn.Module, other: nn.Module, *, without: str = "?") -> bool:
    """Whether all parameters and buffers of two models are equal to the bit, but those under `without`."""
    pairs = (one.state_dict(), other.state_dict())
    names = [{name for name in state if not name.startswith(without)} for state in pairs]
    return names[0] == names[1] and all(torch.equal(pairs[0][name], pairs[1][name]) for name in names[0])


# Probing


def test_it_is_the_plain_loop_over_the_features(net: Net) -> None:
    torch.manual_seed(7)
    expected = plain(net, nn.Linear(6, 3), batches(), learning_rate=0.1)
    found = probe(net, 3, batches(), learning_rate=0.1)
    torch.testing.assert_close(found.head.weight, expected.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.head.bias, expected.bias, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head", [3, None], ids=["new", "its own"])
@pytest.mark.parametrize("name", ["net", "resnet"])
def test_nothing_of_the_body_moves_to_the_bit(name: str, head: Any, request: pytest.FixtureRequest) -> None:
    model, size = request.getfixturevalue(name), 32
    layer = classification_layer(model)
    found = probe(model, head, batches(size=size), steps=12, learning_rate=1.0)
    assert same(found, model, without=layer)
    assert any(name.endswith("running_var") for name in found.state_dict())
    own = found.get_submodule(layer)
    assert own.out_features == (head or 4)
    assert head or not torch.equal(own.weight, model.get_submodule(layer).weight)


def test_the_callers_model_stays_as_it_is(net: Net) -> None:
    seen: list[str] = []
    net.body[1].eval()
    net.body[0].bias.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    net.register_forward_hook(lambda *_: seen.append("hook"))
    before = copy.deepcopy(net)
    with torch.no_grad(), torch.inference_mode():
        found = probe(net, None, batches())
    assert same(net, before)
    assert [m.training for m in net.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in before.parameters()]
    assert torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight))
    assert len(net._forward_hooks) == 1
    assert not net.head._forward_hooks
    assert not found.head._forward_hooks
    assert not found.head._forward_pre_hooks
    storages = {p.untyped_storage().data_ptr() for p in net.parameters()}
    assert not storages & {p.untyped_storage().data_ptr() for p in found.parameters()}
    assert not any(module.training for module in found.modules())
    assert all(p.grad is None for p in found.parameters())
    found(torch.randn(2, 3, 8, 8)).sum().backward()  # what was made in inference mode could not be trained


def test_a_stream_gives_the_first_steps_batches_and_no_more(net: Net) -> None:
    given: list[int] = []

    def stream() -> Iterator[Batch]:
        for number in itertools.count():
            given.append(number)
            yield batches()[number % 5]

    found = probe(net, 3, stream(), steps=7)
    assert given == list(range(7))
    assert same(found, probe(net, 3, batches(), steps=7))  # a loader that is shorter is begun anew


def test_a_loader_that_cannot_give_so_many_says_so(net: Net) -> None:
    with pytest.raises(ValueError, match="the loader gave 5 of 8 batches, and none when begun anew"):
        probe(net, 3, iter(batches()), steps=8)
    with pytest.raises(ValueError, match="the loader gave no batch: give one that can be iterated over again"):
        probe(net, 3, [])
    with pytest.raises(ValueError, match="steps is 0"):
        probe(net, 3, batches(), steps=0)


FORMS: dict[str, Any] = {
    "list": lambda x, y: [x, y],
    "mapping": lambda x, y: {"image": x, "labels": y, "__key__": ["a"] * 6},
    "weighted by a stream": lambda x, y: {"image": x, "label": y, "flow_weight": torch.zeros(6)},
    "mapping and labels": lambda x, y: ({"image": x}, y),
    "soft targets": lambda x, y: (x, F.one_hot(y, 3).float()),
    "double": lambda x, y: (x.double(), y),
    "numpy": lambda x, y: (x.numpy(), y.numpy()),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_are_read_as_the_scorer_reads_them(net: Net, form: str) -> None:
    expected = probe(net, 3, batches())
    found = probe(net, 3, [FORMS[form](x, y) for x, y in batches()])
    torch.testing.assert_close(found.head.weight, expected.head.weight, rtol=0, atol=1e-6)


def test_samples_without_a_label_are_left_out(net: Net) -> None:
    ignoring = [(x, torch.where(torch.arange(6) < 4, y, -100)) for x, y in batches()]
    expected = probe(net, 3, [(x[:4], y[:4]) for x, y in batches()])
    torch.testing.assert_close(probe(net, 3, ignoring).head.weight, expected.head.weight, rtol=0, atol=1e-6)
    nothing = [(x, torch.full((6,), -100)) for x, _ in batches()]
    assert probe(net, 3, nothing).head.weight.isfinite().all()


def test_several_labels_a_sample(resnet: Any) -> None:
    resnet.config.problem_type = "multi_label_classification"
    loader = [(x, F.one_hot(y, 3).float() + 0) for x, y in batches(size=32)]
    found = probe(resnet, 3, loader, steps=1, optimizer=lambda own: torch.optim.SGD(own, lr=1.0))
    start = probe(resnet, 3, loader, steps=1, learning_rate=1e-30)
    start.zero_grad()
    (x, y) = loader[0]
    start(x, labels=y).loss.backward()
    weight = start.classifier[1].weight
    torch.testing.assert_close(found.classifier[1].weight, weight - weight.grad, rtol=0, atol=1e-5)


def test_a_module_is_copied_and_trained(net: Net) -> None:
    head = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    before = copy.deepcopy(head)
    found = probe(net, head, batches(), optimizer=lambda own: torch.optim.AdamW(own, lr=0.1))
    assert same(head, before)
    assert not same(found.head, head)
    assert found(batches()[0][0]).shape == (6, 3)


def test_a_head_is_trained_on_after_fine_tuning(net: Net) -> None:
    half = probe(net, 3, batches()[:2], steps=2, optimizer=lambda own: torch.optim.SGD(own, lr=0.1))
    whole = probe(half, None, batches()[2:], steps=3, optimizer=lambda own: torch.optim.SGD(own, lr=0.1))
    once = probe(net, 3, batches(), optimizer=lambda own: torch.optim.SGD(own, lr=0.1))
    assert same(whole, once)


# Which layer it is


def test_hugging_face_models_are_saved_and_loaded_with_their_new_head(resnet: Any, tmp_path: Any) -> None:
    assert classification_layer(resnet) == "classifier.1"
    found = probe(resnet, 3, batches(size=32))
    assert found.config.num_labels == found.num_labels == 3
    assert resnet.config.num_labels == resnet.num_labels == 4
    found.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert same(loaded, found)
    found(batches(size=32)[0][0], labels=batches()[0][1]).loss.backward()


def test_transformers_of_images_and_texts(tiny: Any) -> None:
    assert classification_layer(tiny("vit")) == "classifier"
    found = probe(tiny("vit"), 3, batches(size=16), steps=1)
    assert found(batches(size=16)[0][0]).logits.shape == (6, 3)
    text = {"input_ids": torch.randint(3, 97, (4, 6)), "attention_mask": torch.ones(4, 6).long()}
    found = probe(tiny("bert"), 2, [text | {"labels": torch.tensor([0, 1, 1, 0])}], steps=2)
    assert found(**text).logits.shape == (4, 2)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.other = nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(image.flatten(1)) + 0 * self.other(image.flatten(1)) + 1


class OddOrder(TwoHeads):
    """The layer that is last by name is not the one that gives the logits."""

    def forward(self, image: Tensor) -> Tensor:
        return self.head(image.flatten(1) + self.other(image.flatten(1)).mean())


def test_what_is_not_found_by_itself_is_named(net: Net, resnet: Any) -> None:
    loader = batches(size=2)
    with pytest.raises(ValueError, match="logits of OddOrder are not what its layer other gives: pass layer="):
        probe(OddOrder(), 3, loader)
    found = probe(OddOrder(), 3, loader, layer="head")
    assert found.head.out_features == 3
    assert found.other.out_features == 4
    with pytest.raises(ValueError, match="are not what its layer head gives"):
        probe(TwoHeads(), 3, loader, layer="head")
    with pytest.raises(ValueError, match=r"Net has no module 'classifier'; its last linear ones are \['head'\]"):
        probe(net, 3, loader, layer="classifier")
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Linear: pass layer="):
        probe(nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten()), 3, loader)
    pointwise = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten())
    with pytest.raises(ValueError, match="layer 0 is a Conv2d, whose inputs nobody counts: give the head as a module"):
        probe(pointwise, 3, loader, layer="0")
    with pytest.raises(ValueError, match="a head of 1 classes"):
        probe(net, 1, loader)
    resnet.second = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"several layers of 4 outputs \(classifier\.1, second\): pass layer="):
        probe(resnet, 3, loader)


def test_labels_outside_the_new_classes_are_refused(net: Net, resnet: Any) -> None:
    with pytest.raises(ValueError, match="label 3 is outside the 3 classes of the logits"):
        probe(net, 3, [(x, y + 1) for x, y in batches()])
    with pytest.raises(ValueError, match="is 3, and the reference has 3 classes"):
        probe(resnet, 3, [(x, y + 1) for x, y in batches(size=32)])


def test_adapters_are_merged_first(resnet: Any) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(resnet, peft.LoraConfig(r=2, target_modules=["classifier.1"]))
    with pytest.raises(ValueError, match="carries PEFT adapters: merge them first"):
        probe(adapted, 3, batches())


def test_models_of_timm_and_torchvision() -> None:
    broken = (ImportError, RuntimeError)  # a torchvision that was built for another torch
    pytest.importorskip("torchvision", exc_type=broken)
    models, timm = pytest.importorskip("torchvision.models"), pytest.importorskip("timm")
    names = {"resnet18": "fc", "mobilenet_v3_small": "classifier.3", "vit_b_16": "heads.head", "swin_t": "head"}
    for name, layer in names.items():
        with torch.device("meta"):
            assert classification_layer(models.get_model(name)) == layer
    for name, layer in {"resnet18": "fc", "convnext_atto": "head.fc", "vit_tiny_patch16_224": "head"}.items():
        assert classification_layer(timm.create_model(name)) == layer
    with pytest.raises(ValueError, match="has 2 classifiers, whose logits are averaged"):
        classification_layer(timm.create_model("deit_tiny_distilled_patch16_224"))
    with pytest.raises(ValueError, match="has no classifier"):
        classification_layer(timm.create_model("resnet18", num_classes=0))
    found = probe(timm.create_model("resnet18", num_classes=7), 3, batches(size=32), steps=1)
    assert found(batches(size=32)[0][0]).shape == (6, 3)


# The original head


@pytest.mark.parametrize("name", ["net", "resnet"])
def test_the_original_head_and_norms_are_put_back_and_the_rest_is_the_tuned_models(
    name: str, request: pytest.FixtureRequest
) -> None:
    original = request.getfixturevalue(name)
    tuned = probe(original, 3, batches(size=32))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 1
        tuned.train()(batches(size=32)[0][0])  # moves running statistics
    before = copy.deepcopy(tuned)
    found = with_original_head(tuned, original)
    assert same(tuned, before)
    norms = {path for path, module in original.named_modules() if isinstance(module, nn.BatchNorm2d)}
    back = (*norms, classification_layer(original))
    for state, value in found.state_dict().items():
        source = original if state.startswith(back) else tuned
        assert torch.equal(value, source.state_dict()[state]), state
    assert not any(module.training for module in found.modules())
    assert getattr(found, "num_labels", 4) == 4
    assert tuned.state_dict().keys() == found.state_dict().keys()


def test_an_untouched_body_is_the_original_again(resnet: Any) -> None:
    found = with_original_head(probe(resnet, 3, batches(size=32)), resnet)
    assert same(found, resnet)
    assert found.config.id2label == resnet.config.id2label


def test_models_of_two_kinds_are_refused(net: Net, resnet: Any) -> None:
    with pytest.raises(ValueError, match="has no module 'head'"):
        with_original_head(resnet, net)
    other = copy.deepcopy(net)
    other.body[1] = nn.BatchNorm2d(5)
    with pytest.raises(ValueError, match=r"body\.1 is another BatchNorm in the original model"):
        with_original_head(net, other)
    other.body[1] = nn.Identity()
    with pytest.raises(ValueError, match=r"body\.1 is a BatchNorm in one of the two models only"):
        with_original_head(net, other)
