"""Rows of a Hugging Face data set: hf:NAME of the hub, or hf:FOLDER of files or of `save_to_disk`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flowstream.finetune.paths import nearest

_PREFIX = "hf:"
_SAVED = ("dataset_dict.json", "state.json")
"""What `save_to_disk` leaves in a folder."""


def is_hub(spec: str) -> bool:
    return spec.startswith(_PREFIX)


def rows(spec: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, row) of `hf:NAME[:CONFIG][@SPLIT]`; `split` where there is no `@SPLIT`. Rows are counted from 0.

    Raises ValueError where `datasets` is missing, or what it says of the name, the configuration or the split.
    """
    name, config, split = _parts(spec.removeprefix(_PREFIX), split)
    dataset = _loaded(name, config, split)
    return ((f"{_PREFIX}{name}@{split} row {number}", row) for number, row in enumerate(dataset))


def _parts(text: str, split: str) -> tuple[str, str | None, str]:
    # The split first: a slice such as train[:10%] has a colon of its own.
    before, at, named = text.rpartition("@")
    name, split = (before, named) if at else (text, split)
    config: str | None = None
    if not Path(name).expanduser().exists():
        name, _, config = name.partition(":")
    if not name or not split:
        raise ValueError(f"{_PREFIX}{text} names no data set: write hf:NAME, hf:NAME:CONFIG or hf:NAME@SPLIT")
    return name, config or None, split


def _loaded(name: str, config: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{_PREFIX}{name} is read by the package datasets: pip install 'flowstream[datasets]'"
        ) from None
    path = Path(name).expanduser()
    if path.is_file():
        raise ValueError(f"{_PREFIX}{name} is a file: give it without hf: (.jsonl, .json, .tar), or its folder")
    if not path.exists() and name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"there is no folder {name}" + nearest(name))
    try:
        if any((path / mark).exists() for mark in _SAVED):
            return _of_split(datasets.load_from_disk(str(path)), name, split)
        return datasets.load_dataset(str(path) if path.exists() else name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{_PREFIX}{name}: {said.rstrip('.')}. {_advice(said, name)}") from error


def _of_split(saved: Any, name: str, split: str) -> Any:
    """A saved data set may have splits, or be one."""
    if isinstance(saved, dict):
        if split not in saved:
            raise ValueError(f"Unknown split {split!r}, there are {', '.join(saved)}")
        return saved[split]
    if split not in ("train", str(saved.split)):
        raise ValueError(f"it was saved as one split, and has no split {split!r}")
    return saved


def _advice(said: str, name: str) -> str:
    """By what datasets says: which part of the name to write otherwise."""
    said = said.lower()
    if "config" in said:
        return f"Write {_PREFIX}{name}:CONFIG"
    if "split" in said:
        return f"Write {_PREFIX}{name}@SPLIT"
    return f"Write {_PREFIX}NAME as on huggingface.co/datasets, or {_PREFIX}FOLDER with .jsonl, .parquet or .csv files"
