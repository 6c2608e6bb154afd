"""The generators that a loader draws its order from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator
from torch.utils.data import DataLoader

from flowstream.sources.base import Snapshot

_SHARED = "torch"
_RUNNING = "workers_run"


class Draws:
    """Remembers generators' states, and puts them back for a resume.

    Args:
        generators: the loader's own, by name.
        shared: whether it draws on torch's global generator too. That one belongs to the user: a resume lends it its
            state of then, and gives it back as it was.
        loader: draws a seed for its workers first, save where persistent ones run already.
    """

    def __init__(
        self, generators: Mapping[str, Generator], *, shared: bool, loader: DataLoader[Any] | None = None
    ) -> None:
        self.generators = dict(generators)
        self._shared = shared
        self._loader = loader

    def remember(self, *, own: bool = False) -> Snapshot:
        """All states, or those of the loader's `own` generators: [bytes] uint8 each, 5 KB on the CPU."""
        states: Snapshot = {name: generator.get_state().clone() for name, generator in self.generators.items()}
        if self._shared and not own:
            states[_SHARED] = torch.get_rng_state()
        return states | {_RUNNING: self._runs}

    def recall(self, memory: Snapshot) -> None:
        """Put all that are in `memory` back."""
        for name, generator in self.generators.items():
            if name in memory:
                generator.set_state(memory[name])
        if _SHARED in memory:
            torch.set_rng_state(memory[_SHARED])

    @contextmanager
    def as_in(self, memory: Snapshot | None) -> Iterator[Callable[[], None]]:
        """Draw as then; with `None`, as it would without us. What it gives is called before the first index is drawn.

        It puts the states back once more where the seed for workers is drawn now, but was not then.
        """
        if memory is None:
            yield lambda: None
            return
        with torch.random.fork_rng(devices=[], enabled=_SHARED in memory):
            self.recall(memory)
            if self._runs and not memory[_RUNNING]:
                torch.empty((), dtype=torch.int64).random_(generator=getattr(self._loader, "generator", None))
            drawn_anew = memory.get(_RUNNING, False) and not self._runs
            yield lambda: self.recall(memory) if drawn_anew else None

    @property
    def _runs(self) -> bool:
        loader = self._loader
        return loader is not None and loader.persistent_workers and getattr(loader, "_iterator", None) is not None
