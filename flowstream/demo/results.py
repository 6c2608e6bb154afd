"""What the experiment found, as plain frozen dataclasses; `results.json` holds exactly these."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One method, seed and learning rate."""

    seed: int
    budget: str
    """One of `BUDGETS`: what decided on the number of steps."""
    method: str
    learning_rate: float
    points: tuple[PointResult, ...]
    num_samples: int
    """Distinct problems trained on."""
    seconds: float
    score_seconds: float
    acceptance: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The point that a method is judged by, chosen on validation, measured on the test split."""

    seed: int
    learning_rate: float
    step: int
    target_loss: float
    exact_match: float
    answer_accuracy: float
    """Share of decoded answers that end in the right number."""
    retained_loss: float
    gain: float
    """Retained loss of standard fine-tuning's curve at the same target loss, minus this; NaN outside the curve."""


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

    @classmethod
    def of(cls, of_seeds: Sequence[Choice | None]) -> "Figure":
        choices = [choice for choice in of_seeds if choice is not None]
        inside = [choice.gain for choice in choices if math.isfinite(choice.gain)]
        return cls(
            choices=tuple(choices),
            mean=statistics.fmean(inside) if inside else math.nan,
            spread=statistics.stdev(inside) if len(inside) > 1 else math.nan,
            num_outside=len(choices) - len(inside),
            num_over_budget=len(of_seeds) - len(choices),
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
class MethodResult:
    """Everything a table says of a method."""

    title: str
    equal_steps: Figure
    equal_flops: Figure
    curve_gain: tuple[float, ...]
    """By seed: mean gain of the corners of the method's own envelope on validation."""
    over_permuted: tuple[float, ...]
    """By seed, at equal steps: gain less that of the permuted weights. What is left is owed to *which* samples have
    weight, not to smaller or uneven steps; NaN where either is outside."""
    flops_ratio: float
    """FLOPs of a whole run over standard's."""
    score_share: float
    """Share of those FLOPs that went into scoring."""
    num_samples: float
    """Distinct problems trained on, mean over runs; so are the next three."""
    acceptance: float
    """Share of the stream's candidates that were delivered."""
    seconds: float
    """Wall time of a run without its evaluations."""
    score_seconds: float


@dataclass(frozen=True, kw_only=True)
class TauWindow:
    """What a stream told of itself after some steps."""

    step: int
    tau: float
    tau_error: float
    """Standard error of τ, in nats, as the stream estimates it."""
    ess: float
    """ESS/n of the weights."""


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """τ of the offline median, and what the stream held for it, by seed."""

    exact: float
    exact_ess: float
    online: dict[int, tuple[TauWindow, ...]]
    relative_error: float
    """|τ online / τ exact - 1| at the end of the run, the largest over seeds."""


@dataclass(frozen=True, kw_only=True)
class ProblemSample:
    level: str
    question: str
    worked: str
    loss: float
    weight: float
    decoded: str
    """What standard fine-tuning's chosen model answers."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """The whole of it."""

    settings: dict[str, Any]
    versions: dict[str, str]
    corpus: dict[str, Any]
    parameters: int
    pretraining_loss: tuple[float, ...]
    reference: dict[str, dict[str, float]]
    """Split → the measures of the checkpoint before fine-tuning."""
    loss_by_level: dict[str, tuple[float, ...]]
    """Level → the reference's loss of each of its fine-tuning problems."""
    temperature: Temperature
    runs: tuple[RunResult, ...]
    curves: tuple[Curve, ...]
    methods: dict[str, MethodResult]
    samples: tuple[ProblemSample, ...]
    """Problems from the easiest to the hardest."""
    seconds: dict[str, float]
    """Wall time by stage."""

    def save(self, path: Path) -> None:
        """Write as JSON; what is not a finite number (a gain outside the curve) becomes null."""
        path.write_text(json.dumps(_plain(asdict(self)), indent=1, ensure_ascii=False), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) and abs(value) < 1e6 else value if math.isfinite(value) else None
    return value
