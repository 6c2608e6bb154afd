"""The cache of losses on disk: real files, and real processes that are killed, run at once, or run out of space."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import lmdb
import numpy as np
import pytest
from disk_caches import SAMPLE, TOKEN, keys_of, losses_of, num_right, output, start

from flowstream.scoring.cache import Namespace, content_key
from flowstream.scoring.disk_cache import DiskCache


def _filled(path: Path, *windows: object, namespace: Namespace = SAMPLE) -> None:
    cache = DiskCache(path)
    cache.register(namespace)
    for window in windows:
        keys = keys_of(window, namespace=namespace)
        cache.put(keys, losses_of(keys))
    cache.close()


def _num_found(path: Path, *windows: object, namespace: Namespace = SAMPLE) -> list[int]:
    """How many of each window's losses are there, all of them the right ones."""
    cache = DiskCache(path)
    found = []
    for window in windows:
        keys = keys_of(window, namespace=namespace)
        found.append(num_right(keys, cache.get(keys)))
    cache.close()
    return found


def test_what_was_put_comes_back_to_the_bit_in_order_also_after_reopening(tmp_path: Path) -> None:
    samples = [np.array([value], np.float32) for value in (1 / 3, np.nan, np.inf, -0.0, 1e-42)]
    tokens = [np.array(value, np.float16) for value in ([0.1], [np.nan, -np.inf], [6e-8] * 5000)]
    keys = keys_of("a", 5) + keys_of("a", 3, TOKEN)
    values = samples + tokens
    cache = DiskCache(tmp_path / "new" / "losses")
    cache.put(keys, values)
    for wanted in (list(range(8)), [4, 0, 0], [7, 6, 2]):
        for _ in range(2):
            found = cache.get([keys[at] for at in wanted])
            for at, value in zip(wanted, found, strict=True):
                assert value is not None
                assert (value.dtype, value.tobytes()) == (values[at].dtype, values[at].tobytes())
                assert not value.flags.writeable
            cache.close()
            cache = DiskCache(tmp_path / "new" / "losses")


