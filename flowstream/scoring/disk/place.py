"""The folder that a cache is in: whether it may be one, what may be done there, and the lock on it."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from errno import EDQUOT, ENOLCK, ENOSPC, ENOTSUP
from pathlib import Path

from flowstream.scoring.disk.pages import DamageError, read_metas

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

DATA, LOCK = "data.mdb", "lock.mdb"
"""LMDB's names for its files."""

_RESERVED_BYTES = 2**14
"""More than LMDB makes its table of readers."""

_REMEDY = "delete it (its losses are then scored again), or give another path"


def check_place(path: Path, *, create: bool) -> None:
    """`ValueError` unless a cache is at the path, or may be put there; its folder is then made if `create`."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: a loss cache is a folder; give another path")
    found = {entry.name for entry in path.iterdir()} if path.exists() else set()
    if DATA not in found:
        if found - {LOCK}:
            shown = ", ".join(sorted(found)[:3])
            raise ValueError(f"{path} is no loss cache: it holds {shown}; give the path of a new or an empty folder")
        if not create:
            raise ValueError(f"there is no loss cache at {path}")
        path.mkdir(parents=True, exist_ok=True)


def damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"the loss cache at {path} is damaged, or no such file at all ({error}): {_REMEDY}")


def check_head(path: Path) -> None:
    """`ValueError` unless LMDB may open the file."""
    for attempt in range(5):
        try:
            with open(path / DATA, "rb") as file:
                read_metas(file.fileno())
            return
        except FileNotFoundError:
            return
        except DamageError as error:
            if attempt == 4 or path.joinpath(DATA).stat().st_size >= 2**14:
                raise damaged(path, error) from error
            time.sleep(0.02)  # another process may be making it


def hold(path: Path, *, alone: bool = False) -> int | None:
    """A descriptor whose lock keeps the file from being replaced; `alone`, to replace it. `None` where there are none.

    LMDB's own locks are not enough: whoever waits for them goes on with what they said of the file that was replaced.
    `BlockingIOError` where another process holds it, and `alone` is asked for.
    """
    if fcntl is None:
        return None
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
    except OSError as error:
        os.close(folder)
        if alone:
            raise
        if error.errno in (ENOLCK, ENOTSUP):
            return None
        raise
    return folder


def is_writable(path: Path) -> bool:
    """Whether the cache's files can be written to, or made."""
    files = [path / DATA, path / LOCK]
    needed = [file for file in files if file.exists()]
    if len(needed) < len(files):
        needed.append(path)
    return all(os.access(place, os.W_OK) for place in needed)


def reserve(lock: Path) -> None:
    """Give the table of readers its blocks on the disk: LMDB maps it, and on a full disk its first use would kill."""
    with suppress(FileNotFoundError):
        found = lock.stat()
        if found.st_size and found.st_blocks * 512 >= found.st_size:
            return
    if not hasattr(os, "posix_fallocate"):
        return
    # Closing any descriptor of this file gives up the process's locks on it; here it holds none yet.
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.posix_fallocate(file, 0, _RESERVED_BYTES)
    except OSError as error:
        if error.errno in (ENOSPC, EDQUOT):
            raise
    finally:
        os.close(file)
