"""torchdata's `StatefulDataLoader`: resumed by its state, where its data set has one."""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset

from flowstream.sources import huggingface
from flowstream.sources.base import Source
from flowstream.sources.counted import CountedSource
from flowstream.sources.dataloader import draws_of
from flowstream.sources.draws import Draws
from flowstream.sources.replay import FromTheBeginning
from flowstream.sources.stateful import StatefulSource

NAME = "torchdata.stateful_dataloader.stateful_dataloader.StatefulDataLoader"


def source_of_stateful_dataloader(loader: Any) -> Source:
    """By its state; by replaying over an iterable data set that has none, or whose state leaves out a shuffle buffer.

    There torchdata (0.11) counts what it has fast-forwarded once more, and a second resume is wrong.
    """
    dataset = loader.dataset
    has_state = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
    if isinstance(dataset, IterableDataset) and (not has_state or huggingface.shuffles(dataset)):
        described = {"batch_size": loader.batch_size, "num_workers": loader.num_workers}
        described |= huggingface.described(dataset)
        return CountedSource(loader, FromTheBeginning(draws_of(loader), described=described))
    # Its state leaves out that its seed for workers is drawn from the same generator as the order of the next epoch.
    own = Draws(draws_of(loader).generators, shared=False)
    return StatefulSource(loader, draws=own)
