"""A distributed sampler without repeats, whose epoch can be taken up again by another number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import numpy as np
from torch.utils.data import DataLoader, Sampler

from flowstream.randomness import permutation
from flowstream.sharding import Ranks, world_of

_USE = "elastic sampler"


class ElasticDistributedSampler(Sampler[int]):
    """The indices of a map-style data set that this rank reads: over all ranks each of them once in an epoch.

    Unlike torch's `DistributedSampler` it repeats no sample and drops none, so ranks may differ by one; and the order
    of an epoch is the same for any number of ranks. Of that order, from `offset` on, rank r of R takes every R-th
    sample from the r-th on. What R ranks have consumed is then a beginning of the order (see `consumed`), and any other
    number of ranks goes on behind it.

    >>> sampler = ElasticDistributedSampler(10, shuffle=False)
    >>> sampler.start_at(epoch=0, offset=7)
    >>> list(sampler)
    [7, 8, 9]
    >>> sampler.set_epoch(1)
    >>> len(sampler)
    10

    `FlowStream` calls `set_epoch` by itself; in a plain loop, call it before each epoch, as of torch's sampler. Ranks
    are looked up whenever the sampler is asked, so it may be built before torch.distributed is initialized.

    Args:
        dataset_or_num_samples: a data set with a length, or that length.
        shuffle: a new permutation each epoch, a pure function of (seed, epoch) that draws on no generator; else 0, 1, …
        seed: the same on all ranks.
        process_group: the data-parallel ranks, by default all. Tensor- and pipeline-parallel peers of a mesh read the
            same samples.

    Raises:
        ValueError: a data set without a length, or numbers that cannot be.
    """

    def __init__(
        self,
        dataset_or_num_samples: Sized | int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        process_group: Ranks = None,
    ) -> None:
        found = dataset_or_num_samples
        if not isinstance(found, Sized | int) or isinstance(found, bool):
            raise ValueError(
                f"ElasticDistributedSampler got a {type(found).__name__}, which has no length: give a map-style data "
                "set, or its number of samples"
            )
        self._num_samples = len(found) if isinstance(found, Sized) else found
        _check("the number of samples", self._num_samples, 0)
        self._shuffle = shuffle
        self._seed = seed
        self._process_group = process_group
        self._epoch = 0
        self._offset = 0

    @property
    def num_samples(self) -> int:
        """Of the whole data set, over all ranks."""
        return self._num_samples

    @property
    def epoch(self) -> int:
        """The epoch whose order the next iterator has."""
        return self._epoch

    @property
    def offset(self) -> int:
        """Samples of this epoch, over all ranks, that were consumed before it was taken up: the next iterator begins
        behind them, and does not move it."""
        return self._offset

    def set_epoch(self, epoch: int) -> None:
        """Let the next iterator have the order of `epoch`: from its beginning, if it is another than before."""
        if epoch != self._epoch:
            self._epoch, self._offset = epoch, 0

    def start_at(self, epoch: int, offset: int) -> None:
        """Let iterators of `epoch` begin behind the first `offset` samples of its order, on all ranks the same.

        Holds until `set_epoch` names another epoch.

        Raises:
            ValueError: an offset behind the end, or numbers that cannot be.
        """
        _check("epoch", epoch, 0)
        _check("offset", offset, 0)
        if offset > self._num_samples:
            raise ValueError(
                f"offset is {offset}, but the data set has {self._num_samples} samples: resume with the data set that "
                "the offset was taken with"
            )
        self._epoch, self._offset = epoch, offset

    def __iter__(self) -> Iterator[int]:
        world = world_of(self._process_group)
        if self._shuffle:
            order = permutation(self._num_samples, (self._seed, self._epoch), use=_USE)
        else:
            order = np.arange(self._num_samples)
        share: list[int] = order[self._offset :][world.rank :: world.world_size].tolist()
        return iter(share)

    def __len__(self) -> int:
        """Samples that this rank reads in the epoch, from `offset` on."""
        world = world_of(self._process_group)
        return len(range(self._offset, self._num_samples)[world.rank :: world.world_size])


def consumed(offset: int, world_size: int, batch_size: int, num_batches: int, num_samples: int) -> int:
    """The offset once every rank was delivered `num_batches` batches of an epoch that was entered at `offset`.

    What was consumed is the beginning of the epoch's order up to there, without a gap: rank r reads positions
    offset + r, offset + r + R, offset + r + 2R, … of it, in that order, and so has been delivered those of the first
    num_batches · batch_size of them that exist. Over the R ranks these are all positions from `offset` to
    offset + R · num_batches · batch_size, or to the end of the order where that comes first (a rank's last batch may be
    smaller, and a rank may have one batch less than another). Only `drop_last` leaves something out: at the epoch's
    end, less than a batch of each rank.

    >>> consumed(offset=0, world_size=4, batch_size=8, num_batches=10, num_samples=1000)
    320

    Raises:
        ValueError: numbers that cannot be.
    """
    for name, value, least in (
        ("offset", offset, 0),
        ("world_size", world_size, 1),
        ("batch_size", batch_size, 1),
        ("num_batches", num_batches, 0),
        ("num_samples", num_samples, offset),
    ):
        _check(name, value, least)
    return min(offset + world_size * num_batches * batch_size, num_samples)


def reshardable(loader: object) -> ElasticDistributedSampler | None:
    """The sampler of a loader whose epoch another number of ranks can take up, else `None`.

    It is a torch `DataLoader` with an integer `batch_size` and that sampler, which delivers in the sampler's order:
    without an `__iter__` of a subclass' own, and not with `in_order=False`.
    """
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return None
    if loader.batch_size is None or (loader.num_workers and not getattr(loader, "in_order", True)):
        return None
    return loader.sampler if isinstance(loader.sampler, ElasticDistributedSampler) else None


def _check(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}: give a whole number of at least {least}")
