"""The files that a path or a brace pattern names, what to write where one is not there, and folders to write to."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

_ADDRESS = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]+://")
_TAR = (".tar", ".tar.gz", ".tgz")
_NUM_NAMED = 3


def is_shard(name: str) -> bool:
    """Whether webdataset reads it: a tar file, or an address (`https://…`, `pipe:…`), of which only shards are read."""
    return name.lower().endswith(_TAR) or _ADDRESS.match(name) is not None


def expand(spec: str) -> list[str]:
    """The files of a path or brace pattern, in order; each is there, but for addresses, which are not asked.

    Raises:
        ValueError: a folder, or braces that do not close.
        FileNotFoundError: a file is not there; with the name in its folder that is nearest.
    """
    if _exists(spec):
        return [_checked(spec)]
    from webdataset.shardlists import expand_urls

    try:
        names: list[str] = expand_urls(spec)
    except ValueError as error:
        raise ValueError(f"{spec}: a brace is not closed; shards are written 'part-{{000..099}}.tar'") from error
    missing = [name for name in names if not _exists(name)]
    if not missing:
        return [_checked(name) for name in names]
    if len(names) == 1:
        raise FileNotFoundError(f"there is no file {spec}" + nearest(missing[0]))
    if len(missing) == len(names):
        raise FileNotFoundError(
            f"{spec} names {len(names)} files, and none is there; the first is {names[0]}" + nearest(names[0])
        )
    raise FileNotFoundError(
        f"{spec} names {len(names)} files, of which {_listed(missing)} "
        f"{'is' if len(missing) == 1 else 'are'} not there; write the numbers of those that are"
    )


def nearest(name: str) -> str:
    """What follows "there is no …": the name in its folder that is most like it, or which folder is not there."""
    path = Path(name).expanduser()
    folder = path.parent
    if not folder.is_dir():
        return f", nor a folder {folder}" + nearest(str(folder))
    entries = sorted(entry.name for entry in folder.iterdir())
    if alike := difflib.get_close_matches(path.name, entries, n=1):
        return f" (did you mean {folder / alike[0]}?)"
    return ""


def make_folder(flag: str, folder: Path) -> None:
    """`ValueError` where nothing can be written, before the work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag} {folder} cannot be made ({error.strerror}): give another folder") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{flag} {folder} cannot be written to: give another folder")


def _exists(name: str) -> bool:
    return _ADDRESS.match(name) is not None or Path(name).expanduser().exists()


def _checked(name: str) -> str:
    if _ADDRESS.match(name):
        return name
    path = Path(name).expanduser()
    if path.is_dir():
        raise ValueError(f"{name} is a folder: {_instead_of(path)}")
    return str(path)


def _instead_of(folder: Path) -> str:
    """How to write the files in a folder."""
    shards = sorted(entry for entry in folder.iterdir() if is_shard(entry.name))
    if shards:
        return f"write the {len(shards)} shards in it as '{_pattern(folder, shards)}'"
    files = sorted(str(entry) for entry in folder.iterdir() if ".json" in entry.name)
    if files:
        return f"give a file in it, such as {files[0]}"
    return f"give a .jsonl file, shards as 'part-{{000..099}}.tar', or hf:{folder} if the package datasets reads it"


def _pattern(folder: Path, shards: list[Path]) -> str:
    names = [shard.name for shard in shards]
    # The run of digits in which the names of consecutive shards differ.
    for first, last in zip(re.finditer(r"\d+", names[0]), re.finditer(r"\d+", names[-1]), strict=False):
        before, behind = names[0][: first.start()], names[0][first.end() :]
        width = len(first[0])
        counted = [f"{before}{number:0{width}}{behind}" for number in range(int(first[0]), int(last[0]) + 1)]
        if sorted(counted) == names and len(names) > 1:
            return str(folder / f"{before}{{{first[0]}..{last[0]}}}{behind}")
    return str(folder / names[0]) if len(names) == 1 else str(folder / f"{{{','.join(names[:_NUM_NAMED])},…}}")


def _listed(names: list[str]) -> str:
    rest = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")
