"""The pre-training text: the standard library's own sources and docstrings, de-duplicated, split by module."""

import hashlib
import re
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

HELD_OUT_PERCENT = 6
"""Share of the modules that goes to validation, and as much to test."""

MAX_HELD_OUT_CHARS = 20_000
"""What one held-out module lends at most, so that no single one (pydoc's topics: 700 kB) decides on retention."""

MIN_BLOCK_CHARS = 40
"""Shorter blocks (a lone `pass`, a closing bracket) repeat everywhere and would fall to the de-duplication unevenly."""

_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "encodings", "idlelib", "lib-dynload", "lib2to3", "site-packages", "test", "tests"}
)
"""Tests, bundled editors and tables of code points are not text; site-packages is not the standard library."""

_BUILD_FILES = re.compile(r"_sysconfigdata|^_sysconfig|^config-")
"""Written when Python is built, hence other on another machine."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Blocks of text by split. No block occurs twice, and no module lends blocks to two splits."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def read_modules(root: Path | None = None) -> dict[str, str]:
    """Path within the standard library → source, for every module that is ordinary text."""
    root = root or Path(sysconfig.get_path("stdlib"))
    modules = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(part in _SKIPPED_FOLDERS or _BUILD_FILES.search(part) for part in relative.parts):
            continue
        modules[relative.as_posix()] = path.read_text(encoding="utf-8", errors="replace")
    return modules


def split_of(module: str) -> str:
    """The split that a module belongs to: a pure function of its path, so the same on every machine."""
    bucket = _hash(module) % 100
    if bucket < HELD_OUT_PERCENT:
        return "validation"
    if bucket < 2 * HELD_OUT_PERCENT:
        return "test"
    return "train"


def build_corpus(modules: Mapping[str, str], max_train_chars: int | None = None) -> Corpus:
    """Split modules by their path, blocks de-duplicated over all of them.

    Held-out modules are read first, so a block that a held-out and a training module share stays out of training.
    `max_train_chars` bounds the training text; modules are taken in the order of their hash until it is reached.
    """
    seen: set[str] = set()
    blocks: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    num_train_chars = 0
    for module in sorted(modules, key=lambda name: (split_of(name) == "train", _hash(name))):
        split = split_of(module)
        if split == "train" and max_train_chars is not None and num_train_chars >= max_train_chars:
            break
        fresh = list(_unseen_blocks(modules[module], seen))
        if split == "train":
            num_train_chars += sum(map(len, fresh))
        else:
            fresh = _head(fresh, MAX_HELD_OUT_CHARS)
        blocks[split] += fresh
    return Corpus(train=tuple(blocks["train"]), validation=tuple(blocks["validation"]), test=tuple(blocks["test"]))


def _unseen_blocks(source: str, seen: set[str]) -> Iterable[str]:
    """Paragraphs of a source (what blank lines separate) that were not met before; `seen` is updated."""
    for block in re.split(r"\n\s*\n", source.expandtabs(4)):
        key = " ".join(block.split())
        if len(key) >= MIN_BLOCK_CHARS and key not in seen:
            seen.add(key)
            yield block.rstrip()


def _head(blocks: Sequence[str], max_chars: int) -> list[str]:
    """The first blocks, as many as fit."""
    ends = accumulate(map(len, blocks))
    return [block for block, end in zip(blocks, ends, strict=True) if end <= max_chars]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
