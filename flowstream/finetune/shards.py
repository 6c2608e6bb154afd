"""Tar shards of fine-tuning texts, through webdataset: read in order, or as a shuffled stream of tokens."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import webdataset as wds

from flowstream.finetune.paths import expand, is_shard
from flowstream.sharding import Ranks, webdataset_splitters

if TYPE_CHECKING:
    from flowstream.finetune.encoding import Encoder

_SEED_STRIDE = 1_000
"""detshuffle adds the epoch to its seed: without a stride, epoch 1 of seed 0 would be epoch 0 of seed 1."""

_DAMAGE = (tarfile.TarError, EOFError, zlib.error)


def samples(urls: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, record) of every sample, in order, on every rank and worker alike."""
    pipeline = wds.WebDataset(
        list(urls), shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False, handler=_refuse
    )
    return map(_record, pipeline)


def token_stream(
    spec: str, encoder: Encoder, *, seed: int, shuffle: int = 10_000, process_group: Ranks = None
) -> wds.WebDataset:
    """Samples `{"input_ids", "labels"}` of [T] int64 from tar shards, those that the encoder drops left out.

    >>> loader = token_stream(spec, encoder, seed=0).batched(8, collation_fn=Collate.of(tokenizer))  # doctest: +SKIP

    Each rank and worker reads shards of its own. An epoch has an order of its own, which follows from seed and epoch,
    so that a `FlowStream` over it resumes exactly: by replaying it, or by shards where nothing is shuffled.

    Args:
        spec: a tar file, or a pattern with braces.
        shuffle: samples that wait in the buffer they are drawn from; 0 reads shards and samples in order.
        process_group: the data-parallel ranks, by default all; see `webdataset_splitters`.

    Raises:
        ValueError, OSError: `spec` is not of shards, or they are not there; while reading, what `Encoder` says.
    """
    urls = expand(spec)
    if others := [url for url in urls if not is_shard(url)]:
        raise ValueError(f"{others[0]} is no tar shard: read it with read_tokens")
    seed = _SEED_STRIDE * (seed + 1)
    order = {"shardshuffle": len(urls), "detshuffle": True, "seed": seed} if shuffle else {"shardshuffle": False}
    pipeline = wds.WebDataset(urls, handler=_refuse, **order, **webdataset_splitters(process_group))
    if shuffle:
        pipeline = pipeline.compose(wds.detshuffle(bufsize=shuffle, initial=shuffle, seed=seed))
    return pipeline.map(_Encode(encoder))


@dataclass(frozen=True)
class _Encode:
    """A stage that can be pickled for worker processes. webdataset leaves out samples for which it gives None."""

    encoder: Encoder

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any] | None:
        place, record = _record(sample)
        encoded = self.encoder(record, place)
        return None if encoded is None else encoded.tensors()


def _record(sample: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """`.json` holds columns, `.NAME.txt` and `.NAME.json` are a column; of other members nothing is read."""
    place = f"{sample['__url__']} sample {sample['__key__']}"
    columns: dict[str, Any] = {}
    for member, content in sample.items():
        name, _, kind = member.rpartition(".")
        if member == "json":
            whole = _json(content, f"{place}.json")
            if not isinstance(whole, dict):
                raise ValueError(f"{place}.json is no object with columns")
            columns |= whole
        elif name and kind == "json":
            columns[name] = _json(content, f"{place}.{member}")
        elif name and kind == "txt":
            columns[name] = _text(content, f"{place}.{member}")
    if not columns:
        members = ", ".join(f".{member}" for member in sample if not member.startswith("__"))
        raise ValueError(
            f"{place} has {members}, and no column: write a .json with the columns, or .prompt.txt and .response.txt"
        )
    return place, columns


def _json(content: bytes, place: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error


def _text(content: bytes, place: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}") from error


def _refuse(error: Exception) -> bool:
    """webdataset's handler. It adds what it knows of a shard to the error's arguments, the address last."""
    if isinstance(error, OSError):
        raise error
    url = error.args[-1] if len(error.args) > 1 and isinstance(error.args[-1], str) else None
    if isinstance(error, _DAMAGE) and url is None:
        raise error  # again here, with the address
    said = str(error.args[0]) if error.args else type(error).__name__
    raise ValueError(f"{url}: damaged or no tar file ({said}): write it anew" if url else said) from error
