"""Looking into a loss cache, taking namespaces out of it, and giving their space back to the disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lmdb

from flowstream.scoring.cache import PREFIX_SIZE
from flowstream.scoring.disk.environment import Environment, UnavailableError, acquire, is_open_here, release
from flowstream.scoring.disk.place import DATA, hold
from flowstream.scoring.disk.records import Record

_DELETED_TOGETHER = 100_000
"""Entries in one transaction, so that other processes can write in between."""

_COMPACT = "compact-"
"""Folders within the cache in which its smaller copy is made."""


@dataclass(frozen=True)
class Contents:
    """What a cache holds."""

    namespaces: tuple[Held, ...]
    """The last used first."""

    num_bytes: int
    """Size of the file."""

    num_free: int
    """Bytes of it that are free for new losses."""


@dataclass(frozen=True)
class Held:
    """A namespace in a cache."""

    prefix: bytes
    record: Record

    num_entries: int

    num_bytes: int
    """Of keys and values, without what LMDB adds."""


@dataclass(frozen=True)
class Pruned:
    """What was taken out."""

    namespaces: tuple[Held, ...]

    num_bytes_before: int
    num_bytes_after: int
    """Size of the file."""

    why_not_shrunk: str | None
    """What kept the file at its size, if anything did."""


Choice = Callable[[tuple[Held, ...]], tuple[Held, ...]]
"""Which namespaces to take out, of all, the last used first."""


def contents(path: str | os.PathLike[str]) -> Contents:
    """What is in the cache at `path`. `ValueError` where there is none, or none that can be read."""
    with _opened(path) as environment:
        return _contents(environment)


def prune(path: str | os.PathLike[str], choice: Choice) -> Pruned:
    """Delete the namespaces that are chosen, and shrink the file if no other process has it open."""
    real = Path(os.path.realpath(path))
    with _opened(real) as environment:
        if not environment.writable:
            raise ValueError(f"the loss cache at {path} may not be written to")
        before = _contents(environment)
        chosen = choice(before.namespaces)
        for held in chosen:
            _delete(environment, held.prefix)
    why_not = _compact(real)
    return Pruned(chosen, before.num_bytes, real.joinpath(DATA).stat().st_size, why_not)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Environment]:
    try:
        environment = acquire(path, create=False)
    except UnavailableError as error:
        raise ValueError(f"the loss cache at {path} cannot be opened: {error}") from error
    try:
        yield environment
    except lmdb.Error as error:
        raise ValueError(f"the loss cache at {path}: {error}") from error
    finally:
        release(environment)


def _contents(environment: Environment) -> Contents:
    num_bytes = environment.path.joinpath(DATA).stat().st_size
    records = environment.records()

    def look(transaction: lmdb.Transaction) -> Contents:
        held = []
        for prefix, raw in records.items():
            sizes = [len(key) + len(value) for key, value in _entries(transaction, environment, prefix)]
            held.append(Held(prefix, Record.read(raw), len(sizes), sum(sizes)))
        held.sort(key=lambda one: (one.record.used, one.record.created, one.prefix), reverse=True)
        main = transaction.stat()
        tables = (main, transaction.stat(environment.losses), transaction.stat(environment.namespaces))
        num_pages = 2 + sum(t["branch_pages"] + t["leaf_pages"] + t["overflow_pages"] for t in tables)
        return Contents(tuple(held), num_bytes, max(num_bytes - num_pages * main["psize"], 0))

    return environment.transact(look)


def _entries(transaction: lmdb.Transaction, environment: Environment, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
    with transaction.cursor(environment.losses) as cursor:
        if cursor.set_range(prefix):
            for key, value in cursor:
                if key[:PREFIX_SIZE] != prefix:
                    return
                yield bytes(key), bytes(value)


def _delete(environment: Environment, prefix: bytes) -> None:
    """All entries of a namespace, and last its record, so that what an interruption leaves is still known."""

    def delete_some(transaction: lmdb.Transaction) -> bool:
        with transaction.cursor(environment.losses) as cursor:
            found = cursor.set_range(prefix)
            for _ in range(_DELETED_TOGETHER):
                if not found or cursor.key()[:PREFIX_SIZE] != prefix:
                    transaction.delete(prefix, db=environment.namespaces)
                    return False
                cursor.delete()
                found = cursor.key() != b""
        return True

    while environment.transact(delete_some, write=True):
        pass


def _compact(path: Path) -> str | None:
    """Replace the file by one without free pages; or say why not."""
    if is_open_here(path):
        return "it is open in this process"
    try:
        held = hold(path, alone=True)
    except OSError:
        return "it is open in another process"
    if held is None:
        return "there are no locks here to tell whether it is in use"
    try:
        for left_over in path.glob(_COMPACT + "*"):
            shutil.rmtree(left_over, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_COMPACT, dir=path) as folder:
            _copy(path, Path(folder))
            os.replace(Path(folder, DATA), path / DATA)
    except (lmdb.Error, OSError) as error:
        return str(error)
    finally:
        os.close(held)
    return None


def _copy(path: Path, folder: Path) -> None:
    handle = lmdb.open(str(path), readonly=True, lock=False, max_dbs=2)
    try:
        handle.copy(str(folder), compact=True)
    finally:
        handle.close()
    with open(folder / DATA, "rb") as file:
        os.fsync(file.fileno())
