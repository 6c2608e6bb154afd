"""Loaders of all kinds over the same samples, to be stopped and resumed; and what is measured of that."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torchdata.nodes as tn
import webdataset as wds
from resuming import take, through_a_file
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import flowstream as fs

NUM, BATCH, WINDOW = 34, 4, 3
"""An epoch of 9 batches, in 3 windows."""

LOSSES = np.random.default_rng(0).gamma(2.0, 1.0, NUM).astype(np.float32)
by_loss = fs.FunctionScorer(lambda batch: batch["loss"], name="by loss")
INCLUDE = ("tau", "index", "loss", "weight")


def load(index: int) -> dict[str, Any]:
    """A sample, as it is read from a disk; counted in the file of that name, whichever process reads it."""
    if path := os.environ.get("COUNT_LOADED"):
        with open(path, "ab") as file:
            file.write(b".")
    ids = torch.from_numpy((index * 7 + np.arange(6)) % 90 + 3)
    return {"input_ids": ids, "labels": ids, "loss": torch.tensor(LOSSES[index]), "id": torch.tensor(index)}


class Samples(Dataset[Any]):
    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> dict[str, Any]:
        return load(index)


class Streamed(IterableDataset[Any]):
    """Each worker its share. Without a state."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(start, NUM, step):
            yield load(index)


class StreamedWithState(IterableDataset[Any]):
    def __init__(self) -> None:
        self.num_yielded, self.resumed = 0, False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        start, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if not self.resumed:
            self.num_yielded = 0
        self.resumed = False
        for index in list(range(start, NUM, step))[self.num_yielded :]:
            self.num_yielded += 1
            yield load(index)

    def state_dict(self) -> dict[str, Any]:
        return {"num_yielded": self.num_yielded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_yielded, self.resumed = state["num_yielded"], True


class Batches:
    """An iterable that is no loader of anyone's."""

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(Samples(), batch_size=BATCH))


