"""WiSE-FT of checkpoints on disk: every α in one pass over safetensors files, a piece of a tensor at a time."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from flowstream.companions.wise_ft import between
from flowstream.companions.wrapped import check_number, numbers

__all__ = ["interpolate_checkpoints"]

_PIECE = 2**22
"""Entries of a tensor that are read at a time."""
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_INTERPOLATED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_COPIED = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
"""Endings of what stands beside the weights: configuration, tokenizer, processor, code."""
_LEFT = ("trainer_state.json",)

Path_ = str | os.PathLike[str]


def interpolate_checkpoints(
    reference: Path_, tuned: Path_, out: Path_, alphas: float | Iterable[float]
) -> dict[float, Path]:
    """Write the models at θ = (1-α)θ* + αθ of two checkpoints; returns the folder of each α.

        fs.interpolate_checkpoints("base", "tuned", "wise", [0.25, 0.5, 0.75])
        AutoModelForCausalLM.from_pretrained("wise/alpha-0.50")

    `reference` and `tuned` are folders that save_pretrained wrote (model.safetensors, or shards with their index; the
    two may be cut differently), or single .safetensors files. With one number for α, `out` is the model's folder; with
    several, even if the list has one, `out` has a folder `alpha-0.50` of each. What is written has the names, dtypes
    and shards of `tuned`, and its configuration and tokenizer files.

    Every tensor is read once, whatever the number of α, and 2**22 entries at a time: memory does not grow with the
    model, nor with the α. Arithmetic is as in `fs.interpolate`; integer tensors are those of `tuned`. All is written
    beside `out` and renamed when it is whole, so that a crash leaves nothing that loads.

    Raises:
        ValueError: α outside [0, 1], or twice; a tensor that is on one side alone, in another shape, or quantised;
            folders with adapters only. The tensor and its file are named.
        FileNotFoundError: no safetensors weights there.
        FileExistsError: `out` is there and not empty.
    """
    start, end, target = _checkpoint(Path(reference)), _checkpoint(Path(tuned)), Path(out)
    folders = _folders(target, alphas)
    _check_alike(start, end)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there and not empty: give another folder, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        places = {alpha: partial / folder.relative_to(target) for alpha, folder in folders.items()}
        for place in places.values():
            place.mkdir(parents=True)
        with ExitStack() as stack:
            opened: dict[Path, BinaryIO] = {file: stack.enter_context(open(file, "rb")) for file in start.files}
            for file in end.files:
                _write_file(file, start.tensors, opened, places)
        for place in places.values():  # last: an index without its shards would not load, nor shards without theirs
            for path in end.beside:
                shutil.copy2(path, place / path.name)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folders


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Where a tensor lies in a file."""

    file: Path
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    place: int
    """Of its first byte in the file."""
    size: int
    """In bytes."""


@dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    """What files say of themselves; no weight is read."""

    files: tuple[Path, ...]
    tensors: dict[str, _Stored]
    beside: tuple[Path, ...]
    """The other files that a loaded model needs."""


def _checkpoint(path: Path) -> _Checkpoint:
    files, beside = ((path,), ()) if path.is_file() else _folder(path)
    tensors: dict[str, _Stored] = {}
    for file in files:
        for name, stored in _head(file)[1].items():
            if name in tensors:
                raise ValueError(f"{name!r} is in both {tensors[name].file} and {file}: remove what an older save left")
            tensors[name] = stored
    return _Checkpoint(files=files, tensors=tensors, beside=beside)


def _folder(path: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or folder {path}: give a folder that save_pretrained wrote")
    is_single = (path / _SINGLE).is_file()  # which transformers takes, whatever index an older save has left
    if is_single:
        files: tuple[Path, ...] = (path / _SINGLE,)
    elif (path / _INDEX).is_file():
        shards = json.loads((path / _INDEX).read_text("utf-8"))["weight_map"].values()
        files = tuple(path / shard for shard in sorted(set(shards)))
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{path / _INDEX} names {missing[0]}, which is not there ({len(missing)} such)")
    elif (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} holds adapters only, and interpolating these is not interpolating what they do: merge them into "
            "the model first (merge_and_unload(), then save_pretrained)"
        )
    else:
        raise FileNotFoundError(
            f"{path} has neither {_SINGLE} nor {_INDEX}: write the model with save_pretrained, which writes safetensors"
        )
    config = path / "config.json"
    if config.is_file() and "quantization_config" in json.loads(config.read_text("utf-8")):
        raise ValueError(f"{config} says that the weights are quantised: interpolate the model before it is quantised")
    others = (other for other in sorted(path.iterdir()) if other.is_file() and other.suffix in _COPIED)
    kept = (other for other in others if other.name not in _LEFT)
    index = "" if is_single else _INDEX
    return files, tuple(other for other in kept if not other.name.endswith(".index.json") or other.name == index)


