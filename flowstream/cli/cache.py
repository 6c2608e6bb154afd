"""`flowstream cache info|prune`: what a loss cache on disk holds, and taking namespaces out of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from flowstream.scoring.disk.upkeep import Held


@dataclass(frozen=True, kw_only=True)
class Info:
    """Show what a loss cache holds: a line a namespace, that is a reference, a scorer and a level."""

    path: tyro.conf.Positional[Path]
    """Folder of the cache, as given to FlowStream(cache=...)."""

    def run(self) -> None:
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table

        from flowstream.scoring.disk.upkeep import contents

        found = contents(self.path)
        table = Table(box=SIMPLE, padding=(0, 0))
        table.add_column("namespace", no_wrap=True)
        table.add_column("scorer, reference, dtype", min_width=16)
        table.add_column("level", no_wrap=True)
        for name in ("losses", "size", "created", "last used"):
            table.add_column(name, justify="right", no_wrap=True)
        for held in found.namespaces:
            record = held.record
            size = _megabytes(held.num_bytes)
            first = (held.prefix.hex()[:8], record.label or "?", record.level or "?", f"{held.num_entries:,}", size)
            table.add_row(*first, record.created[:10] or "?", record.used[:10] or "?")
        console = Console()
        console.print(table)
        print(f"{self.path}: {_megabytes(found.num_bytes)}, of which {_megabytes(found.num_free)} free")


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Delete namespaces from a loss cache, and shrink its file.

    Deleted are those that meet every condition given. Other processes may go on using the cache; the file then keeps
    its size, and they fill what is free.
    """

    path: tyro.conf.Positional[Path]
    """Folder of the cache."""
    older_than_days: int | None = None
    """Those that were last used more than so many days ago."""
    keep_last: int | None = None
    """All but the so many that were last used."""
    namespace: str | None = None
    """The one whose name, as `flowstream cache info` shows it, begins so."""
    dry_run: bool = False
    """Only say what would be deleted."""

    def run(self) -> None:
        if self.older_than_days is None and self.keep_last is None and self.namespace is None:
            raise ValueError("say what to delete: --older-than-days, --keep-last or --namespace")
        if min(self.older_than_days or 0, self.keep_last or 0) < 0:
            raise ValueError("--older-than-days and --keep-last count from 0")
        from flowstream.scoring.disk.upkeep import contents, prune

        if self.dry_run:
            chosen = self._chosen(contents(self.path).namespaces)
            print(f"would delete {_listed(chosen)}")
            return
        pruned = prune(self.path, self._chosen)
        print(f"deleted {_listed(pruned.namespaces)}")
        print(f"{self.path}: {_megabytes(pruned.num_bytes_before)} before, {_megabytes(pruned.num_bytes_after)} now")
        if pruned.why_not_shrunk is not None:
            print(f"the file was not shrunk ({pruned.why_not_shrunk}): what is free in it is filled first")

    def _chosen(self, namespaces: tuple[Held, ...]) -> tuple[Held, ...]:
        chosen = namespaces[self.keep_last or 0 :]
        if self.older_than_days is not None:
            limit = (date.today() - timedelta(days=self.older_than_days)).isoformat()
            chosen = tuple(held for held in chosen if held.record.used < limit)
        if self.namespace is not None:
            if not any(held.prefix.hex().startswith(self.namespace.lower()) for held in namespaces):
                names = ", ".join(held.prefix.hex() for held in namespaces)
                raise ValueError(f"no namespace begins with {self.namespace!r}; there are: {names or 'none'}")
            chosen = tuple(held for held in chosen if held.prefix.hex().startswith(self.namespace.lower()))
        return chosen


@dataclass(frozen=True)
class Cache:
    """Look into a loss cache on disk, or delete from it."""

    action: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[Info, tyro.conf.subcommand("info")] | Annotated[Prune, tyro.conf.subcommand("prune")]
        ]
    ]

    def run(self) -> None:
        self.action.run()


def _listed(namespaces: tuple[Held, ...]) -> str:
    if not namespaces:
        return "nothing"
    return ", ".join(
        f"{held.prefix.hex()} ({held.record.label or '?'}, {held.num_entries:,} losses)" for held in namespaces
    )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MB"
