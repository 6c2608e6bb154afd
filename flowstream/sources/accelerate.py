"""A loader that accelerate has prepared: `accelerate.data_loader.DataLoaderShard`."""

from __future__ import annotations

from typing import Any

from flowstream.sources.base import Source
from flowstream.sources.dataloader import source_of_dataloader
from flowstream.sources.stateful import StatefulSource

NAME = "accelerate.data_loader.DataLoaderShard"


def source_of_prepared(loader: Any) -> Source:
    """By its state, where it has one; by replaying else: it has a `state_dict` in any case, which then raises."""
    return StatefulSource(loader) if loader.use_stateful_dataloader else source_of_dataloader(loader)
