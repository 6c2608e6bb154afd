"""Finished cells of one seed on disk: a JSON file each, and the parameters that a later choice may need."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from safetensors.torch import load_file, save_file
from torch import Tensor

from flowstream.compare.analysis import Place
from flowstream.compare.evaluation import Measures
from flowstream.compare.results import RunResult, write_whole


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the grid."""

    budget: str
    method: str
    learning_rate: float
    strength: float | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        strength = () if self.strength is None else (f"strength={self.strength!r}",)
        return ",".join((self.budget, self.method, repr(self.learning_rate), *strength))

    @staticmethod
    def of(place: Place) -> Cell:
        """The cell that a point belongs to."""
        return Cell(
            budget=place.budget,
            method=place.method,
            learning_rate=place.learning_rate,
            strength=place.strength,
        )


class CellStore:
    """Owns the folder of a seed. A cell is there as a whole or not at all, its parameters before its result.

    One process at a time has a seed: another waits until it is done.
    """

    def __init__(self, folder: Path) -> None:
        self._cells, self._parameters = folder / "cells", folder / "parameters"
        self._test = folder / "test.json"
        self._cells.mkdir(parents=True, exist_ok=True)
        self._lock = open(folder / "lock", "w")  # noqa: SIM115
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def result(self, cell: Cell) -> RunResult | None:
        """What was found, if it is finished.

        Raises:
            ValueError: its file is damaged.
        """
        path = self._cells / f"{cell.name}.json"
        if not path.exists():
            return None
        try:
            return RunResult.of_plain(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged, or of another version ({error}): remove it, and it is trained again"
            ) from error

    def finish(self, cell: Cell, result: RunResult) -> None:
        """Its parameters were kept before."""
        write_whole(self._cells / f"{cell.name}.json", json.dumps(asdict(result), indent=1))

    def keep(self, cell: Cell, step: int, state: dict[str, Tensor]) -> None:
        """The model's parameters after a step."""
        path = self._path(cell, step)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({name: value.cpu().contiguous() for name, value in state.items()}, partial)
        partial.replace(path)

    def parameters(self, cell: Cell, step: int) -> dict[str, Tensor]:
        """As they were kept. FileNotFoundError where they were let go."""
        return load_file(self._path(cell, step))

    def has_parameters(self, cell: Cell, steps: Iterable[int]) -> bool:
        """Whether all of these are kept."""
        return all(self._path(cell, step).exists() for step in steps)

    def let_go(self, parameters: Iterable[tuple[Cell, int]]) -> None:
        """Of those that no choice can need any more."""
        for cell, step in parameters:
            self._path(cell, step).unlink(missing_ok=True)

    def tested(self) -> dict[Place, Measures]:
        """Of the chosen points, once the seed is judged."""
        if not self._test.exists():
            return {}
        found = json.loads(self._test.read_text(encoding="utf-8"))
        return {Place(*entry["place"]): Measures(**entry["measures"]) for entry in found}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def judged(self, measured: dict[Place, Measures]) -> None:
        """The seed is done: what the test split said is kept, parameters are not."""
        entries = [{"place": list(place), "measures": asdict(measures)} for place, measures in measured.items()]
        write_whole(self._test, json.dumps(entries, indent=1))
        shutil.rmtree(self._parameters, ignore_errors=True)

    def _path(self, cell: Cell, step: int) -> Path:
        return self._parameters / f"{cell.name},step={step}.safetensors"
