"""What the experiment found, as plain frozen dataclasses; `results.json` holds exactly these."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowstream.compare.results import Curve, Figure, RunResult, TauWindow, as_json


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
        path.write_text(as_json(asdict(self)), encoding="utf-8")
