"""Confidence intervals of a mean over few seeds, by Student's t."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds, and how far it may be off: mean ± half_width covers the true one with 95 % confidence."""

    mean: float
    """NaN without a value."""
    half_width: float
    """NaN below two values."""
    num: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Interval":
        """Over those values that are numbers."""
        found = [value for value in values if math.isfinite(value)]
        if len(found) < 2:
            return cls(mean=found[0] if found else math.nan, half_width=math.nan, num=len(found))
        error = statistics.stdev(found) / math.sqrt(len(found))
        half_width = student(0.95, len(found) - 1) * error
        return cls(mean=statistics.fmean(found), half_width=half_width, num=len(found))

    @property
    def side(self) -> int:
        """1: the whole interval lies above 0; -1: below; 0: neither, or there is none."""
        if self.mean - self.half_width > 0:
            return 1
        return -1 if self.mean + self.half_width < 0 else 0


def student(confidence: float, freedom: int) -> float:
    """The t that |T| stays below with a probability, for Student's distribution of so many degrees of freedom."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| < t): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = freedom % 2
    term = cosine if is_odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if is_odd else 2, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total
