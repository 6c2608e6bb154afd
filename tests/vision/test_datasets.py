"""torchvision's own classes on files in their formats, folders of images, and models by name: with torchvision only."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

BUILT_FOR_ANOTHER_TORCH = (ImportError, RuntimeError)
torchvision = pytest.importorskip("torchvision", exc_type=BUILT_FOR_ANOTHER_TORCH)

from flowstream.vision.datasets import load_task, original_images, preset_of  # noqa: E402
from flowstream.vision.models import load_model  # noqa: E402
from flowstream.vision.presets import PRESETS  # noqa: E402
from flowstream.vision.task import num_of  # noqa: E402


def save_images(folder: Path, num: int, *, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    draws = np.random.default_rng(seed)
    for number in range(num):
        grey = number == 0
        pixels = draws.integers(0, 256, (40, 30) if grey else (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def save_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, name: str = "CIFAR10") -> Path:
    """Files in CIFAR's format, tiny; the class looks for the checksums of the real ones."""
    kind = getattr(torchvision.datasets, name)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    key, num_classes = ("labels", 10) if name == "CIFAR10" else ("fine_labels", 100)
    draws = np.random.default_rng(0)
    for part in ("train_list", "test_list"):
        for file, _ in getattr(kind, part):
            data = draws.integers(0, 256, (20, 3 * 32 * 32), dtype=np.uint8)
            labels = [i % num_classes for i in range(20)]
            (folder / file).write_bytes(pickle.dumps({"data": data, key: labels}))
        monkeypatch.setattr(kind, part, [[file, None] for file, _ in getattr(kind, part)])
    meta = kind.meta
    (folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: [str(i) for i in range(num_classes)]}))
    monkeypatch.setattr(kind, "meta", meta | {"md5": None})
    return root


@pytest.mark.parametrize(("name", "kind", "num_train"), [("cifar10", "CIFAR10", 100), ("cifar100", "CIFAR100", 20)])
def test_cifar_is_read_by_torchvision_and_a_tenth_is_held_out(
    name: str, kind: str, num_train: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task(name, save_cifar(tmp_path, monkeypatch, kind), size=32, download=False, seed=0)
    assert [num_of(part) for part in (task.train, task.validation, task.test)] == [
        num_train - num_train // 10,
        num_train // 10,
        20,
    ]
    image, label = task.test[3]
    whole = getattr(torchvision.datasets, kind)(str(tmp_path), train=False)
    pixels = torch.from_numpy(np.array(whole[3][0])).permute(2, 0, 1) / 255
    mean, spread = (torch.tensor(value)[:, None, None] for value in PRESETS[name].normal)
    torch.testing.assert_close(image, (pixels - mean) / spread)
    assert label == whole[3][1]
    assert task.num_classes == (10 if name == "cifar10" else 100)


def test_training_images_are_augmented_and_those_to_choose_by_are_not(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for kind in ("cat", "dog"):
            save_images(tmp_path / part / kind, 10, seed=len(part + kind))
    for name, root in ((str(tmp_path), None), ("cars", tmp_path), ("caltech101", tmp_path), ("dogs", tmp_path)):
        task = load_task(name, root, size=16, download=False, seed=0)
        assert task.num_classes == 2
        assert [num_of(part) for part in (task.train, task.validation, task.test)] == [18, 2, 20]
        assert task.validation[0][0].equal(task.validation[0][0])
        assert any(not task.train[i][0].equal(task.train[i][0]) for i in range(8))
        assert task.test[0][0].shape == (3, 16, 16)  # the first is grey


def test_a_folder_a_class_is_split_by_the_seed(tmp_path: Path) -> None:
    for kind in ("a", "b", "c"):
        save_images(tmp_path / kind, 10)
    task, again, other = (load_task(str(tmp_path), None, size=16, download=False, seed=s) for s in (0, 0, 1))
    assert [num_of(part) for part in (task.train, task.validation, task.test)] == [22, 2, 6]
    labels = [[part[i][1] for i in range(6)] for part in (task.test, again.test, other.test)]
    assert labels[0] == labels[1] != labels[2]
    assert num_of(original_images(tmp_path, size=16)) == 30


def test_files_that_are_not_there_are_told(tmp_path: Path) -> None:
    load: dict[str, Any] = {"size": 16, "download": False, "seed": 0}
    (empty := tmp_path / "empty").mkdir()
    for name, root, told in (
        ("cifar10", None, "say where they are with --data FOLDER"),
        ("cifar10", tmp_path / "no", "there is no folder"),
        ("cifar10", tmp_path, r"does not hold cifar10 as torchvision reads it .*, or fetch it with --download"),
        ("flowers102", tmp_path, "does not hold flowers102"),
        ("caltech101", tmp_path, "does not hold caltech101"),
        ("cars", tmp_path, "does not hold cars"),
        ("cifra10", None, "--dataset cifra10: there is no such folder, and no data set but digits, cifar10"),
        (str(empty), None, "holds no folders: put the images of each class into one"),
    ):
        with pytest.raises(ValueError, match=told):
            load_task(name, root, **load)
    save_images(tmp_path / "train" / "cat", 2)
    with pytest.raises(ValueError, match="has a folder train, and neither test nor val beside it"):
        load_task(str(tmp_path), None, **load)
    save_images(tmp_path / "val" / "dog", 2)
    with pytest.raises(ValueError, match="cat is a class in one of train and val only"):
        load_task(str(tmp_path), None, **load)
    with pytest.raises(ValueError, match="--original .*: there is no folder"):
        original_images(tmp_path / "no", size=16)


def test_models_are_built_by_name_with_the_weights_of_a_file(tmp_path: Path) -> None:
    pytest.importorskip("timm", exc_type=BUILT_FOR_ANOTHER_TORCH)
    torch.manual_seed(0)
    saved = torchvision.models.resnet18()
    torch.save(saved.state_dict(), tmp_path / "resnet18.pt")
    for name in ("torchvision:resnet18", "timm:resnet18"):
        model = load_model(name, weights=tmp_path / "resnet18.pt")
        assert model.fc.weight.equal(saved.fc.weight)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"resnet18\.pt is not of a MobileNetV3 like this"):
        load_model("torchvision:mobilenet_v3_small", weights=tmp_path / "resnet18.pt")
    with pytest.raises(ValueError, match="there is no such file"):
        load_model("timm:resnet18", weights=tmp_path / "no.pt")
    with pytest.raises(ValueError, match="timm has no such model, such as timm:resnet18"):
        load_model("timm:resnet81")
    with pytest.raises(ValueError, match="torchvision has no such model"):
        load_model("torchvision:resnet81")


def test_every_data_set_of_the_paper_has_a_preset() -> None:
    assert PRESETS.keys() == {"digits", "cifar10", "cifar100", "flowers102", "caltech101", "dogs", "cars"}
    assert preset_of("cifar10").tau == 0.1041
    assert preset_of("some/folder").epochs == 25
