"""What a comparison finds of its runs, as plain frozen dataclasses; the files of results hold exactly these."""

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUDGETS = ("equal_steps", "equal_flops")
"""Equal steps: as many as standard's. Equal FLOPs: as many as standard's FLOPs pay for, scoring included."""


@dataclass(frozen=True, kw_only=True)
class PointResult:
    """A run after some steps, on the validation split. Losses in nats a token."""

    step: int
    target_loss: float
    exact_match: float
    retained_loss: float
    train_tokens: int
    score_tokens: int
    flops: float
    alpha: float | None = None
    """Of a model between reference and tuned, the share of the tuned."""
    distance: float = math.nan
    """‖Δθ‖₂ to the start, over all parameters."""
    clip_rate: float = math.nan
    """Share of the steps so far whose gradient was cut."""

    @property
    def is_finite(self) -> bool:
        """Whether it can be compared; a run that diverged cannot."""
        return math.isfinite(self.target_loss) and math.isfinite(self.retained_loss)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One method, seed and learning rate."""

    seed: int
    budget: str
    """One of `BUDGETS`: what decided on the number of steps."""
    method: str
    learning_rate: float
    strength: float | None = None
    """Of the pull to the reference, where there is one."""
    points: tuple[PointResult, ...]
    num_samples: int
    """Distinct samples trained on."""
    num_parameters: int = 0
    num_trained: int = 0
    """Parameters that get a gradient."""
    seconds: float
    score_seconds: float
    acceptance: float

    @classmethod
    def of_plain(cls, found: dict[str, Any]) -> "RunResult":
        """As `asdict` gives it, back from JSON."""
        return cls(**{**found, "points": tuple(PointResult(**point) for point in found["points"])})


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The point that a method is judged by, chosen on validation, measured on the test split."""

    seed: int
    learning_rate: float
    step: int
    strength: float | None = None
    alpha: float | None = None
    target_loss: float
    exact_match: float
    answer_accuracy: float | None = None
    """Share of decoded answers that end in the right number, where answers are decoded."""
    retained_loss: float
    gain: float
    """Retained loss of standard fine-tuning's curve at the same target loss, minus this; NaN outside the curve."""
    flops: float = math.nan
    distance: float = math.nan
    clip_rate: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A method's figure under one budget: its gain on the test split, over the seeds."""

    choices: tuple[Choice, ...]
    mean: float
    """Over the seeds whose choice lies within the curve; NaN if none does."""
    spread: float
    """Standard deviation over those seeds; NaN below two."""
    num_outside: int
    """Seeds whose choice lies outside the curve."""
    num_over_budget: int
    """Seeds of which no point fits the budget."""
    num_diverged: int = 0
    """Seeds of which every run diverged."""

    @classmethod
    def of(cls, of_seeds: Sequence[Choice | None], diverged: Sequence[bool] = ()) -> "Figure":
        """Of each seed's choice; one that is missing is over budget, unless it `diverged`."""
        num_diverged = sum(diverged)
        choices = [choice for choice in of_seeds if choice is not None]
        inside = [choice.gain for choice in choices if math.isfinite(choice.gain)]
        return cls(
            choices=tuple(choices),
            mean=statistics.fmean(inside) if inside else math.nan,
            spread=statistics.stdev(inside) if len(inside) > 1 else math.nan,
            num_outside=len(choices) - len(inside),
            num_over_budget=len(of_seeds) - len(choices) - num_diverged,
            num_diverged=num_diverged,
        )


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Standard fine-tuning's curve of one seed, on the test split, by ascending target loss."""

    seed: int
    learning_rate: tuple[float, ...]
    step: tuple[int, ...]
    target_loss: tuple[float, ...]
    retained_loss: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TauWindow:
    """What a stream told of itself after some steps."""

    step: int
    tau: float
    tau_error: float
    """Standard error of τ, in nats, as the stream estimates it."""
    ess: float
    """ESS/n of the weights."""


def as_json(found: Any) -> str:
    """For readers: rounded to six places; what is not a finite number (a gain outside the curve) becomes null."""
    return json.dumps(_plain(found), indent=1, ensure_ascii=False)


def write_whole(path: Path, content: str) -> None:
    """The file is there with all of its content, or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) and abs(value) < 1e6 else value if math.isfinite(value) else None
    return value
