"""Losses kept in a file, for later epochs, runs and processes."""

from __future__ import annotations

import logging
import os
import shutil
import weakref
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import lmdb
from numpy.typing import NDArray

from flowstream.scoring.cache import PREFIX_SIZE, Namespace
from flowstream.scoring.disk.entries import decode, encode
from flowstream.scoring.disk.environment import (
    Environment,
    FullError,
    UnavailableError,
    acquire,
    is_inherited,
    release,
)
from flowstream.scoring.disk.records import Record

_logger = logging.getLogger("flowstream")


class DiskCache:
    """Owns a part in the losses stored at `path`, a folder with an LMDB file. A `LossCache`.

    Several streams and processes of a node may use one path at the same time. A window is stored as a whole when `put`
    returns, on the disk: a process that is killed loses no more than the window it was writing. Every entry carries a
    checksum, and a damaged one counts as not there. Where nothing can be written any more (a full disk, a file that
    may not be written to), training goes on without, and a warning says so once.

    The path must be on a local disk: LMDB's locks and maps do not work over a network file system. On several nodes
    give each its own.

    Args:
        path: a new or empty folder, made with its parents, or that of a cache.
        max_bytes: how large the file may become; when it is, what is there is kept, and nothing more taken.

    Raises:
        ValueError: what is at `path` is something else, of a later version, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < 2**20:
            raise ValueError(f"max_bytes is {max_bytes}: give at least {2**20}, or None")
        self.path = Path(path).expanduser()
        self.max_bytes = max_bytes
        self.num_lookups = 0
        self.num_hits = 0
        self._namespaces: dict[bytes, Namespace] = {}
        self._stamped: dict[bytes, str] = {}  # the day on which this object last wrote a namespace's record
        self._writes = True
        self._told: set[str] = set()
        self._environment: Environment | None = None
        self._let_go: weakref.finalize[Any, Any] | None = None
        self._attach()

    def register(self, namespace: Namespace) -> None:
        self._namespaces[namespace.prefix] = namespace

    def get(self, keys: Sequence[bytes]) -> list[NDArray[Any] | None]:
        self.num_lookups += len(keys)
        environment = self._current()
        if environment is None:
            return [None] * len(keys)
        try:
            values, num_damaged = decode(keys, environment.read(keys))
        except lmdb.Error as error:
            self._give_up(error)
            return [None] * len(keys)
        if num_damaged:
            self._tell(
                "damaged",
                f"{num_damaged} losses in the cache at {self.path} are damaged, and are scored again: check the disk",
            )
        num_hits = len(keys) - sum(value is None for value in values)
        self.num_hits += num_hits
        if num_hits:
            self._put([], keys)  # says that the namespace is in use
        return values

    def put(self, keys: Sequence[bytes], values: Sequence[NDArray[Any]]) -> None:
        self._put([(key, encode(key, value)) for key, value in zip(keys, values, strict=True)], keys)

    def close(self) -> None:
        self._writes = False
        self._environment = None
        if self._let_go is not None:
            self._let_go()

    def _put(self, entries: Sequence[tuple[bytes, bytes]], keys: Sequence[bytes]) -> None:
        """Write entries, and the records of the namespaces of `keys`: of new ones, and once a day of those in use."""
        environment = self._current()
        if environment is None or not self._writes:
            return
        prefixes = {key[:PREFIX_SIZE] for key in keys}
        now = datetime.now().isoformat(timespec="seconds")
        stale = {prefix for prefix in prefixes if self._stamped.get(prefix) != now[:10]}
        if not entries and not stale:
            return
        if not environment.is_in_place():
            self._stop_writing("its file was deleted, or replaced")
            return
        try:
            known = environment.records()
            records = [
                (prefix, Record.read(known.get(prefix)).touched(self._namespaces.get(prefix), now))
                for prefix in sorted(prefixes)
                if prefix in stale or prefix not in known  # another process may have pruned it meanwhile
            ]
            environment.write(entries, [(prefix, record.write()) for prefix, record in records], self.max_bytes)
            self._stamped.update(dict.fromkeys(prefixes, now[:10]))
        except FullError as error:
            self._stop_writing(f"{error}: prune it with `flowstream cache prune`")
        except lmdb.Error as error:
            self._stop_writing(str(error))

    # What can go wrong while training runs

    def _attach(self) -> None:
        try:
            environment = acquire(self.path, max_bytes=self.max_bytes)
        except UnavailableError as error:
            self._tell(
                "unavailable", f"no losses are cached at {self.path} ({error}): free space, or give another path"
            )
            return
        self._environment = environment
        self._let_go = weakref.finalize(self, release, environment)
        if not environment.writable:
            self._stop_writing("it may not be written to")

    def _current(self) -> Environment | None:
        """The environment of this process: in a forked one, its own."""
        if self._environment is not None and is_inherited(self._environment):
            self._environment = None
            if self._let_go is not None:
                self._let_go.detach()
            try:
                self._attach()
            except ValueError as error:
                self._tell("unavailable", str(error))
        return self._environment

    def _stop_writing(self, why: str) -> None:
        self._writes = False
        self._tell(
            "unwritable",
            f"no more losses are written to the cache at {self.path}: {why} ({_free(self.path)}). Training goes on",
        )

    def _give_up(self, error: Exception) -> None:
        self.close()
        self._tell(
            "unreadable",
            f"the loss cache at {self.path} can no longer be read ({error}): training goes on without it. Delete it "
            "before the next run, or give another path",
        )

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            _logger.warning("%s (told once)", message)


def _free(path: Path) -> str:
    """What is left on the disk: LMDB's own errors do not tell."""
    try:
        place = next(place for place in (path, *path.absolute().parents) if place.exists())
        return f"{shutil.disk_usage(place).free / 2**20:,.0f} MB are free on its disk"
    except OSError:
        return "its disk cannot be read"
