"""The paper's settings for images, as its official code has them.

Source: the authors' code for Sanyal et al. (arXiv 2502.02797), in the copy pbansal5/FLOW_finetuning at a2d175c, folder
vision/: run_linearprobing.sh, run_flow_round1.sh, run_flow_round2.sh, run_standardfinetune.sh and what they start.
Learning rates and τ are those of ResNet-18; for ResNet-50 the code has none, and these are taken. All else is for all
models.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of each channel."""
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a run takes where the user says nothing."""

    epochs: int
    """Of each of the three stages."""
    probe_lr: float
    """Of the first stage and of the last: the code gives both the same."""
    lr: float
    """Of the second stage, with weights."""
    standard_lr: float
    """Of the second stage, without."""
    tau: float | None = None
    """Median loss of ResNet-18's probe, in nats, to compare with: a run takes its own."""
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    normal: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    """Mean and standard deviation that images are normalised with."""
    crop: str = "square"
    """How images come to their size: "short" (the short side), "square" (both), "random" (a random crop of a somewhat
    larger square), "resized" (a random resized crop)."""
    jitter: bool = False
    """Whether training changes brightness, contrast and saturation by up to 20 %."""


PRESETS: dict[str, Preset] = {
    "digits": Preset(epochs=10, probe_lr=0.01, lr=0.01, standard_lr=0.01, batch_size=32),  # ours: the paper has none
    "cifar10": Preset(
        epochs=20, probe_lr=0.005, lr=0.001, standard_lr=0.005, tau=0.1041, normal=_CIFAR10, crop="short"
    ),
    "cifar100": Preset(
        epochs=25, probe_lr=0.005, lr=0.005, standard_lr=0.01, tau=0.6626, normal=_CIFAR100, crop="short"
    ),
    "flowers102": Preset(epochs=25, probe_lr=0.05, lr=0.05, standard_lr=0.05, tau=0.0181),
    "caltech101": Preset(epochs=30, probe_lr=0.01, lr=0.01, standard_lr=0.005, tau=0.0543, crop="resized", jitter=True),
    "dogs": Preset(epochs=30, probe_lr=0.005, lr=0.005, standard_lr=0.001, tau=0.2123, crop="random", jitter=True),
    "cars": Preset(epochs=30, probe_lr=0.05, lr=0.01, standard_lr=0.05, tau=0.3832, crop="random", jitter=True),
}
FOLDER = Preset(epochs=25, probe_lr=0.01, lr=0.01, standard_lr=0.01, crop="random", jitter=True)
"""For images of the user's own: as for cars, with the code's default learning rate."""
