"""Digits as two tasks, and the small ResNet that knows the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flowstream.vision.evaluation import measure
from flowstream.vision.models import digits_resnet, load_model, save_model
from flowstream.vision.task import digits, num_of, split, training_loader


def contents(dataset: Any) -> set[bytes]:
    return {dataset[i][0].numpy().tobytes() for i in range(len(dataset))}


def test_digits_are_two_tasks_whose_parts_have_no_image_in_common() -> None:
    tasks = digits(seed=1)
    for task in tasks:
        parts = [task.train, task.validation, task.test]
        sets = [contents(part) for part in parts]
        assert not sets[0] & sets[1]
        assert not sets[0] & sets[2]
        assert not sets[1] & sets[2]
        counts = [num_of(part) for part in parts]
        assert counts[0] == pytest.approx(3 * counts[1], abs=3)
        assert counts[1] == pytest.approx(counts[2], abs=2)
        assert {int(part[i][1]) for part in parts for i in range(len(part))} == set(range(5))  # type: ignore[arg-type]
    assert sum(num_of(part) for task in tasks for part in (task.train, task.validation, task.test)) == 1797
    assert not contents(tasks[0].train) & contents(tasks[1].train)
    image: Tensor = tasks[0].train[0][0]
    assert image.shape == (1, 16, 16)
    again, other = digits(seed=1)[0], digits(seed=2)[0]
    assert contents(again.test) == contents(tasks[0].test)
    assert contents(other.test) != contents(again.test)


def test_batches_name_their_images_and_come_in_the_seeds_order() -> None:
    task, _ = digits(seed=0)
    first, again, other = (next(iter(training_loader(task.train, batch_size=8, seed=seed))) for seed in (0, 0, 1))
    assert first["__key__"] == again["__key__"] != other["__key__"]
    for name, image, label in zip(first["__key__"], first["image"], first["labels"], strict=True):
        expected = task.train[int(name)]
        assert image.equal(expected[0])
        assert int(label) == int(expected[1])


def test_a_split_is_of_all_and_by_its_seed() -> None:
    kept, held = split(50, 0.2, seed=0)
    assert sorted(kept + held) == list(range(50))
    assert len(held) == 10
    assert split(50, 0.2, seed=0) == (kept, held) != split(50, 0.2, seed=1)
    assert len(split(3, 0.01, seed=0)[1]) == 1


def test_the_small_resnet_learns_its_digits(tmp_path: Any) -> None:
    old, new = digits(seed=0)
    model = digits_resnet(old, seed=0, epochs=2)
    assert not model.training
    assert measure(model, old.test).accuracy > 0.6
    again = digits_resnet(old, seed=0, epochs=2)
    assert measure(model, new.test) == measure(again, new.test)
    save_model(model, tmp_path / "out")
    loaded = load_model(str(tmp_path / "out"))
    assert measure(loaded, old.test) == measure(model, old.test)
    save_model(torch.nn.Linear(2, 2), tmp_path / "plain")
    assert torch.load(tmp_path / "plain" / "model.pt").keys() == {"weight", "bias"}


def test_measures_are_means_over_the_images() -> None:
    class Answers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    labels = torch.tensor([0, 1, 0])
    found = measure(Answers(), torch.utils.data.TensorDataset(logits, labels), batch_size=2)
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))
