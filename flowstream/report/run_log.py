"""What a training run remembers of itself, row by row: enough to draw its report, and to go on after a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch

from flowstream.digest import Digest
from flowstream.report.extremes import Extremes

_VERSION = 1
_CENTROIDS = 200
"""Of the digest: enough for a figure; a log of a million samples then takes 60 KB beside its rows."""


@dataclass(frozen=True, kw_only=True)
class WindowPoint:
    """What the stream told of itself after a step: see `FlowStream.metrics`, whose names these are."""

    step: int
    tau: float = math.nan
    tau_error: float = math.nan
    mean_weight: float = math.nan
    ess: float = math.nan
    samples_seen: float = math.nan
    samples_emitted: float = math.nan
    acceptance: float = math.nan
    nonfinite: float = math.nan
    empty: float = math.nan
    cache_hit_rate: float = math.nan
    """Of the process at work: a resumed one begins to count anew."""
    score_seconds: float = math.nan
    """Over all the run's processes, as are the waits."""
    wait_seconds: float = math.nan
    padded_batches: float = math.nan


@dataclass(frozen=True, kw_only=True)
class StepPoint:
    """A step, or the mean over some steps up to it, of the training itself."""

    step: int
    loss: float
    """As it was minimised: weighted, in nats."""
    learning_rate: float = math.nan
    grad_norm: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Losses of the evaluation sets after a step; step 0 is before training."""

    step: int
    losses: Mapping[str, float]
    """Name of a set → mean loss of its labelled tokens, in nats."""


_Row = TypeVar("_Row", WindowPoint, StepPoint, Evaluation)


@dataclass(kw_only=True)
class RunLog:
    """Owns what a run has told so far. Rows are added in the order of their steps.

    >>> log = RunLog(mode="weight", target="gsm8k")
    >>> log.evaluations.append(Evaluation(step=0, losses={"gsm8k": 1.5, "web": 2.5}))
    >>> log.retained(log.evaluations[0])
    2.5
    """

    mode: str = "weight"
    """"weight" or "resample"."""
    target: str | None = None
    """Name of the evaluation set that is trained for; every other one measures retention."""
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage → wall time."""
    windows: list[WindowPoint] = field(default_factory=list)
    steps: list[StepPoint] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    losses: Digest = field(default_factory=lambda: Digest(_CENTROIDS))
    """The reference's losses of all samples seen."""
    extremes: Extremes = field(default_factory=Extremes)
    _seconds_before: tuple[float, float] = field(default=(0.0, 0.0), init=False, repr=False, compare=False)

    def add_window(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note `stream.metrics()` after a step. Seconds of the processes before are added to this one's."""
        told = {name: metrics.get(f"flow/{name}", math.nan) for name in _METRICS}
        before = dict(zip(_SECONDS, self._seconds_before, strict=True))
        self.windows.append(WindowPoint(step=step, **{name: told[name] + before.get(name, 0.0) for name in told}))

    def add_samples(
        self,
        losses: Iterable[float],
        weights: Iterable[float],
        places: Iterable[str],
        texts: Callable[[int], tuple[str, str]],
    ) -> None:
        """Note the samples of a batch, as `Extremes.add` describes them; losses that are not finite are left out."""
        losses = [float(loss) for loss in losses]
        self.losses.add([loss for loss in losses if math.isfinite(loss)])
        self.extremes.add(losses, (float(weight) for weight in weights), places, texts)

    def retained(self, evaluation: Evaluation) -> float:
        """Mean loss over the sets that are not the target; nan where there is none."""
        others = [loss for name, loss in evaluation.losses.items() if name != self.target]
        return sum(others) / len(others) if others else math.nan

    def until(self, step: int) -> RunLog:
        """The log of a run that is resumed after `step`: later rows are cut, and a new process' seconds add to the old.

        `losses` and `extremes` cannot be cut: keep a log with each checkpoint, so that they are of the same step.
        """
        log = replace(
            self,
            windows=_until(self.windows, step),
            steps=_until(self.steps, step),
            evaluations=_until(self.evaluations, step),
        )
        log._seconds_before = log._seconds()
        return log

    def _seconds(self) -> tuple[float, float]:
        last = self.windows[-1:]
        score, wait = (
            next((getattr(row, name) for row in last if math.isfinite(getattr(row, name))), 0.0) for name in _SECONDS
        )
        return score, wait

    # -- how it is kept ----------------------------------------------------------------------------

    def to_json(self) -> str:
        """All of it, in strict JSON: a number that is not finite is written as a string."""
        state = {
            "version": _VERSION,
            "mode": self.mode,
            "target": self.target,
            "settings": self.settings,
            "versions": self.versions,
            "seconds": self.seconds,
            "windows": _columns(WindowPoint, self.windows),
            "steps": _columns(StepPoint, self.steps),
            "evaluations": [{"step": each.step, "losses": dict(each.losses)} for each in self.evaluations],
            "losses": self.losses.state_dict(),
            "extremes": self.extremes.state_dict(),
        }
        return json.dumps(_plain(state), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> RunLog:
        """The log that `to_json` wrote: it goes on exactly as the first would have.

        Raises:
            ValueError: what is no log, or one of another version.
        """
        try:
            state = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the log of the run is no JSON ({error}): delete it, and the log begins anew") from None
        version = state.get("version") if isinstance(state, dict) else None
        if version != _VERSION:
            raise ValueError(
                f"the log of the run has version {version!r}, this reads {_VERSION}: delete it, and the log begins anew"
            )
        log = cls(
            mode=state["mode"],
            target=state["target"],
            settings=state["settings"],
            versions=state["versions"],
            seconds={stage: float(value) for stage, value in state["seconds"].items()},
            windows=[WindowPoint(**row) for row in _rows(state["windows"])],
            steps=[StepPoint(**row) for row in _rows(state["steps"])],
            evaluations=[
                Evaluation(step=row["step"], losses={name: float(loss) for name, loss in row["losses"].items()})
                for row in state["evaluations"]
            ],
            losses=Digest.from_state_dict({name: _of_digest(value) for name, value in state["losses"].items()}),
            extremes=Extremes.from_state_dict(state["extremes"]),
        )
        log._seconds_before = log._seconds()
        return log


_METRICS = tuple(each.name for each in fields(WindowPoint) if each.name != "step")
_SECONDS = ("score_seconds", "wait_seconds")


def _until(rows: Iterable[_Row], step: int) -> list[_Row]:
    return [row for row in rows if row.step <= step]


def _columns(kind: type[WindowPoint] | type[StepPoint], rows: Iterable[WindowPoint | StepPoint]) -> dict[str, Any]:
    """Rows as one list a field: names are not repeated a row."""
    rows = list(rows)
    return {each.name: [getattr(row, each.name) for row in rows] for each in fields(kind)}


def _rows(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [
        {name: value if name == "step" else float(value) for name, value in zip(columns, row, strict=True)}
        for row in zip(*columns.values(), strict=True)
    ]


def _of_digest(value: Any) -> Any:
    if isinstance(value, list):
        return torch.tensor(value, dtype=torch.float64)
    return float(value) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)
