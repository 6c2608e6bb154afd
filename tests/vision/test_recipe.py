"""The three stages, against the same written plainly; and what a run chooses by."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import flowstream as fs
from flowstream.companions.linear_probe import with_original_head
from flowstream.vision.evaluation import measure
from flowstream.vision.methods import COMPANIONS, WEIGHTS, Method
from flowstream.vision.recipe import Recipe, fine_tune, probe_losses, retention
from flowstream.vision.task import Task

SEED, NUM = 3, 48


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.mix, self.last = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def features(self, image: Tensor) -> Tensor:
        return self.last(self.mix(self.norm(self.conv(image)).relu())).relu().amax((2, 3))

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))


def images(num: int, seed: int) -> TensorDataset:
    """Three classes of noisy patterns, some hard to tell."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 3
    patterns = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(num, 1, 6, 6, generator=draws) * torch.rand(num, 1, 1, 1, generator=draws) * 3
    return TensorDataset(patterns[labels] + noise, labels)


TASK = Task(train=images(NUM, 0), validation=images(24, 1), test=images(24, 2), num_classes=3)


def recipe(**options: Any) -> Recipe:
    lengths = {"probe_epochs": 3, "epochs": 3, "head_epochs": 2, "probe_lr": 0.05, "head_lr": 0.02}
    return Recipe(**(lengths | {"batch_size": 12, "seed": SEED} | options))


def pretrained() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
        for _ in range(3):
            net(torch.randn(16, 1, 6, 6))
    return net.eval()


