"""Image classifiers by name: Hugging Face's, timm's, torchvision's, and a small ResNet pre-trained on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowstream.losses import weighted_cross_entropy
from flowstream.scoring.head import logits_of
from flowstream.vision.extras import imported
from flowstream.vision.task import Task, training_loader

PRETRAINING_EPOCHS = 15
"""Of the small ResNet."""


def load_model(name: str, *, weights: Path | None = None) -> nn.Module:
    """A pre-trained classifier: a name or folder of Hugging Face's, `timm:NAME` or `torchvision:NAME`.

    `weights`: a file with the state of a timm or torchvision model, in place of the download. ValueError, or OSError
    where files are not to be had.
    """
    library, _, own = name.partition(":")
    if library not in ("timm", "torchvision"):
        if weights is not None:
            raise ValueError("--weights is for timm: and torchvision: models; a Hugging Face model has its own")
        if ("/" in name or "." in name) and not Path(name).is_dir() and name.count("/") != 1:
            raise ValueError(f"--model {name}: there is no folder")
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification.from_pretrained(name)  # type: ignore[no-any-return]
    package = imported(library)
    known = package.list_models() if library == "timm" else package.models.list_models()
    if own.partition(".")[0] not in known:
        raise ValueError(f"--model {name}: {library} has no such model, such as {library}:resnet18")
    if library == "timm":
        model: nn.Module = package.create_model(own, pretrained=weights is None)
    else:
        model = package.models.get_model(own, weights="DEFAULT" if weights is None else None)
    if weights is not None:
        _load(model, weights)
    return model


def digits_resnet(task: Task, *, seed: int, epochs: int | None = None) -> nn.Module:
    """A ResNet of 78,000 parameters, pre-trained on a task of digits; in eval mode."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic"
    )
    config.num_labels = task.num_classes
    model: nn.Module = ResNetForImageClassification(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    loader = training_loader(task.train, batch_size=32, seed=seed)
    epochs = epochs or PRETRAINING_EPOCHS
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    model.train()
    for _ in range(epochs):
        for batch in loader:
            labels = batch["labels"]
            weighted_cross_entropy(logits_of(model(batch["image"])), labels, torch.ones(len(labels))).backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    return model.eval()


def save_model(model: nn.Module, folder: Path) -> None:
    """A Hugging Face checkpoint, or else model.pt, the state of the module."""
    folder.mkdir(parents=True, exist_ok=True)
    hugging_face: Any = model
    if hasattr(hugging_face, "save_pretrained") and hasattr(model, "config"):
        hugging_face.save_pretrained(folder)
    else:
        torch.save(model.state_dict(), folder / "model.pt")


def _load(model: nn.Module, file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"--weights {file}: there is no such file")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        state: Any = load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"--weights {file} is not of a {type(model).__name__} like this: {error}") from error
