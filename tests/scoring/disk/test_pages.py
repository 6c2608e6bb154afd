"""Damage to the pages of a cache is found before LMDB reads them: no file makes a process crash or a loss wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from disk_caches import SAMPLE, TOKEN, keys_of, losses_of, output, start

from flowstream.scoring.disk.pages import DamageError, check_pages, read_metas
from flowstream.scoring.disk.upkeep import prune
from flowstream.scoring.disk_cache import DiskCache


def _fill(path: Path, num_windows: int) -> None:
    cache = DiskCache(path)
    for window in range(num_windows):
        for keys in (keys_of(window), keys_of(window, 10, TOKEN)):
            cache.put(keys, losses_of(keys))
    cache.close()


def _check(file: Path) -> int:
    """Look through the newest snapshot of a file; the number of its transaction."""
    with open(file, "rb") as opened:
        metas = read_metas(opened.fileno())
        assert metas is not None
        newest = max(metas, key=lambda meta: meta.transaction)
        check_pages(opened.fileno(), newest, max_bytes=2**30)
        return newest.transaction


def test_sound_files_of_all_sizes_pass(tmp_path: Path) -> None:
    """Empty, one page, several levels, values on pages of their own, free pages, compacted."""
    for num_windows in (0, 1, 3, 60):
        _fill(tmp_path, num_windows)
        assert _check(tmp_path / "data.mdb") >= num_windows
    open_here = DiskCache(tmp_path)  # so that pruning leaves free pages
    for namespace in (TOKEN, SAMPLE):
        prune(tmp_path, lambda found, prefix=namespace.prefix: tuple(held for held in found if held.prefix == prefix))
        assert _check(tmp_path / "data.mdb")
    open_here.close()
    prune(tmp_path, lambda _: ())
    assert _check(tmp_path / "data.mdb")


def test_of_a_large_tree_only_the_leaves_numbers_are_looked_at(tmp_path: Path) -> None:
    _fill(tmp_path, 20)
    file = tmp_path / "data.mdb"
    with open(file, "r+b") as opened:
        metas = read_metas(opened.fileno())
        assert metas is not None
        newest = max(metas, key=lambda meta: meta.transaction)
        check_pages(opened.fileno(), newest, max_bytes=2**14)
        opened.truncate(file.stat().st_size // 3)
        with pytest.raises(DamageError, match="was it cut off"):
            check_pages(opened.fileno(), newest, max_bytes=2**14)


def test_an_empty_file_is_new_and_others_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    with open(file, "rb") as opened:
        assert read_metas(opened.fileno()) is None
    for content in (b"short", bytes(8192), b"\x7fELF" * 4096):
        file.write_bytes(content)
        with open(file, "rb") as opened, pytest.raises(DamageError, match="does not begin as an LMDB file"):
            read_metas(opened.fileno())


_DAMAGES = """
keys = [key for window in range(12) for namespace in (SAMPLE, TOKEN) for key in keys_of(window, 50, namespace)]
extra = keys_of("extra")
path, content = sys.argv[1], open(sys.argv[2], "rb").read()
logging.disable()
os.mkdir(path)

def damage(draws):
    data = bytearray(content)
    at = draws.randrange(len(data))
    kind = draws.choice(["byte", "bytes", "page", "noise", "cut"])
    if kind == "byte":
        data[at] ^= draws.randrange(1, 256)
    elif kind == "bytes":
        for _ in range(40):
            data[draws.randrange(len(data))] ^= draws.randrange(1, 256)
    elif kind == "page":
        at -= at % 4096
        data[at : at + 4096] = bytes(4096)
    elif kind == "noise":
        data[at : at + 1000] = draws.randbytes(len(data[at : at + 1000]))
    else:
        del data[at:]
    return data

def use():
    try:
        cache = DiskCache(path)
    except ValueError:
        return 1
    num_found = num_right(keys, cache.get(keys))
    cache.put(extra, losses_of(extra))
    num_right(keys + extra, cache.get(keys + extra))
    cache.close()
    return 2 if num_found < len(keys) else 3

counts = {1: 0, 2: 0, 3: 0}
for trial in range(80):
    for file in os.listdir(path):
        os.remove(os.path.join(path, file))
    with open(os.path.join(path, "data.mdb"), "wb") as file:
        file.write(damage(random.Random(trial)))
    child = os.fork()
    if not child:
        status = 99
        try:
            status = use()
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) in counts, (trial, status)
    counts[os.WEXITSTATUS(status)] += 1
print(*counts.values())
"""


def test_damage_anywhere_is_refused_or_missed_and_never_crashes(tmp_path: Path) -> None:
    """Whatever happened to the file, each key gives its own loss or none, and a process lives to tell."""
    cache = DiskCache(tmp_path / "sound")
    for window in range(12):
        for namespace in (SAMPLE, TOKEN):
            keys = keys_of(window, 50, namespace)
            cache.put(keys, losses_of(keys))
    cache.close()
    printed, _ = output(start(_DAMAGES, tmp_path / "damaged", tmp_path / "sound" / "data.mdb"))
    refused, missed, _ = map(int, printed.split())
    assert refused > 15
    assert missed > 15
