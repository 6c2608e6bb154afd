"""The cache of losses in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowstream.scoring.cache import LossCache, content_key, row_key


def _key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def test_what_was_put_comes_back_to_the_bit() -> None:
    cache = LossCache()
    values = [np.array([1 / 3], dtype=np.float32), np.array([np.nan, np.inf, 0.1], dtype=np.float16)]
    cache.put([_key(1), _key(2)], values)
    found = cache.get([_key(2), _key(3), _key(1)])
    assert found[1] is None
    assert found[0] is not None
    assert found[2] is not None
    assert found[0].tobytes() == values[1].tobytes()
    assert found[0].dtype == np.float16
    assert found[2].tobytes() == values[0].tobytes()
    assert (cache.num_lookups, cache.num_hits, len(cache)) == (3, 2, 2)


def test_a_stored_value_is_a_copy_that_cannot_be_written() -> None:
    cache = LossCache()
    value = np.ones(3, dtype=np.float32)
    cache.put([_key(1)], [value])
    value[:] = 7
    (found,) = cache.get([_key(1)])
    assert found is not None
    assert found.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 2


def test_memory_is_bounded_and_the_oldest_go_first() -> None:
    cache = LossCache(max_bytes=10_000)
    for number in range(100):
        cache.put([_key(number)], [np.zeros(10, dtype=np.float32)])
        assert cache.num_bytes <= 10_000
    kept = [number for number in range(100) if cache.get([_key(number)])[0] is not None]
    assert kept == list(range(100 - len(kept), 100))
    assert 20 < len(kept) < 40
    assert cache.num_evicted == 100 - len(kept)


def test_replacing_an_entry_counts_it_once() -> None:
    cache = LossCache()
    cache.put([_key(1)], [np.zeros(1000, dtype=np.float32)])
    cache.put([_key(1)], [np.zeros(1, dtype=np.float32)])
    assert len(cache) == 1
    assert cache.num_bytes < 1000


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    cache = LossCache(max_bytes=1000)
    cache.put([_key(1), _key(2)], [np.zeros(1), np.zeros(1000)])
    assert [value is None for value in cache.get([_key(1), _key(2)])] == [False, True]


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        LossCache(max_bytes=-1)


def test_keys_tell_namespaces_contents_and_rows_apart() -> None:
    ids = np.arange(4)
    keys = [
        content_key(b"a", ids, ids),
        content_key(b"b", ids, ids),
        content_key(b"a", ids, ids[::-1]),
        content_key(b"a", ids[:2], ids[:2]),
        row_key(b"a", 1),
        row_key(b"a", "1"),
        row_key(b"a", 1, index=1),
        row_key(b"a", 1, count=2),
        row_key(b"b", 1),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 16 for key in keys)
    assert row_key(b"a", torch.tensor(1)) == row_key(b"a", np.int64(1)) == row_key(b"a", 1)
