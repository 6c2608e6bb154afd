"""A loader that accelerate has prepared: `accelerate.data_loader.DataLoaderShard`."""

from __future__ import annotations

from typing import Any

from flowstream.sources.base import Source
from flowstream.sources.counted import CountedSource
from flowstream.sources.dataloader import entrance_of
from flowstream.sources.stateful import StatefulSource

NAME = "accelerate.data_loader.DataLoaderShard"


def source_of_prepared(loader: Any) -> Source:
    """By its state, where it has one; it has a `state_dict` in any case, which else raises.

    Else it is entered by way of the `DataLoader` that it reads from, whose sampler can leave out what was passed.
    """
    if loader.use_stateful_dataloader:
        return StatefulSource(loader)
    return CountedSource(loader, entrance_of(loader.base_dataloader))
