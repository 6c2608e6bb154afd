"""Looking into a cache, deleting from it, and shrinking its file, also while other processes use it."""

from __future__ import annotations

from pathlib import Path

import pytest
from disk_caches import SAMPLE, TOKEN, keys_of, losses_of, num_right, output, start

from flowstream.scoring.disk.upkeep import Held, contents, prune
from flowstream.scoring.disk_cache import DiskCache


def _fill(path: Path) -> None:
    cache = DiskCache(path)
    for namespace in (SAMPLE, TOKEN):
        cache.register(namespace)
        for window in range(5):
            cache.put(keys_of(window, namespace=namespace), losses_of(keys_of(window, namespace=namespace)))
    cache.close()


def _num_found(path: Path) -> dict[str, int]:
    cache = DiskCache(path)
    found = {
        namespace.level: sum(
            num_right(keys, cache.get(keys)) for keys in (keys_of(window, namespace=namespace) for window in range(5))
        )
        for namespace in (SAMPLE, TOKEN)
    }
    cache.close()
    return found


def _tokens(namespaces: tuple[Held, ...]) -> tuple[Held, ...]:
    return tuple(held for held in namespaces if held.prefix == TOKEN.prefix)


def test_contents_count_what_was_put(tmp_path: Path) -> None:
    _fill(tmp_path)
    found = contents(tmp_path)
    assert found.num_bytes == tmp_path.joinpath("data.mdb").stat().st_size
    assert 0 <= found.num_free < found.num_bytes
    assert {held.prefix: held.num_entries for held in found.namespaces} == {SAMPLE.prefix: 500, TOKEN.prefix: 500}
    for held in found.namespaces:
        assert held.record.label == "CausalLMScorer LlamaForCausalLM float32"
        assert held.record.fingerprint == "reference"
        assert held.record.created == held.record.used != ""
    sizes = {held.record.level: held.num_bytes for held in found.namespaces}
    assert sizes["sample"] == 500 * (24 + 4 + 5)
    assert sizes["token"] > 500 * 1000


def test_looking_into_a_cache_neither_makes_nor_changes_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no loss cache at"):
        contents(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    _fill(tmp_path)
    before = tmp_path.joinpath("data.mdb").read_bytes()
    contents(tmp_path)
    assert tmp_path.joinpath("data.mdb").read_bytes() == before


def test_pruning_deletes_what_is_chosen_and_shrinks_the_file(tmp_path: Path) -> None:
    _fill(tmp_path)
    tmp_path.joinpath("compact-left").mkdir()  # by one that was killed
    pruned = prune(tmp_path, _tokens)
    assert [held.prefix for held in pruned.namespaces] == [TOKEN.prefix]
    assert pruned.why_not_shrunk is None
    assert pruned.num_bytes_after < pruned.num_bytes_before / 5
    assert pruned.num_bytes_after == tmp_path.joinpath("data.mdb").stat().st_size
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data.mdb", "lock.mdb"]
    assert _num_found(tmp_path) == {"sample": 500, "token": 0}
    _fill(tmp_path)
    assert _num_found(tmp_path) == {"sample": 500, "token": 500}


def test_a_cache_in_use_is_pruned_without_being_replaced_under_its_users(tmp_path: Path) -> None:
    program = """
cache = DiskCache(sys.argv[1])
cache.register(TOKEN)
cache.put(keys_of(0, 50, TOKEN), losses_of(keys_of(0, 50, TOKEN)))
print("ready", flush=True)
sys.stdin.readline()
cache.put(keys_of(1, 100, TOKEN), losses_of(keys_of(1, 100, TOKEN)))
"""
    _fill(tmp_path)
    with start(program, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        file = tmp_path / "data.mdb"
        before = file.stat().st_ino
        pruned = prune(tmp_path, _tokens)
        assert pruned.why_not_shrunk == "it is open in another process"
        assert file.stat().st_ino == before
        assert pruned.num_bytes_after == pruned.num_bytes_before
        assert contents(tmp_path).num_free > pruned.num_bytes_after / 2
        output(process, "go on\n")
    assert _num_found(tmp_path) == {"sample": 500, "token": 100}
    assert {held.record.level: held.record.label for held in contents(tmp_path).namespaces} == {
        "sample": SAMPLE.label,
        "token": TOKEN.label,  # told anew by the one that went on
    }


def test_a_cache_open_in_this_process_keeps_its_file(tmp_path: Path) -> None:
    _fill(tmp_path)
    cache = DiskCache(tmp_path)
    assert prune(tmp_path, _tokens).why_not_shrunk == "it is open in this process"
    cache.put(keys_of(7), losses_of(keys_of(7)))
    cache.close()
    assert _num_found(tmp_path) == {"sample": 500, "token": 0}


def test_processes_that_come_and_go_lose_nothing_while_the_file_is_replaced(tmp_path: Path) -> None:
    """Each opens the cache, maybe just when it is being compacted, writes, finds all it ever wrote, and closes it."""
    program = """
for window in range(40):
    cache = DiskCache(sys.argv[1])
    keys = keys_of(f"{sys.argv[2]} {window}", 20)
    cache.put(keys, losses_of(keys))
    keys = [key for other in range(window + 1) for key in keys_of(f"{sys.argv[2]} {other}", 20)]
    assert num_right(keys, cache.get(keys)) == len(keys), window
    cache.close()
"""
    DiskCache(tmp_path).close()
    processes = [start(program, tmp_path, number) for number in range(3)]
    outcomes = []
    while any(process.poll() is None for process in processes):
        outcomes.append(prune(tmp_path, lambda _: ()).why_not_shrunk)
    for process in processes:
        output(process)
    assert set(outcomes) <= {None, "it is open in another process"}
    (held,) = contents(tmp_path).namespaces
    assert held.num_entries == 3 * 40 * 20