def _head(file: Path) -> tuple[bytes, dict[str, _Stored]]:
    """The head of a safetensors file as it stands, length and JSON; and its tensors, in the order of their bytes."""
    try:
        with open(file, "rb") as opened:
            length = opened.read(8)
            text = opened.read(min(int.from_bytes(length, "little"), file.stat().st_size))
        described = json.loads(text)
        described.pop("__metadata__", None)
        stored = []
        for name, entry in described.items():
            first, last = entry["data_offsets"]
            place, shape = 8 + len(text) + first, tuple(entry["shape"])
            stored.append((name, _Stored(file=file, dtype=entry["dtype"], shape=shape, place=place, size=last - first)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no safetensors file, or a damaged one ({error})") from error
    stored.sort(key=lambda item: (item[1].place, item[1].size))
    whole = stored[-1][1].place + stored[-1][1].size if stored else 8 + len(text)
    if whole != file.stat().st_size:
        raise ValueError(
            f"{file} has {file.stat().st_size} bytes, and its head says {whole}: it was cut off; write it anew"
        )
    return length + text, dict(stored)


def _folders(target: Path, alphas: float | Iterable[float]) -> dict[float, Path]:
    if not isinstance(alphas, Iterable):
        check_number("alpha", alphas, least=0.0, most=1.0)
        return {alphas: target}
    folders: dict[float, Path] = {}
    for alpha in numbers(alphas):
        check_number("alpha", alpha, least=0.0, most=1.0)
        if alpha in folders:
            raise ValueError(f"alpha {alpha} is given twice")
        short = f"{alpha:.2f}"
        folders[alpha] = target / f"alpha-{short if float(short) == alpha else repr(alpha)}"
    if not folders:
        raise ValueError("no alpha is given: pass a number in [0, 1], or several")
    return folders


def _check_alike(start: _Checkpoint, end: _Checkpoint) -> None:
    """`ValueError` that names tensor and file, unless every tensor has its like."""
    for one, other in ((start, end), (end, start)):
        if odd := sorted(one.tensors.keys() - other.tensors.keys()):
            raise ValueError(
                f"{odd[0]!r} is in {one.tensors[odd[0]].file} and not in {other.files[0].parent} ({len(odd)} such): "
                "the models differ, or their embeddings are tied in one alone (tie_word_embeddings); save both alike"
            )
    for name, stored in end.tensors.items():
        like = start.tensors[name]
        if stored.shape != like.shape:
            raise ValueError(
                f"{name!r} has shape {list(stored.shape)} in {stored.file} and {list(like.shape)} in {like.file}: "
                "resize both alike (embeddings: resize_token_embeddings)"
            )
        for tensor in (stored, like):
            if tensor.dtype not in _INTERPOLATED and tensor.dtype.startswith("F"):
                raise ValueError(
                    f"{name!r} is {tensor.dtype} in {tensor.file}: interpolate the model before it is quantised"
                )
        if (stored.dtype in _INTERPOLATED) != (like.dtype in _INTERPOLATED):
            raise ValueError(
                f"{name!r} is {stored.dtype} in {stored.file} and {like.dtype} in {like.file}: the models differ"
            )


def _write_file(file: Path, start: dict[str, _Stored], opened: dict[Path, BinaryIO], places: dict[float, Path]) -> None:
    """One shard of every α: the head is the tuned one's, and the weights follow in its order."""
    head, tensors = _head(file)
    with ExitStack() as stack:
        tuned = stack.enter_context(open(file, "rb"))
        outputs = {alpha: stack.enter_context(open(place / file.name, "wb")) for alpha, place in places.items()}
        for output in outputs.values():
            output.write(head)
        for name, end in tensors.items():
            is_interpolated = end.dtype in _INTERPOLATED
            ours = _pieces(tuned, end)
            theirs = _pieces(opened[start[name].file], start[name]) if is_interpolated else itertools.repeat(None)
            for one, other in zip(ours, theirs, strict=is_interpolated):
                for alpha, output in outputs.items():
                    _write(output, one if other is None else between(other, one, alpha, one.dtype))
        for output in outputs.values():
            output.flush()
            os.fsync(output.fileno())


def _pieces(file: BinaryIO, tensor: _Stored) -> Iterator[Tensor]:
    """The tensor, flat, a piece at a time; of a dtype that is not interpolated its bytes."""
    dtype = _INTERPOLATED.get(tensor.dtype, torch.uint8)
    step = _PIECE * dtype.itemsize
    for done in range(0, tensor.size, step):
        piece = bytearray(min(step, tensor.size - done))
        file.seek(tensor.place + done)
        if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
            raise OSError(f"{tensor.file} became shorter while it was read")
        yield torch.frombuffer(piece, dtype=dtype)


def _write(output: BinaryIO, tensor: Tensor) -> None:
    output.write(tensor.view(torch.uint8).numpy().data)
