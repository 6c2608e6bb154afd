"""Which source a loader gets: by its class, or by the name of its class, so that no other library is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from flowstream.sources import accelerate, dataloader, huggingface, pipelines, torchdata, webdataset
from flowstream.sources.base import Source
from flowstream.sources.replay import replayed
from flowstream.sources.sequence import SequenceSource
from flowstream.sources.stateful import StatefulSource

MakeSource: TypeAlias = Callable[[Any], Source]
Predicate: TypeAlias = Callable[[Any], bool]

_by_class: dict[type | str, MakeSource] = {
    list: SequenceSource,
    tuple: SequenceSource,
    "torch.utils.data.dataloader.DataLoader": dataloader.source_of_dataloader,
    accelerate.NAME: accelerate.source_of_prepared,
    pipelines.NAME: webdataset.source_of_pipeline,
    huggingface.NAME: huggingface.source_of_iterable_dataset,
    torchdata.NAME: torchdata.source_of_stateful_dataloader,
}
_by_predicate: list[tuple[Predicate, MakeSource]] = [
    (lambda loader: isinstance(loader, Sequence), SequenceSource),
    (lambda loader: hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"), StatefulSource),
]


def register_source(loader: type | str | Predicate, source: MakeSource) -> None:
    """Let a kind of loader be resumed by a source of its own. The latest registration counts.

    Args:
        loader: a class; its name ("package.module.Class", where it is defined), so that it need not be imported; or a
            function of a loader that tells whether it is of that kind. Subclasses are included; a nearer class goes
            before a farther one, and classes before functions.
        source: a class (or function) that makes a `Source` of the loader.

    >>> register_source("mypackage.loader.MyLoader", MySource)  # doctest: +SKIP
    """
    if isinstance(loader, type | str):
        _by_class[loader] = source
    elif callable(loader):
        _by_predicate.insert(0, (loader, source))
    else:
        raise ValueError(f"loader is {loader!r}: give a class, the name of one, or a function of a loader")


def source_of(loader: Iterable[Any]) -> Source:
    """The source of a loader that was registered for its class, or one that resumes by replaying."""
    for kind in type(loader).__mro__:
        for key in (kind, f"{kind.__module__}.{kind.__qualname__}"):
            if key in _by_class:
                return _by_class[key](loader)
    for matches, make in _by_predicate:
        if matches(loader):
            return make(loader)
    return replayed(loader)
