"""Image datasets by name, from the files that the user has: torchvision's, or folders of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Dataset, Subset

from flowstream.vision.extras import imported
from flowstream.vision.presets import FOLDER, IMAGENET, PRESETS, Preset
from flowstream.vision.task import Task, num_of, split

_VALIDATION, _TEST = 0.1, 0.2
"""Shares: of the training images for validation; of all images for the test, where a dataset has no split."""
_CLASSES = {"cifar10": 10, "cifar100": 100, "flowers102": 102, "cars": 196}

_Halves = tuple[Dataset[Any], Dataset[Any]]
_Open = Callable[[Any], _Halves]
"""A transform → training and test images."""


def preset_of(name: str) -> Preset:
    """The settings for a dataset."""
    return PRESETS.get(name, FOLDER)


def load_task(name: str, root: Path | None, *, size: int, download: bool, seed: int) -> Task:
    """A dataset by its name, or a folder of images: FOLDER/train and FOLDER/test (or val), or a folder a class.

    Of the training images a tenth is for validation; a dataset without a split is split four to one; both by `seed`.
    Images are transformed as in the official code, to `size` pixels. ValueError where files are missing.
    """
    preset = preset_of(name)
    training, plain = (_transform(preset, size, augment=augment) for augment in (True, False))
    known = name in PRESETS
    folder = root if known else Path(name)
    if folder is None:
        raise ValueError(f"--dataset {name} is read from files: say where they are with --data FOLDER")
    if not folder.is_dir() and not (known and download):
        told = f"--data {folder}: there is no folder"
        names = ", ".join(PRESETS)
        raise ValueError(told if known else f"--dataset {name}: there is no such folder, and no data set but {names}")
    has_halves = (folder / "train").is_dir()
    if not known or (has_halves and name in ("caltech101", "cars", "dogs")):
        opened, num_classes = _of_folder(folder, seed)
    else:
        opened, num_classes = _of_torchvision(name, folder, download, seed)
    try:
        (train, _), (quiet, test) = opened(training), opened(plain)
    except (RuntimeError, FileNotFoundError) as error:
        told = "" if download or name == "cars" else ", or fetch it with --download"
        raise ValueError(f"--data {folder} does not hold {name} as torchvision reads it ({error}){told}") from error
    kept, held = split(num_of(train), _VALIDATION, seed=seed)
    return Task(train=Subset(train, kept), validation=Subset(quiet, held), test=test, num_classes=num_classes)


def original_images(folder: Path, *, size: int) -> Dataset[Any]:
    """Images of the original task, as ImageNet's validation: a folder a class, in the order of the model's classes."""
    if not folder.is_dir():
        raise ValueError(f"--original {folder}: there is no folder")
    transforms = imported("torchvision.transforms")
    steps = [transforms.Resize(size * 256 // 224), transforms.CenterCrop(size)]
    return _folder_of_classes(folder, _composed(steps, IMAGENET))


def _of_torchvision(name: str, root: Path, download: bool, seed: int) -> tuple[_Open, int]:
    datasets = imported("torchvision.datasets")
    place = str(root)

    def cifar(transform: Any) -> _Halves:
        kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        train, test = (
            kind(place, train=is_train, transform=transform, download=download) for is_train in (True, False)
        )
        return train, test

    def flowers(transform: Any) -> _Halves:
        parts = (datasets.Flowers102(place, part, transform, download=download) for part in ("train", "val", "test"))
        train, further, test = parts
        return ConcatDataset([train, further]), test  # the code trains on both

    def cars(transform: Any) -> _Halves:
        train, test = (datasets.StanfordCars(place, part, transform) for part in ("train", "test"))
        return train, test

    def caltech(transform: Any) -> _Halves:
        return _split(datasets.Caltech101(place, transform=transform, download=download), seed)

    if name == "dogs":  # torchvision has no class of its own for it
        return _of_folder(root / "Images" if (root / "Images").is_dir() else root, seed)
    kinds: dict[str, _Open] = {"cifar10": cifar, "cifar100": cifar, "flowers102": flowers, "cars": cars}
    return kinds.get(name, caltech), _CLASSES.get(name, 101)


def _of_folder(folder: Path, seed: int) -> tuple[_Open, int]:
    if not (folder / "train").is_dir():
        return lambda transform: _split(_folder_of_classes(folder, transform), seed), len(_classes(folder))
    test = next((folder / part for part in ("test", "val") if (folder / part).is_dir()), None)
    if test is None:
        raise ValueError(f"{folder} has a folder train, and neither test nor val beside it")
    if (own := _classes(folder / "train")) != _classes(test):
        differing = sorted(set(own) ^ set(_classes(test)))
        raise ValueError(f"{folder}: {differing[0]} is a class in one of train and {test.name} only")
    return lambda transform: (
        _folder_of_classes(folder / "train", transform),
        _folder_of_classes(test, transform),
    ), len(own)


def _split(dataset: Dataset[Any], seed: int) -> _Halves:
    train, test = split(num_of(dataset), _TEST, seed=seed)
    return Subset(dataset, train), Subset(dataset, test)


def _classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def _folder_of_classes(folder: Path, transform: Any) -> Dataset[Any]:
    datasets = imported("torchvision.datasets")
    if not _classes(folder):
        raise ValueError(f"{folder} holds no folders: put the images of each class into one")
    try:
        images: Dataset[Any] = datasets.ImageFolder(str(folder), transform=transform)
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: {error}") from error
    return images


def _transform(preset: Preset, size: int, *, augment: bool) -> Any:
    """As in the official code, whose test images are those without augmentation."""
    transforms = imported("torchvision.transforms")
    larger = size * 256 // 224
    shapes: dict[str, tuple[list[Any], list[Any]]] = {
        "short": ([transforms.Resize(size)], [transforms.Resize(size)]),
        "square": ([transforms.Resize((size, size))], [transforms.Resize((size, size))]),
        "random": (
            [transforms.Resize((larger, larger)), transforms.RandomCrop(size)],
            [transforms.Resize((larger, larger)), transforms.CenterCrop(size)],
        ),
        "resized": ([transforms.RandomResizedCrop(size)], [transforms.Resize(larger), transforms.CenterCrop(size)]),
    }
    trained, plain = shapes[preset.crop]
    if not augment:
        return _composed(plain, preset.normal)
    jitter = [transforms.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)] * preset.jitter
    return _composed([*trained, transforms.RandomHorizontalFlip(), *jitter], preset.normal)


def _composed(steps: list[Any], normal: tuple[tuple[float, ...], tuple[float, ...]]) -> Any:
    transforms = imported("torchvision.transforms")
    return transforms.Compose(
        [transforms.Lambda(_in_colour), *steps, transforms.ToTensor(), transforms.Normalize(*normal)]
    )


def _in_colour(image: Any) -> Any:
    return image.convert("RGB")  # Caltech has grey ones
