"""Packages that only some commands need: found missing before the work, not after hours of it."""

from __future__ import annotations

from importlib.util import find_spec


def check_installed(*names: str) -> None:
    """`ValueError` with the remedy where a package of `flowstream[train]` is not there. Nothing is imported."""
    if missing := [name for name in names if find_spec(name) is None]:
        verb = "is" if len(missing) == 1 else "are"
        raise ValueError(f"{' and '.join(missing)} {verb} not installed: pip install 'flowstream[train]'")
