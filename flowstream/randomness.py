"""All randomness of a stream: counter-based, a pure function of (seed, epoch, window, rank). No state."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["permutation", "uniform", "uniforms"]


def uniform(seed: tuple[int, ...], *, use: str = "uniform") -> float:
    """A number in [0, 1) drawn from `seed` = (seed, epoch, window, rank) and `use` alone; equal on every platform.

    `use`: what it is for. Draws of one seed for different uses are independent.

    >>> uniform((0, 1, 2, 3))
    0.6887548916702605
    """
    return (int.from_bytes(_key(use, seed)[:8], "little") >> 11) * 2.0**-53


def uniforms(num: int, seed: tuple[int, ...], *, use: str = "uniforms") -> NDArray[np.float64]:
    """[num] numbers in [0, 1), as in `uniform`: of a longer draw from the same seed they are the first.

    >>> uniforms(2, (0, 1, 2, 3))
    array([0.57745064, 0.93489315])
    """
    # From raw 64-bit words, which numpy promises never to change.
    words = np.random.Philox(key=int.from_bytes(_key(use, seed), "little")).random_raw(num)
    found: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return found


def permutation(num: int, seed: tuple[int, ...], *, use: str = "permutation") -> NDArray[np.int64]:
    """A permutation [num] int64 drawn from `seed` = (seed, epoch, window, rank) and `use` alone, as in `uniform`.

    >>> permutation(8, (0, 1, 2, 3))
    array([2, 7, 1, 3, 5, 0, 4, 6])
    """
    # From raw 64-bit words, which numpy promises never to change; `Generator.permutation` may.
    words = np.random.Philox(key=int.from_bytes(_key(use, seed), "little")).random_raw(num)
    order: NDArray[np.int64] = np.argsort(words, kind="stable")
    return order


def _key(use: str, seed: tuple[int, ...]) -> bytes:
    """128 bits that differ for different uses of one seed, and for tuples of different lengths."""
    return hashlib.blake2b(repr((use, *map(int, seed))).encode(), digest_size=16).digest()
