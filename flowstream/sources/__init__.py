"""Loaders of all kinds as sources: each is resumed in the way that is exact for it."""

from flowstream.sources.base import Snapshot, Source
from flowstream.sources.registry import register_source, source_of

__all__ = ["Snapshot", "Source", "register_source", "source_of"]