class Numbered(Sequence[Any]):
    """Batches that are read when they are asked for."""

    def __len__(self) -> int:
        return -(-NUM // BATCH)

    def __getitem__(self, number: Any) -> Any:
        return collated([load(index) for index in range(NUM)[number * BATCH : (number + 1) * BATCH]])


def write_shards(folder: Path) -> None:
    """Four tar shards of 10, 10, 10 and 4 samples."""
    with wds.ShardWriter(str(folder / "part-%03d.tar"), maxcount=10, verbose=False) as writer:
        for index in range(NUM):
            writer.write({"__key__": f"{index:03d}", "id.json": index})


def urls(folder: Path) -> str:
    return str(folder / "part-{000..003}.tar")


def tar(folder: Path, **arguments: Any) -> wds.WebDataset:
    arguments = {"shardshuffle": False, "empty_check": True} | arguments
    return wds.WebDataset(urls(folder), **arguments).decode()


def loaded(sample: dict[str, Any]) -> dict[str, Any]:
    return load(sample["id.json"])


def collated(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return torch.utils.data.default_collate(rows)


def web_loader(dataset: Any, num_workers: int = 0) -> wds.WebLoader:
    return wds.WebLoader(dataset.map(loaded).batched(BATCH, collated), batch_size=None, num_workers=num_workers)


def resampled_shards(folder: Path) -> wds.DataPipeline:
    shards = wds.ResampledShards(urls(folder), deterministic=True)
    stages = [shards, wds.tarfile_to_samples(), wds.decode(), wds.map(loaded), wds.batched(BATCH, collated)]
    return wds.DataPipeline(*stages).with_epoch(9)


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() for key, value in load(row["n"]).items()}


def hugging_face(**shuffle: Any) -> datasets.IterableDataset:
    rows = datasets.Dataset.from_dict({"n": list(range(NUM))}).to_iterable_dataset(num_shards=4)
    rows = rows.shuffle(**shuffle) if shuffle else rows
    features = datasets.Features(
        {
            "input_ids": datasets.Sequence(datasets.Value("int64")),
            "labels": datasets.Sequence(datasets.Value("int64")),
            "loss": datasets.Value("float32"),
            "id": datasets.Value("int64"),
        }
    )
    return rows.map(numbered, remove_columns=["n"], features=features)


def nodes() -> tn.Loader[Any]:
    order = tn.SamplerWrapper(DistributedSampler(Samples(), 1, 0))
    return tn.Loader(tn.Mapper(tn.Batcher(tn.Mapper(order, load), BATCH, drop_last=False), collated))


@dataclass(frozen=True)
class Recipe:
    """A way to build a loader, and what is expected of it."""

    make: Callable[[Path], Iterable[Any]]
    stops: tuple[int, ...] = tuple(range(19))
    """Batches after which it is stopped. Few where worker processes have to be started."""
    exact: bool = True
    """Whether the epoch in which it was stopped goes on as it would have."""
    next_exact: bool = True
    """Whether later epochs do."""


SOME = (4, 9, 13)
"""In the second window; at the end of the epoch; in the second epoch."""


def _stateful(dataset: Any, num_workers: int = 0, every: int = 1, **arguments: Any) -> StatefulDataLoader[Any]:
    return StatefulDataLoader(
        dataset, batch_size=BATCH, num_workers=num_workers, snapshot_every_n_steps=every, **arguments
    )


RECIPES: dict[str, Recipe] = {
    "list, `Sequence`": Recipe(lambda at: Numbered()),
    "generator, any other iterable": Recipe(lambda at: Batches()),
    "`DataLoader`, in order": Recipe(lambda at: DataLoader(Samples(), batch_size=BATCH)),
    "`DataLoader(shuffle=True, generator=…)`": Recipe(
        lambda at: DataLoader(Samples(), batch_size=BATCH, shuffle=True, generator=generator())
    ),
    "`DataLoader(shuffle=True, generator=…)`, workers": Recipe(
        lambda at: DataLoader(
            Samples(), batch_size=BATCH, shuffle=True, generator=generator(), num_workers=2, persistent_workers=True
        ),
        stops=SOME,
    ),
    "`DataLoader(shuffle=True)`": Recipe(
        lambda at: DataLoader(Samples(), batch_size=BATCH, shuffle=True), next_exact=False
    ),
    "`DataLoader` with a sampler seeded by the epoch, workers": Recipe(
        lambda at: DataLoader(Samples(), batch_size=BATCH, sampler=DistributedSampler(Samples(), 1, 0), num_workers=2),
        stops=SOME,
    ),
    "`DataLoader` over an iterable": Recipe(lambda at: DataLoader(Streamed(), batch_size=BATCH)),
    "`DataLoader` over an iterable, workers": Recipe(
        lambda at: DataLoader(Streamed(), batch_size=BATCH, num_workers=2), stops=SOME
    ),
    "`StatefulDataLoader`": Recipe(lambda at: _stateful(Samples(), shuffle=True, generator=generator())),
    "`StatefulDataLoader`, workers": Recipe(
        lambda at: _stateful(Samples(), 2, shuffle=True, generator=generator()), stops=SOME
    ),
    "`StatefulDataLoader`, workers, `snapshot_every_n_steps=7`": Recipe(
        lambda at: _stateful(Samples(), 2, 7, shuffle=True, generator=generator()), stops=SOME
    ),
    "`StatefulDataLoader` over an iterable with state, workers": Recipe(
        lambda at: _stateful(StreamedWithState(), 2), stops=SOME
    ),
    "`StatefulDataLoader` over an iterable without": Recipe(lambda at: _stateful(Streamed())),
    "`StatefulDataLoader` over an iterable without, workers": Recipe(
        lambda at: _stateful(Streamed(), 2, 7), stops=SOME
    ),
    "`torchdata.nodes.Loader`": Recipe(lambda at: nodes()),
    "HF `IterableDataset.batch(n)`": Recipe(lambda at: hugging_face().batch(BATCH).with_format("torch")),
    "HF `.shuffle(seed=…)`": Recipe(lambda at: hugging_face(seed=5, buffer_size=8).batch(BATCH).with_format("torch")),
    "HF in a `DataLoader`, workers": Recipe(
        lambda at: DataLoader(hugging_face().with_format("torch"), batch_size=BATCH, num_workers=2), stops=SOME
    ),
    "HF in a `StatefulDataLoader`, workers": Recipe(
        lambda at: _stateful(hugging_face().with_format("torch"), 2), stops=SOME
    ),
    "HF `.shuffle(seed=…)` in a `StatefulDataLoader`, workers": Recipe(
        lambda at: _stateful(hugging_face(seed=5, buffer_size=8).with_format("torch"), 2), stops=SOME
    ),
    "`WebDataset.batched(n)`": Recipe(lambda at: tar(at).map(loaded).batched(BATCH, collated)),
    "`WebLoader`": Recipe(lambda at: web_loader(tar(at))),
    "`WebLoader`, workers": Recipe(lambda at: web_loader(tar(at), 2), stops=SOME),
    "`WebDataset(shardshuffle=n, detshuffle=True, seed=…)`": Recipe(
        lambda at: tar(at, shardshuffle=4, detshuffle=True, seed=7).map(loaded).batched(BATCH, collated)
    ),
    "webdataset with `detshuffle(n)`": Recipe(
        lambda at: web_loader(tar(at).compose(wds.detshuffle(8, initial=8, seed=5)))
    ),
    "`ResampledShards(deterministic=True)`": Recipe(resampled_shards),
    "webdataset with `shuffle(n)`": Recipe(lambda at: web_loader(tar(at).shuffle(8)), exact=False, next_exact=False),
}


EVERY_STOP = bool(os.environ.get("FLOWSTREAM_EVERY_STOP"))
"""Whether every loader is stopped everywhere, in all combinations (`make soak`), and not those with workers here and
there."""


def stream_over(loader: Iterable[Any], **settings: Any) -> fs.FlowStream:
    settings = {"temperature": fs.RunningMedian(warmup_samples=12), "cache": None, "include": INCLUDE} | settings
    return fs.FlowStream(loader, settings.pop("scorer", by_loss), window=WINDOW, **settings)


@dataclass(frozen=True)
class Run:
    """Two epochs without a stop, and the first batches of a third one."""

    batches: list[dict[str, Any]]
    epochs: list[int]
    """Of each batch."""
    states: list[dict[str, Any]]
    """After so many batches."""


def uninterrupted(stream: fs.FlowStream) -> Run:
    with stream:
        batches, epochs, states = [], [], [through_a_file(stream.state_dict())]
        while stream.epoch < 2 or len(batches) == epochs.count(0) + epochs.count(1):
            for batch in stream:
                batches.append(batch)
                epochs.append(stream.epoch)
                states.append(through_a_file(stream.state_dict()))
        return Run(batches, epochs, states)


def resumed(streams: Callable[[], fs.FlowStream], state: dict[str, Any], num: int) -> list[dict[str, Any]]:
    """The `num` batches after a state, resumed once more after half of them: that is where others break."""
    torch.manual_seed(99)  # a new process has other draws before
    with streams() as first:
        first.load_state_dict(state)
        batches = take(first, num - num // 2)
        state = through_a_file(first.state_dict())
    with streams() as second:
        second.load_state_dict(state)
        return batches + take(second, num // 2)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether all that is delivered is, bit for bit."""
    equal = [
        value == other[key] if isinstance(value, list) else torch.equal(value, other[key]) for key, value in one.items()
    ]
    return one.keys() == other.keys() and all(equal)


@dataclass(frozen=True)
class Outcome:
    """What resuming a loader gave."""

    kind: str
    """How it is resumed."""
    this_epoch: bool
    """Whether the rest of the epoch in which it was stopped is what it would have been, after every stop."""
    next_epoch: bool
    """Whether later epochs are."""
    num_loaded_again: int
    """Samples of those passed before the window in flight that a resume read once more."""
    told: str
    """What was told about it."""


@cache
def outcome(name: str, at: Path, mode: str) -> Outcome:
    """Stop a stream over the loader after each of `stops`, resume it, and resume it again."""
    recipe = RECIPES[name]

    def streams() -> fs.FlowStream:
        return stream_over(recipe.make(at), mode=mode)

    whole = uninterrupted(streams())
    this, later = [], []
    for stop in range(len(whole.batches)) if EVERY_STOP else recipe.stops:
        if stop + 6 > len(whole.batches):
            break
        in_flight = whole.epochs[stop - 1] if stop and whole.epochs[stop - 1] == whole.states[stop]["epoch"] else None
        rest = resumed(streams, whole.states[stop], 6)
        for place, batch in enumerate(rest, start=stop):
            (this if whole.epochs[place] == in_flight else later).append(same(batch, whole.batches[place]))
    stream = streams()
    return Outcome(
        stream._reader._source.kind, all(this), all(later), _num_loaded_again(recipe, at), stream._reader.caveat
    )


def _num_loaded_again(recipe: Recipe, at: Path) -> int:
    """After 4 batches, in the second window, whose first sample is the 13th."""
    counted = at / "loaded"
    with stream_over(recipe.make(at)) as first:
        take(first, 4)
        state = first.state_dict()
    counted.write_bytes(b"")
    os.environ["COUNT_LOADED"] = str(counted)
    try:
        with stream_over(recipe.make(at)) as second:
            second.load_state_dict(state)
            num = 4 * BATCH + sum(len(batch["id"]) for batch in second)
    finally:
        del os.environ["COUNT_LOADED"]
    return max(counted.stat().st_size - (num - 3 * BATCH), 0)


HOW = {
    "index": "index",
    "replay": "replaying by count",
    "sampler": "skipping by its sampler",
    "state": "its own state",
    "shards": "skipping shards",
}


def table(at: Path) -> str:
    """What resumes exactly, loader by loader, as the README has it."""
    lines = ["| loader | resumed by | the epoch in flight | later epochs | loads again |", "|---|---|---|---|---|"]
    for name in RECIPES:
        found = outcome(name, at, "weight")
        again = "nothing" if not found.num_loaded_again else "what was passed"
        if 0 < found.num_loaded_again < 3 * BATCH:
            again = "a part"
        exact = ["exact" if good else "not exact, and told" for good in (found.this_epoch, found.next_epoch)]
        lines.append(f"| {name} | {HOW[found.kind]} | {exact[0]} | {exact[1]} | {again} |")
    return "\n".join(lines)
