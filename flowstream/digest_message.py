"""A digest in 8,056 bytes, whatever it holds: 2,000 values of one weight, or 1,000 means with their weights."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowstream.centroids import Centroids, Floats

__all__ = ["MAX_PAIRS", "MAX_VALUES", "NUM_BYTES", "Held", "fits", "packed", "unpacked"]

MAX_VALUES = 2000
"""Values, all of one weight, that fit in a message."""
MAX_PAIRS = MAX_VALUES // 2
"""Means that fit with a weight each."""

_HEADER = struct.Struct("<4sII?xxxQdddd")
_MAGIC = b"fsd2"
NUM_BYTES = _HEADER.size + 4 * MAX_VALUES
_LARGEST = float(np.finfo(np.float32).max)


class Held(NamedTuple):
    """What a message tells of a digest."""

    max_centroids: int
    centroids: Centroids
    num_values: int
    sum_squares: float


def fits(centroids: Centroids, max_values: int) -> bool:
    """Whether all centroids go into a message, and are at most `max_values`."""
    most = MAX_VALUES if _have_one_weight(centroids.weights) else MAX_PAIRS
    return centroids.means.size <= min(max_values, most)


def packed(held: Held) -> bytes:
    """The message, little-endian: header, then values, or means and weights, in float32.

    Values are rounded to float32 (losses are that already), weights to 24 bits: integers up to 2²⁴ times a power of
    two are exact. A weight below 1e-45 of the largest is left out.
    """
    means, weights, minimum, maximum = held.centroids
    body: NDArray[np.float32] = np.zeros(MAX_VALUES, dtype="<f4")
    if not _have_one_weight(weights):
        unit = _unit_of(float(weights.max()))
        relative = (weights / unit).astype(np.float32)
        means, weights = means[relative > 0], relative[relative > 0] * np.float64(unit)
    in_pairs = not _have_one_weight(weights)  # they may have, now that they are rounded
    if in_pairs:
        body[MAX_PAIRS : MAX_PAIRS + means.size] = weights / unit
    elif weights.size:
        unit = float(weights[0])
    else:
        unit = 0.0
    body[: means.size] = _rounded(means)
    # Rounded like the means, the extremes stay around them: rounding keeps order.
    extremes = _rounded(np.array([minimum, maximum])).tolist() if minimum <= maximum else (minimum, maximum)
    sums = (held.num_values, held.sum_squares, *extremes, unit)
    return _HEADER.pack(_MAGIC, held.max_centroids, means.size, in_pairs, *sums) + body.tobytes()


def unpacked(message: bytes) -> Held:
    """What is in a message of `packed`.

    Raises:
        ValueError: bytes that are no such message.
    """
    if message[:4] != _MAGIC:
        raise ValueError(f"these {len(message)} bytes are not a digest's message")
    if len(message) != NUM_BYTES:
        raise ValueError(f"a digest's message has {NUM_BYTES} bytes, got {len(message)}")
    _, max_centroids, size, in_pairs, num_values, sum_squares, minimum, maximum, unit = _HEADER.unpack_from(message)
    body = np.frombuffer(message, dtype="<f4", offset=_HEADER.size)
    means: Floats = body[:size].astype(np.float64)
    if in_pairs:
        weights = body[MAX_PAIRS : MAX_PAIRS + size] * np.float64(unit)
    else:
        weights = np.full(size, unit)
    return Held(max_centroids, Centroids(means, weights, minimum, maximum), num_values, sum_squares)


def _have_one_weight(weights: Floats) -> bool:
    return not weights.size or bool((weights == weights[0]).all())


def _unit_of(weight: float) -> float:
    """The power of two that a weight is 1 to 2 times, once it is rounded to 24 bits."""
    mantissa, exponent = math.frexp(weight)
    return math.ldexp(1.0, exponent - int(float(np.float32(mantissa)) < 1))


def _rounded(values: Floats) -> NDArray[np.float32]:
    """In float32, and finite; a zero without its sign."""
    return np.clip(values, -_LARGEST, _LARGEST).astype(np.float32) + np.float32(0)
