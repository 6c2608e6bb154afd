"""From a file, a pattern of shards or hf:NAME to records: mappings of columns, each with the place it was read at."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from flowstream.finetune import hub, shards
from flowstream.finetune.paths import expand, is_shard

Record: TypeAlias = Mapping[str, Any]
"""Column → value."""

_HUB_NAME = re.compile(r"[\w-]+(/[\w-]+)?")
_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_LIST = (".json", ".json.gz")


def records(spec: str, *, split: str = "train") -> Iterator[tuple[str, Record]]:
    """(place, record) of everything that `spec` names, in order.

    | `spec` | a record is | its place |
    |---|---|---|
    | `file.jsonl`, `.jsonl.gz` | a line | `file.jsonl line 12` |
    | `file.json`, `.json.gz` | an item of the list | `file.json item 3` |
    | `shards/{000..099}.tar` | a sample: `KEY.json`, or `KEY.COLUMN.txt` files | `shards/003.tar sample 0001` |
    | `hf:NAME[:CONFIG][@SPLIT]` | a row; NAME may be a folder | `hf:NAME@train row 5`, from 0 |

    Paths take braces, whatever their kind. `split` is that of `hf:` where `@SPLIT` is left out.

    Raises:
        ValueError, OSError: at once or while reading, in one line that says what was found, where, and what to do.
    """
    if hub.is_hub(spec):
        return hub.rows(spec, split)
    try:
        names = expand(spec)
    except FileNotFoundError as error:
        if _HUB_NAME.fullmatch(spec) is None:
            raise
        raise FileNotFoundError(f"{error}; a data set of the Hugging Face hub is written hf:{spec}") from error
    for name in names:
        _check_kind(name)
    return _of_files(names)


def is_sharded(spec: str) -> bool:
    """Whether `spec` names tar shards only, which `token_stream` reads."""
    return not hub.is_hub(spec) and all(map(is_shard, expand(spec)))


def _of_files(names: list[str]) -> Iterator[tuple[str, Record]]:
    for name in names:
        if is_shard(name):
            yield from shards.samples([name])
        elif name.lower().endswith(_LINES):
            yield from _of_lines(name)
        else:
            yield from _of_list(name)


def _check_kind(name: str) -> None:
    if not (is_shard(name) or name.lower().endswith(_LINES + _LIST)):
        raise ValueError(
            f"{name} is none of .jsonl, .json, .tar: convert it, or write hf:FOLDER for a folder of .parquet or .csv"
        )


def _of_lines(path: str) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            place = f"{path} line {number}"
            yield place, _object(_parsed(line, place), place)


def _of_list(path: str) -> Iterator[tuple[str, Record]]:
    whole = b"".join(_lines(path))
    if not whole.strip():
        return
    try:
        found = _parsed(whole, path)
    except ValueError as error:
        raise ValueError(f"{error}; if each line is an object of its own, name it .jsonl") from error
    if not isinstance(found, list):
        raise ValueError(f"{path} holds {_kind(found)}, where a list of objects was expected")
    for number, item in enumerate(found, start=1):
        place = f"{path} item {number}"
        yield place, _object(item, place)


def _lines(path: str) -> Iterator[bytes]:
    if not path.lower().endswith(".gz"):
        with open(path, "rb") as plain:
            yield from plain
        return
    try:
        with gzip.open(path, "rb") as compressed:
            yield from compressed
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}): write it anew") from error


def _parsed(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise ValueError(f"{place} is not JSON: {error.msg} at {at}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 text: byte {error.start} is {text[error.start]:#04x}") from error


def _object(found: Any, place: str) -> Record:
    if not isinstance(found, dict):
        raise ValueError(f"{place} is {_kind(found)}, where an object with columns was expected")
    return found


def _kind(found: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(found), "a number")
