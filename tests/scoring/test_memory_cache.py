"""The cache of losses in memory."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from flowstream.scoring.memory_cache import MemoryCache


def _key(number: int) -> bytes:
    return number.to_bytes(24, "little")


def test_what_was_put_comes_back_to_the_bit() -> None:
    cache = MemoryCache()
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
    cache = MemoryCache()
    value = np.ones(3, dtype=np.float32)
    cache.put([_key(1)], [value])
    value[:] = 7
    (found,) = cache.get([_key(1)])
    assert found is not None
    assert found.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 2


def test_once_full_it_keeps_what_it_has_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    cache = MemoryCache(max_bytes=10_000)
    with caplog.at_level(logging.WARNING, logger="flowstream"):
        for _ in range(2):
            for number in range(100):
                cache.put([_key(number)], [np.zeros(10, dtype=np.float32)])
    kept = [number for number in range(100) if cache.get([_key(number)])[0] is not None]
    assert cache.num_bytes <= 10_000
    assert kept == list(range(len(kept)))
    assert 20 < len(kept) == len(cache) < 40
    (record,) = caplog.records
    assert f"{len(kept)} samples" in record.getMessage()
    assert "cache='losses'" in record.getMessage()


def test_epochs_over_more_than_fits_find_what_was_kept() -> None:
    cache = MemoryCache(max_bytes=10_000)
    for _ in range(3):
        cache.num_hits = 0
        for number in range(100):
            if cache.get([_key(number)])[0] is None:
                cache.put([_key(number)], [np.zeros(10, dtype=np.float32)])
    assert cache.num_hits == len(cache) > 20


def test_replacing_an_entry_counts_it_once() -> None:
    cache = MemoryCache()
    cache.put([_key(1)], [np.zeros(1000, dtype=np.float32)])
    cache.put([_key(1)], [np.zeros(1, dtype=np.float32)])
    assert len(cache) == 1
    assert cache.num_bytes < 1000


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    cache = MemoryCache(max_bytes=1000)
    cache.put([_key(1), _key(2)], [np.zeros(1), np.zeros(1000)])
    assert [value is None for value in cache.get([_key(1), _key(2)])] == [False, True]


def test_a_closed_cache_is_empty() -> None:
    cache = MemoryCache()
    cache.put([_key(1)], [np.zeros(1)])
    cache.close()
    assert cache.get([_key(1)]) == [None]


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        MemoryCache(max_bytes=-1)