def plain(original: Net, learning_rate: float) -> tuple[Net, Net, Net, Tensor]:
    """The paper's recipe with nothing of ours: probe, fine-tuned and final models, and the weights by image."""

    def loader(stage: int) -> DataLoader[Any]:
        indices = torch.arange(NUM)
        x, y = TASK.train.tensors  # type: ignore[attr-defined]
        order = torch.Generator().manual_seed(3 * SEED + stage)
        return DataLoader(TensorDataset(x, y, indices), batch_size=12, shuffle=True, generator=order)

    def train_head(net: Net, batches: Any, epochs: int, rate: float) -> None:
        net.eval()
        sgd = torch.optim.SGD(net.head.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
        for _ in range(epochs):
            for x, y, _ in batches:
                with torch.no_grad():
                    found = net.features(x)
                loss = F.cross_entropy(net.head(found), y)
                sgd.zero_grad()
                loss.backward()
                sgd.step()

    probe = copy.deepcopy(original)
    torch.manual_seed(SEED)
    probe.head = nn.Linear(6, 3)
    train_head(probe, loader(0), 3, 0.05)
    x, y = TASK.train.tensors  # type: ignore[attr-defined]
    with torch.no_grad():
        losses = F.cross_entropy(probe(x), y, reduction="none")
    weights = torch.exp(-losses / float(np.median(losses.numpy())))

    tuned = copy.deepcopy(probe).train()
    sgd = torch.optim.SGD(tuned.parameters(), lr=learning_rate, momentum=0.9, weight_decay=5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=3)
    batches = loader(1)
    for _ in range(3):
        for x, y, which in batches:
            loss = (weights[which] * F.cross_entropy(tuned(x), y, reduction="none")).mean()
            sgd.zero_grad()
            loss.backward()
            sgd.step()
        cosine.step()
    final = copy.deepcopy(tuned)
    train_head(final, loader(2), 2, 0.02)
    return probe, tuned, final, weights


def assert_close(found: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tau", ["exact", "running"])
def test_with_the_exact_tau_it_is_the_papers_recipe_written_plainly(tau: str) -> None:
    original = pretrained()
    before = copy.deepcopy(original.state_dict())
    probe, tuned, final, weights = plain(original, 0.05)

    own = recipe()
    found = own.probe(original, TASK)
    assert_close(found, probe)
    exact = float(np.median(probe_losses(found, TASK, own).numpy()))
    if tau == "exact":  # as the paper takes it; the running median has seen all images by the end of its warm-up
        own = recipe(temperature=fs.FixedTemperature(exact))
    loader = own.loader(TASK, 1)
    stream = fs.FlowStream(loader, fs.ClassifierScorer(found), temperature=own.temperature, cache_key="__key__")
    given = {name: w for b in stream for name, w in zip(b["__key__"], b["flow_weight"].tolist(), strict=True)}
    torch.testing.assert_close(torch.tensor([given[str(i)] for i in range(NUM)]), weights, rtol=0, atol=1e-6)

    second = fine_tune(found, TASK, Method.of("flow"), own, learning_rate=0.05, choose_epoch=False)
    assert_close(second.model, tuned)
    assert_close(own.train_head(second.model, TASK), final)
    assert second.figures["flow/tau"] == pytest.approx(exact, rel=1e-6)
    assert_close(original, type("Was", (), {"state_dict": lambda self: before})())


def test_the_epoch_is_chosen_on_the_validation_split() -> None:
    own = recipe(epochs=4, temperature=fs.WindowMedian())
    probe = own.probe(pretrained(), TASK)
    run = {"learning_rate": 0.2, "recipe": own}
    chosen = fine_tune(probe, TASK, Method.of("standard"), **run)
    assert chosen.best_epoch < 4
    found = measure(chosen.model, TASK.validation)
    last = measure(fine_tune(probe, TASK, Method.of("standard"), **run, choose_epoch=False).model, TASK.validation)
    assert (found.accuracy, -found.loss) >= (last.accuracy, -last.loss)
    other = Task(train=TASK.train, validation=TASK.validation, test=images(24, 5), num_classes=3)
    again = fine_tune(probe, other, Method.of("standard"), **run)
    assert again.best_epoch == chosen.best_epoch
    assert_close(again.model, chosen.model)


def test_every_method_takes_as_many_steps_and_ends_as_a_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    counted = torch.optim.SGD.step

    def step(self: Any, *arguments: Any, **options: Any) -> Any:
        steps.append(1)
        return counted(self, *arguments, **options)

    original = pretrained()
    own = recipe(epochs=2)
    probe = own.probe(original, TASK)
    before = copy.deepcopy(probe)
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    models = {}
    for name in (*WEIGHTS, *COMPANIONS, "flow+l2", "flow+wise", "permuted+hft+mofo"):
        steps.clear()
        tuned = fine_tune(probe, TASK, Method.of(name), own, learning_rate=0.1, choose_epoch=False).model
        assert len(steps) == 2 * 4, name
        assert tuned.state_dict().keys() == probe.state_dict().keys(), name
        assert all(p.requires_grad for p in tuned.parameters()), name
        assert_close(probe, before)
        kept = retention(tuned, original, TASK.test)
        assert kept == measure(with_original_head(tuned, original), TASK.test)
        models[name] = torch.cat([p.detach().flatten() for p in tuned.parameters()])
    start = torch.cat([p.detach().flatten() for p in probe.parameters()])
    moved = {name: float((end - start).norm()) for name, end in models.items()}
    assert len({round(m, 6) for m in moved.values()}) == len(moved), moved  # no two are the same
    assert moved["l2"] < moved["standard"]
    assert moved["wise"] == pytest.approx(moved["standard"] / 2, rel=1e-4)
    assert (models["mofo"] - start).ne(0).float().mean() < (models["standard"] - start).ne(0).float().mean()
    with pytest.raises(ValueError, match="resampling kept less than half a batch"):
        fine_tune(probe, TASK, Method.of("resample"), recipe(batch_size=48), learning_rate=0.1)


def test_mixed_images_are_scored_as_they_are_trained_on() -> None:
    own = recipe(mixup=0.4)
    probe = own.probe(pretrained(), TASK)
    batch = next(iter(own.loader(TASK, 1)))
    assert batch["labels"].shape == (12, 3)
    mixed, plain = (fine_tune(probe, TASK, Method.of("flow"), r, learning_rate=0.05) for r in (own, recipe()))
    assert mixed.figures["flow/cache_hit_rate"] < 0.1  # an image may be its own partner
    assert plain.figures["flow/cache_hit_rate"] == pytest.approx(2 / 3)  # scored in its first epoch only
    fine_tune(probe, TASK, Method.of("dro"), own, learning_rate=0.05)


@pytest.mark.parametrize(
    "name", ["flwo", "flow+standard", "flow+flow", "", "l2+dro+resample", "flow+dro", "flow,l2"], ids=repr
)
def test_methods_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="method '"):
        Method.of(name)


def test_joined_methods_are_read() -> None:
    method = Method.of("l2+flow+wise")
    assert (method.weights, method.companions, method.mode) == ("flow", {"l2", "wise"}, "weight")
    assert Method.of("hft").policy == fs.Uniform()
    assert Method.of("resample").mode == "resample"