def test_what_was_not_put_is_none_and_counted(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    cache.put(keys_of(0, 3), losses_of(keys_of(0, 3)))
    found = cache.get([*keys_of(1, 2), keys_of(0)[1], *keys_of(0, 1, TOKEN)])
    assert [value is None for value in found] == [True, True, False, True]
    assert cache.get([]) == []
    assert (cache.num_lookups, cache.num_hits) == (4, 1)


def test_the_last_value_put_under_a_key_counts(tmp_path: Path) -> None:
    cache, (key,) = DiskCache(tmp_path), keys_of(0, 1)
    for value in (1.0, 2.0):
        cache.put([key], [np.array([value], np.float32)])
    (found,) = cache.get([key])
    assert found is not None
    assert found.tolist() == [2.0]


def test_other_types_and_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not float64"):
        DiskCache(tmp_path).put(keys_of(0, 1), [np.zeros(1)])
    with pytest.raises(ValueError, match="max_bytes is 3"):
        DiskCache(tmp_path, max_bytes=3)


def test_a_closed_cache_finds_and_stores_nothing(tmp_path: Path) -> None:
    _filled(tmp_path, 0)
    cache = DiskCache(tmp_path)
    cache.close()
    cache.close()
    cache.put(keys_of(1), losses_of(keys_of(1)))
    assert cache.get(keys_of(0)) == [None] * 100
    assert _num_found(tmp_path, 0, 1) == [100, 0]


# Processes


def test_several_processes_write_and_read_at_once(tmp_path: Path) -> None:
    program = """
cache = DiskCache(sys.argv[1])
cache.register(SAMPLE)
order = list(range(60))
random.Random(sys.argv[2]).shuffle(order)
for at, window in enumerate(order):
    for namespace in (SAMPLE, TOKEN):
        keys = keys_of(window, 20, namespace)
        cache.put(keys, losses_of(keys))
        seen = [key for other in order[: at + 1] for key in keys_of(other, 20, namespace)]
        assert num_right(seen, cache.get(seen)) == len(seen)
    num_right(keys_of(order[-1]), cache.get(keys_of(order[-1])))
"""
    for process in [start(program, tmp_path / "losses", seed) for seed in range(3)]:
        output(process)
    assert _num_found(tmp_path / "losses", *range(60)) == [20] * 60


def test_a_new_path_is_made_by_several_processes_at_once(tmp_path: Path) -> None:
    program = """
sys.stdin.readline()
for number in range(20):
    cache = DiskCache(f"{sys.argv[1]}/{number}")
    cache.put(keys_of(sys.argv[2], 10), losses_of(keys_of(sys.argv[2], 10)))
    cache.close()
"""
    processes = [start(program, tmp_path, number) for number in range(4)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go on\n")
        process.stdin.flush()
    assert [output(process) for process in processes] == [("", "")] * 4
    for number in range(20):
        assert _num_found(tmp_path / str(number), *range(4)) == [10] * 4


def test_killed_while_writing_loses_at_most_the_last_window_and_gives_no_wrong_loss(tmp_path: Path) -> None:
    program = """
cache = DiskCache(sys.argv[1])
cache.register(SAMPLE)
print("ready", flush=True)
for window in range(10**6):
    keys = keys_of(f"{sys.argv[2]} {window}")
    cache.put(keys, losses_of(keys))
    print(window, flush=True)
"""
    draws = random.Random(0)
    bystander = DiskCache(tmp_path)  # has the file open all the time, and must not be locked out by the dead
    num_stored = {}
    for round_number in range(8):
        with start(program, tmp_path, round_number) as process:
            assert process.stdout is not None
            acknowledged = [process.stdout.readline() for _ in range(draws.randrange(1, 20))]
            time.sleep(draws.uniform(0, 0.02))
            process.kill()
            acknowledged += process.stdout.readlines()
        assert process.returncode == -9
        num_stored[round_number] = sum(line.strip().isdigit() for line in acknowledged)
        keys = keys_of(f"bystander {round_number}")
        bystander.put(keys, losses_of(keys))
    bystander.close()
    assert max(num_stored.values()) > 5
    for number, stored in num_stored.items():
        found = _num_found(tmp_path, *(f"{number} {window}" for window in range(stored + 2)))
        assert found[:stored] == [100] * stored
        assert found[stored] in (0, 100)  # told of or not, it is there as a whole, or not at all
        assert found[stored + 1] == 0
    assert _num_found(tmp_path, *(f"bystander {number}" for number in range(8))) == [100] * 8


def test_a_forked_child_and_its_parent_use_the_cache_side_by_side(tmp_path: Path) -> None:
    program = """
cache = DiskCache(sys.argv[1])
cache.put(keys_of("before"), losses_of(keys_of("before")))
child = os.fork()
for window in range(10):
    keys = keys_of(f"{'parent' if child else 'child'} {window}")
    cache.put(keys, losses_of(keys))
    assert num_right(keys_of("before"), cache.get(keys_of("before"))) == 100
if child:
    assert os.waitpid(child, 0)[1] == 0
cache.close()
"""
    output(start(program, tmp_path))
    windows = [f"{name} {window}" for name in ("parent", "child") for window in range(10)]
    assert _num_found(tmp_path, *windows) == [100] * 20


def test_it_grows_and_others_follow(tmp_path: Path) -> None:
    """Token losses of 2.5 KB each, past the first map of 64 MB, while another process has the small file mapped."""
    program = """
cache = DiskCache(sys.argv[1])
for window in range(15):
    keys = keys_of(window, 2000, TOKEN)
    cache.put(keys, losses_of(keys))
"""
    bystander = DiskCache(tmp_path)
    bystander.put(keys_of("own"), losses_of(keys_of("own")))
    output(start(program, tmp_path))
    assert tmp_path.joinpath("data.mdb").stat().st_size > 2**26
    keys = keys_of(14, 2000, TOKEN)
    assert num_right(keys, bystander.get(keys)) == 2000
    bystander.put(keys_of("more"), losses_of(keys_of("more")))
    bystander.close()
    assert _num_found(tmp_path, "own", "more") == [100, 100]


# Space and permissions

_WRITES_UNTIL_FULL = """
cache = DiskCache(sys.argv[1])
cache.register(SAMPLE)
found = []
for window in range(60):
    keys = keys_of(window)
    cache.put(keys, losses_of(keys))
for window in range(60):
    found.append(num_right(keys_of(window), cache.get(keys_of(window))))
print(*found)
"""


def _check_full(process: subprocess.Popen[str], path: Path) -> None:
    printed, logged = output(process)
    found = [int(number) for number in printed.split()]
    stored = found.index(0)
    assert stored > 0
    assert found == [100] * stored + [0] * (60 - stored)
    assert logged.count("no more losses are written") == len(logged.splitlines()) == 1
    assert "Training goes on (told once)" in logged
    assert _num_found(path, *range(60)) == found


def test_where_a_file_may_not_grow_training_goes_on_and_losses_are_read(tmp_path: Path) -> None:
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18))\n"
    _check_full(start(limited + _WRITES_UNTIL_FULL, tmp_path), tmp_path)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 300 KB."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not permitted here")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def test_on_a_full_disk_training_goes_on_and_losses_are_read(small_disk: Path) -> None:
    _check_full(start(_WRITES_UNTIL_FULL, small_disk / "losses"), small_disk / "losses")


