"""`flowstream vision`: fine-tune an image classifier on classes of its own with FLOW, and see what it forgets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

# What the help shows of an option that may be left out: "{None}|INT … (default: None)" tells nobody anything.
_MaybeCount = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
_MaybeNumber = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
_MaybePath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class Vision:
    """Fine-tune an image classifier on new classes in the paper's three stages, and report target and retention.

    Stage 1 trains a new head on the frozen body, stage 2 body and head by weights from the frozen stage 1, stage 3 the
    head alone. What is left out is the paper's setting for the data set. Without options: handwritten digits, no
    network.
    """

    model: str = "digits-resnet"
    """digits-resnet (pre-trained on the digits 0 to 4 on the spot), timm:NAME, torchvision:NAME, or a name or folder of
    Hugging Face's."""
    dataset: str = "digits"
    """digits (5 to 9), cifar10, cifar100, flowers102, caltech101, cars, dogs; or a folder with train and test (or val),
    or with a folder a class."""
    data: _MaybePath = None
    """Folder with the files of the data set, as torchvision reads them; caltech101, cars and dogs may be folders of
    images with train and test."""
    original: _MaybePath = None
    """Images of the original task, a folder a class, in the order of the model's classes: ImageNet's validation."""
    weights: _MaybePath = None
    """State of a timm or torchvision model, in place of its download."""
    download: bool = False
    """Fetch the data set into --data, where torchvision knows how."""
    method: str = "flow"
    """standard, flow, permuted or resample, and companions l2, l1, wise, lora, mofo, hft, dro, joined as in flow+l2."""
    lr: tuple[float, ...] = ()
    """Learning rates of stage 2; of several the best on the validation split is taken."""
    probe_lr: _MaybeNumber = None
    """Learning rate of stages 1 and 3."""
    epochs: _MaybeCount = None
    """Of stage 2."""
    probe_epochs: _MaybeCount = None
    """Of stage 1."""
    head_epochs: _MaybeCount = None
    """Of stage 3."""
    batch_size: _MaybeCount = None
    """Images of a step."""
    size: int = 224
    """Pixels of an image's side; digits have 16."""
    tau: _MaybeNumber = None
    """τ in nats; by default the running median."""
    exact_tau: bool = False
    """τ is the exact median, from a pass over all training images before stage 2, as in the paper."""
    target_ess: _MaybeNumber = None
    """Choose τ so that the effective sample size is this share of the images, in place of the median."""
    normalize: bool = False
    """Divide weights by their running mean, so that steps keep their size."""
    score_once: bool = True
    """An image has one weight, of its first augmentation; or else each augmentation its own, as in the paper's code."""
    mixup: float = 0.0
    """α of mixup, in all stages: what is scored is the mixture, under its soft target. 0: none; 0.2 is usual."""
    seed: int = 0
    """Of splits, orders, and what is drawn."""
    workers: int = 0
    """Processes that read images."""
    out: _MaybePath = None
    """Folder for the fine-tuned model and results.json."""

    def check(self) -> None:
        """`ValueError` for what cannot be."""
        for name in ("epochs", "probe_epochs", "head_epochs", "batch_size", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}: give 1 or more")
        for name, rates in (("--lr", self.lr), ("--probe-lr", (self.probe_lr,)), ("--tau", (self.tau,))):
            if any(value is not None and not 0 < value < float("inf") for value in rates):
                raise ValueError(f"{name} is {' '.join(map(str, rates))}: give numbers above 0")
        for name in ("seed", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} is {getattr(self, name)}: give 0 or more")
        if not 0 <= self.mixup < float("inf"):
            raise ValueError(f"--mixup is {self.mixup}: give a number above 0, such as 0.2, or 0 for none")
        if self.target_ess is not None and not 0 < self.target_ess < 1:
            raise ValueError(f"--target-ess is {self.target_ess}: give a share between 0 and 1")
        if (self.tau is not None) + self.exact_tau + (self.target_ess is not None) > 1:
            raise ValueError("--tau, --exact-tau and --target-ess all choose τ: give one of them")
        from flowstream.vision.presets import PRESETS

        if self.dataset not in PRESETS and not Path(self.dataset).exists():
            names = ", ".join(PRESETS)
            raise ValueError(f"--dataset {self.dataset}: there is no such folder, and no data set but {names}")
        if (self.model == "digits-resnet") != (self.dataset == "digits"):
            raise ValueError(
                f"--model {self.model} and --dataset {self.dataset} do not fit: digits are 16 x 16 in grey, for "
                "digits-resnet, which knows nothing else. For other images give --model timm:NAME, torchvision:NAME or "
                "a model of Hugging Face's"
            )
        if self.dataset == "digits" and self.original is not None:
            raise ValueError("--original is for other models: digits-resnet is measured on the digits 0 to 4")

    def run(self) -> None:
        self.check()
        from flowstream.vision.run import run

        run(self)
