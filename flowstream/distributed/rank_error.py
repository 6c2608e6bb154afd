"""The error that names the ranks that the others wait for, and the verdict it comes from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["RankError", "Verdict"]


class RankError(RuntimeError):
    """A rank that the others wait for has died, stalled, failed or gone another way."""

    ranks: tuple[int, ...]
    """The ranks that it is about, as far as can be told."""

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)

    def __reduce__(self) -> tuple[type[RankError], tuple[str, tuple[int, ...]]]:
        return type(self), (str(self), self.ranks)


@dataclass(frozen=True)
class Verdict:
    """What one rank found out for all of them."""

    text: str
    ranks: tuple[int, ...] = ()
    is_configuration: bool = False
    """Whether the ranks are all there, but configured differently."""

    def error(self, where: str = "") -> Exception:
        """A new one, to raise."""
        text = f"{where}{self.text}"
        return ValueError(text) if self.is_configuration else RankError(text, self.ranks)