def test_on_a_disk_that_was_full_before_training_goes_on(small_disk: Path) -> None:
    small_disk.joinpath("other").write_bytes(bytes(4096 * ((300 * 1024) // 4096)))
    printed, logged = output(start(_WRITES_UNTIL_FULL, small_disk / "losses"))
    assert set(printed.split()) == {"0"}
    assert logged.count("no losses are cached") == len(logged.splitlines()) == 1


def test_what_may_not_be_written_to_is_read(tmp_path: Path) -> None:
    # Root may write anywhere, and others may not enter pytest's folders.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, "losses")
        _filled(path, *range(5))
        for file in path.iterdir():
            file.chmod(0o444)
        path.chmod(0o555)
        become_another = "if os.getuid() == 0:\n    os.setuid(65534)\n"
        printed, logged = output(start(become_another + _WRITES_UNTIL_FULL, path))
        assert printed.split() == ["100"] * 5 + ["0"] * 55
        assert logged.count("it may not be written to") == len(logged.splitlines()) == 1
        printed, logged = output(start(become_another + _WRITES_UNTIL_FULL, path / "new"))
        assert set(printed.split()) == {"0"}
        assert logged.count("Permission denied") == len(logged.splitlines()) == 1
        path.chmod(0o755)


def test_a_bounded_cache_keeps_what_it_has_once_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = DiskCache(tmp_path, max_bytes=2**20)
    with caplog.at_level(logging.WARNING, logger="flowstream"):
        for window in range(300):
            cache.put(keys_of(window), losses_of(keys_of(window)))
    cache.close()
    found = _num_found(tmp_path, *range(300))
    assert tmp_path.joinpath("data.mdb").stat().st_size <= 2**20
    assert 50 < found.index(0) < 200
    assert found == [100] * found.index(0) + [0] * (300 - found.index(0))
    (record,) = caplog.records
    assert "max_bytes=1048576" in record.getMessage()
    assert "flowstream cache prune" in record.getMessage()


# Damage, and what is something else


def test_a_damaged_loss_is_scored_again_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _filled(tmp_path, 0)
    file = tmp_path / "data.mdb"
    content = bytearray(file.read_bytes())
    for key in keys_of(0)[:10]:
        for at in _places(bytes(content), key):
            content[at + 24] ^= 1  # the lowest bit of the loss
    file.write_bytes(content)
    cache = DiskCache(tmp_path)
    with caplog.at_level(logging.WARNING, logger="flowstream"):
        for _ in range(2):
            found = cache.get(keys_of(0))
            assert [value is None for value in found] == [True] * 10 + [False] * 90
            assert num_right(keys_of(0), found) == 90
    (record,) = caplog.records
    assert "10 losses" in record.getMessage()
    cache.put(keys_of(0), losses_of(keys_of(0)))
    cache.close()
    assert _num_found(tmp_path, 0) == [100]


def _places(content: bytes, key: bytes) -> Iterator[int]:
    at = content.find(key)
    while at >= 0:
        yield at
        at = content.find(key, at + 1)


@pytest.mark.parametrize("share", [0.0001, 0.02, 0.3, 0.6, 0.95])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, share: float) -> None:
    _filled(tmp_path, *range(100))
    file = tmp_path / "data.mdb"
    os.truncate(file, int(share * file.stat().st_size))
    with pytest.raises(ValueError, match=rf"{tmp_path}.*damaged.*delete it"):
        DiskCache(tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    tmp_path.joinpath("data.mdb").write_bytes(random.Random(0).randbytes(100_000))
    with pytest.raises(ValueError, match=rf"{tmp_path}.*does not begin as an LMDB file"):
        DiskCache(tmp_path)


def test_a_path_that_is_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("of mine")
    with pytest.raises(ValueError, match="is a file"):
        DiskCache(file)
    with pytest.raises(ValueError, match=r"Not a directory|is a file"):
        DiskCache(file / "losses")
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        DiskCache(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]
    assert file.read_text() == "of mine"


def test_the_lmdb_file_of_another_program_is_refused(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path)) as other, other.begin(write=True) as transaction:
        transaction.put(b"image 1", b"pixels")
    before = tmp_path.joinpath("data.mdb").read_bytes()
    with pytest.raises(ValueError, match="no loss cache of flowstream"):
        DiskCache(tmp_path)
    assert tmp_path.joinpath("data.mdb").read_bytes() == before


def test_a_cache_of_a_later_version_is_refused(tmp_path: Path) -> None:
    _filled(tmp_path, 0)
    with lmdb.open(str(tmp_path)) as later, later.begin(write=True) as transaction:
        transaction.put(b"format", b"flowstream loss cache 2")
    with pytest.raises(ValueError, match=r"flowstream loss cache 2.*reads flowstream loss cache 1"):
        DiskCache(tmp_path)


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = DiskCache("~/losses")
    cache.close()
    assert (tmp_path / "losses" / "data.mdb").exists()


def test_a_cache_deleted_under_a_stream_is_told_and_begun_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, namespace = tmp_path / "losses", Namespace("a", "sample")
    keys = [content_key(namespace, bytes([number])) for number in range(4)]
    values = [np.array([number], np.float32) for number in range(4)]
    old = DiskCache(path)
    old.register(namespace)
    old.put(keys[:2], values[:2])
    shutil.rmtree(path)
    new = DiskCache(path)
    new.register(namespace)
    assert new.get(keys) == [None] * 4
    new.put(keys[2:], values[2:])
    old.put(keys[:1], values[:1])
    assert "its file was deleted, or replaced" in caplog.text
    old.close()
    assert [value is not None for value in new.get(keys)] == [False, False, True, True]
    new.close()
