"""torch's `DataLoader`: over numbered samples it skips by its sampler, and loads nothing that was passed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Generator
from torch.utils.data import DataLoader, IterableDataset

from flowstream.sources import huggingface
from flowstream.sources.base import Snapshot
from flowstream.sources.counted import CountedSource, Entrance
from flowstream.sources.draws import Draws
from flowstream.sources.replay import FromTheBeginning


def source_of_dataloader(loader: DataLoader[Any]) -> CountedSource:
    """It is counted, and entered as `entrance_of` says."""
    return CountedSource(loader, entrance_of(loader))


def entrance_of(loader: DataLoader[Any]) -> Entrance:
    """Over a map-style data set by its sampler; over an iterable one, or with its own `__iter__`, by replaying."""
    caveat = _caveat_of(loader)
    described: dict[str, Any] = {"batch_size": loader.batch_size}
    if isinstance(loader.dataset, IterableDataset):
        described |= {"num_workers": loader.num_workers} | huggingface.described(loader.dataset)
    elif type(loader).__iter__ is DataLoader.__iter__:
        return BySampler(loader, draws_of(loader), caveat, described)
    return FromTheBeginning(draws_of(loader), caveat, described)


class BySampler:
    """Enters a `DataLoader` behind samples that its sampler has numbered, and that are not loaded.

    The loader stays the user's own, with its workers, its collate function and what a subclass overrides: only while it
    asks its sampler for an iterator does it find one that leaves the first batches out.
    """

    kind = "sampler"

    def __init__(self, loader: DataLoader[Any], draws: Draws, caveat: str, described: dict[str, Any]) -> None:
        self.caveat = caveat
        self._loader = loader
        self._draws = draws
        self._described = described

    def described(self) -> dict[str, Any]:
        return dict(self._described)

    def remember(self, *, own: bool = False) -> Snapshot:
        return self._draws.remember(own=own)

    def place(self) -> Snapshot:
        return {}

    @contextmanager
    def enter(self, memory: Snapshot | None, place: Snapshot, num_passed: int) -> Iterator[Callable[[], bool]]:
        with self._draws.as_in(memory) as at_first_draw:
            if memory is None:
                yield lambda: True
                return
            name = "sampler" if self._loader.batch_sampler is None else "batch_sampler"
            attributes = vars(self._loader)  # `DataLoader.__setattr__` refuses these two
            sampler = attributes[name]
            behind = _Behind(sampler, num_passed, at_first_draw)
            attributes[name] = behind
            try:
                # A loader with persistent workers that run already keeps its sampler: there, batches are replayed.
                yield lambda: behind.was_asked or not num_passed
            finally:
                attributes[name] = sampler
                behind.num_passed, behind.at_first_draw = 0, None


class _Behind:
    """A sampler, but for the first entries of the iterators that are asked for now."""

    def __init__(self, sampler: Any, num_passed: int, at_first_draw: Callable[[], None]) -> None:
        self.num_passed = num_passed
        self.at_first_draw: Callable[[], None] | None = at_first_draw
        self.was_asked = False
        self._sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        self.was_asked = True
        return self._rest(self.num_passed, self.at_first_draw)

    def _rest(self, num_passed: int, at_first_draw: Callable[[], None] | None) -> Iterator[Any]:
        if at_first_draw is not None:
            at_first_draw()
        yield from itertools.islice(iter(self._sampler), num_passed, None)

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


def draws_of(loader: DataLoader[Any]) -> Draws:
    """The generators of the loader and its samplers: its order, and its workers' seeds, are drawn from them."""
    batch_sampler = loader.batch_sampler
    parts = {"loader": loader, "sampler": loader.sampler, "batch_sampler": batch_sampler}
    parts["inner_sampler"] = getattr(batch_sampler, "sampler", None)
    found: dict[int, tuple[str, Generator]] = {}
    for name, part in parts.items():
        generator = getattr(part, "generator", None)
        if isinstance(generator, Generator):
            found.setdefault(id(generator), (name, generator))
    return Draws(dict(found.values()), shared=loader.generator is None or _is_unseeded(loader), loader=loader)


def _is_unseeded(loader: DataLoader[Any]) -> bool:
    """Whether a sampler draws from torch's global generator: one that has a place for a generator, and none in it.

    accelerate's `SeedableRandomSampler` makes its own when it is first asked, from its `initial_seed` and the epoch.
    """
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    return any(
        getattr(sampler, "generator", 0) is None and not hasattr(sampler, "initial_seed") for sampler in samplers
    )


def _caveat_of(loader: DataLoader[Any]) -> str:
    if loader.num_workers and not getattr(loader, "in_order", True):
        return (
            "a DataLoader with in_order=False delivers batches in the order in which workers happen to finish: a "
            "resume may repeat or leave out some. Take in_order=True"
        )
    if _is_unseeded(loader):
        return (
            "a DataLoader that shuffles without a generator draws each epoch's order from torch's global generator. "
            "The epoch in which the state was taken resumes exactly; for the order of later ones put torch's generator "
            "back (torch.set_rng_state), or give the loader generator=torch.Generator().manual_seed(…), or a sampler "
            "that is seeded by the epoch"
        )
    return ""
