"""One LMDB environment a path and process: opened with care, shared, grown, and opened anew after a fork."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from flowstream.scoring.disk.pages import DamageError, check_pages, read_metas
from flowstream.scoring.disk.place import DATA, LOCK, check_head, check_place, damaged, hold, is_writable, reserve

Result = TypeVar("Result")

FORMAT = b"flowstream loss cache 1"
"""Stands in every cache of ours. The number is raised when what is stored changes its meaning."""

_MARK, _LOSSES, _NAMESPACES = b"format", b"losses", b"namespaces"
_FIRST_MAP = 2**26
_CHECKED_BYTES = 2**30
"""Of a larger table only the inner pages are looked through on opening: so much takes a second or two."""

_DAMAGE = (
    DamageError,
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.IncompatibleError,
    lmdb.PanicError,
)
_MISUSED = (FileExistsError, NotADirectoryError)
_UNWRITABLE = {ENOSPC, EDQUOT, EROFS, EACCES, EPERM}


class UnavailableError(Exception):
    """The disk or its permissions do not let a cache be used here; the message says why."""


class FullError(Exception):
    """The cache has reached the size that it may have."""


class Environment:
    """Owns an open LMDB environment: reads and writes of a window, each in one transaction.

    `acquire` gives the one of a path. LMDB must not open a path twice in a process, nor use what its parent opened.
    """

    def __init__(self, path: Path, *, create: bool, map_size: int) -> None:
        self.path = path
        self.num_users = 0
        self.writable = True
        self._lock = threading.RLock()  # the map must not move under another thread's transaction
        self._held: int | None = None
        try:
            check_place(path, create=create)
            self._held = hold(path)
            self.handle = self._open(map_size)
            self._opened = _identity(path)
        except BaseException:
            self._let_go()
            raise
        try:
            self._look_through()
            self._open_tables()
            self.handle.reader_check()  # lets go of what killed processes held
        except BaseException as error:
            self.close()
            if isinstance(error, _DAMAGE):
                raise damaged(path, error) from error
            if isinstance(error, lmdb.Error):
                raise UnavailableError(str(error)) from error
            raise

    def is_in_place(self) -> bool:
        """Whether its file is still the one at its path."""
        try:
            return _identity(self.path) == self._opened
        except OSError:
            return False

    def read(self, keys: Iterable[bytes]) -> list[bytes | None]:
        """What stands under `keys`, in one transaction. Raises `lmdb.Error`."""

        def get(transaction: Any) -> list[bytes | None]:
            return list(map(transaction.get, keys))

        return self.transact(get, table=self.losses)

    def write(
        self,
        entries: Iterable[tuple[bytes, bytes]],
        records: Sequence[tuple[bytes, bytes]] = (),
        max_bytes: int | None = None,
    ) -> None:
        """Store all of `entries`, and of `records` (of namespaces), or nothing. Raises `lmdb.Error`, `FullError`."""
        entries = sorted(entries)  # neighbours share pages

        def put(transaction: lmdb.Transaction) -> None:
            for key, record in records:
                transaction.put(key, record, db=self.namespaces)
            with transaction.cursor(self.losses) as cursor:
                cursor.putmulti(entries)

        self.transact(put, write=True, max_bytes=max_bytes)

    def records(self) -> dict[bytes, bytes]:
        """Of each namespace, by prefix."""

        def get(transaction: Any) -> dict[bytes, bytes]:
            return dict(transaction.cursor())

        return self.transact(get, table=self.namespaces)

    def transact(
        self,
        body: Callable[[lmdb.Transaction], Result],
        *,
        table: Any = None,
        write: bool = False,
        max_bytes: int | None = None,
    ) -> Result:
        """`body` in one transaction; in another one where the file has outgrown its map. `lmdb.Error`, `FullError`."""
        with self._lock:
            while True:
                try:
                    with self.handle.begin(db=table, write=write) as transaction:
                        return body(transaction)
                except lmdb.MapResizedError:  # another process has grown it
                    self._set_map(0)
                except lmdb.MapFullError:
                    size = self.handle.info()["map_size"]
                    if max_bytes is not None and size >= max_bytes:
                        raise FullError(f"it has reached max_bytes={max_bytes}") from None
                    self._set_map(2 * size if max_bytes is None else min(2 * size, max_bytes))

    def close(self) -> None:
        with self._lock:
            self.handle.close()
            self._let_go()

    def disown(self) -> None:
        """In a forked child: close what it inherited; the parent's stays open."""
        # Unless another thread of the parent was in a transaction, whose locks are the parent's.
        if self._lock.acquire(blocking=False):
            self.close()
            self._lock.release()

    def _let_go(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _set_map(self, size: int) -> None:
        try:
            self.handle.set_mapsize(size)
        except lmdb.Error:
            self.handle.close()  # there is no map left, which LMDB would not notice
            raise

    # Opening

    def _open(self, map_size: int) -> lmdb.Environment:
        path = self.path
        self.writable = is_writable(path)
        if self.writable:
            reserve(path / LOCK)
        check_head(path)
        try:
            return lmdb.open(
                str(path),
                map_size=map_size,
                readonly=not self.writable,
                lock=self.writable,
                create=self.writable,
                max_dbs=2,
                max_spare_txns=0,  # a spare one would hold a slot that a forked child gives up
                readahead=False,  # reads are all over the file
            )
        except _DAMAGE as error:
            raise damaged(path, error) from error
        except lmdb.Error as error:
            raise UnavailableError(str(error)) from error

    def _look_through(self) -> None:
        """`DamageError` where LMDB must not go on."""
        with open(self.path / DATA, "rb") as file:

            def check(transaction: lmdb.Transaction) -> bool:
                number = transaction.id()
                metas = read_metas(file.fileno())
                for meta in metas or ():
                    if meta.transaction == number:
                        check_pages(file.fileno(), meta, _CHECKED_BYTES)
                        return True
                return metas is None

            # A snapshot's meta page is written over by the second transaction after it.
            if not any(self.transact(check) for _ in range(8)):
                raise UnavailableError("it is being written to without a pause")

    def _open_tables(self) -> None:
        """The two tables; in a new file they are made, beside the format."""
        found = self._format()
        if found is None and self.writable:
            with self.handle.begin(write=True) as transaction:
                if transaction.stat()["entries"] == 0:
                    transaction.put(_MARK, FORMAT)
                    for name in (_LOSSES, _NAMESPACES):
                        self.handle.open_db(name, transaction, create=True)
            found = self._format()
        if found is None:
            raise ValueError(f"{self.path} is an LMDB file, but no loss cache of flowstream: give another path")
        if found != FORMAT:
            raise ValueError(
                f"{self.path} is a {found.decode(errors='replace')}, and this version of flowstream reads "
                f"{FORMAT.decode()}: give another path, or use the version of flowstream that made it"
            )
        self.losses = self.handle.open_db(_LOSSES, create=False)
        self.namespaces = self.handle.open_db(_NAMESPACES, create=False)

    def _format(self) -> bytes | None:
        with self.handle.begin() as transaction:
            found = transaction.get(_MARK)
            return None if found is None else bytes(found)


def _identity(path: Path) -> tuple[int, int]:
    found = os.stat(path / "data.mdb")
    return found.st_dev, found.st_ino


# One a path and process

_open_here: dict[Path, Environment] = {}
_of_parent: list[Environment] = []
_guard = threading.Lock()


def acquire(path: str | os.PathLike[str], *, create: bool = True, max_bytes: int | None = None) -> Environment:
    """The environment at `path`, for `release` when done with it.

    Raises:
        ValueError: what is there is no loss cache, or a damaged one.
        UnavailableError: the disk is full, or permissions are missing.
    """
    real = Path(os.path.realpath(os.path.expanduser(path)))
    with _guard:
        if real in _open_here and not _open_here[real].is_in_place():
            del _open_here[real]  # deleted under its users, who go on with what nobody else will find
        if real not in _open_here:
            map_size = _FIRST_MAP if max_bytes is None else min(_FIRST_MAP, max_bytes)
            try:
                _open_here[real] = Environment(real, create=create, map_size=map_size)
            except _MISUSED as error:
                raise ValueError(f"{path} cannot be the folder of a loss cache: {error.strerror}") from error
            except OSError as error:
                if error.errno not in _UNWRITABLE:
                    raise
                raise UnavailableError(str(error.strerror)) from error
        environment = _open_here[real]
        environment.num_users += 1
        return environment


def release(environment: Environment) -> None:
    """Close it, where this was the last user. What a parent process opened is left alone."""
    with _guard:
        if is_inherited(environment):
            return
        environment.num_users -= 1
        if not environment.num_users:
            if _open_here.get(environment.path) is environment:
                del _open_here[environment.path]
            environment.close()


def is_inherited(environment: Environment) -> bool:
    """Whether a parent process opened it, so that this one must not use it."""
    return any(environment is other for other in _of_parent)


def is_open_here(path: Path) -> bool:
    """Whether this process has `path` open."""
    return Path(os.path.realpath(path)) in _open_here


def _after_fork() -> None:
    global _guard
    _guard = threading.Lock()
    for environment in _open_here.values():
        environment.disown()
        _of_parent.append(environment)
    _open_here.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
