"""Who is to blame, in words: from what is known of the ranks to a verdict that tells what to do."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from flowstream.distributed.rank_error import Verdict

__all__ = ["SILENT", "absent", "late", "lost", "storeless"]

SILENT = "has not called next()"
"""The fate of a rank of which nothing is seen or heard."""

_CAUSES = (
    "the stream is wrapped so that only one rank pulls from it (accelerator.prepare of a DataLoader over the stream "
    "makes a DataLoaderDispatcher: prepare the inner loader, then wrap it in a FlowStream); or it is iterated on some "
    "ranks only, as under `if rank == 0`; or these ranks have died, or do something long before their first next(); "
    "or they built another number of streams. All ranks must build the same streams and iterate them together"
)
_RESTART = "restart all ranks from their last checkpoint"
_SEARCH = f"look into its output for the cause (an exception, out of memory, ...), then {_RESTART}"


def absent(names: Sequence[str], missing: Sequence[int], fates: Mapping[int, str], patience: float) -> Verdict:
    """Of ranks that never came: of those with a fate, if there are any, since the others may only be slow.

    `names`: of all ranks; `fates`: what became of them, where that is known.
    """
    if fates:
        told = "; ".join(f"{names[rank]} {fate}" for rank, fate in sorted(fates.items()))
        return Verdict(f"{told}, before all ranks had come: {'; '.join(_remedies(fates))}", tuple(sorted(fates)))
    text = f"{_told(names, missing)} did not come, of {len(names)} ranks that wait {patience:g} s for each other"
    return Verdict(f"{text}: {_CAUSES}", tuple(missing))


def late(names: Sequence[str], missing: Sequence[int], seconds: float, patience: float) -> str:
    """A warning of ranks that have not built their stream. `patience`: seconds before it is an error."""
    return (
        f"{_told(names, missing)} did not come in {seconds:g} s to build the stream together with the other ranks, "
        f"which wait up to {patience:g} s: they do something long before, such as loading a model; or have died; or "
        "build no stream, as under `if rank == 0`, or another number of them. All ranks must build the same streams"
    )


def lost(
    names: Sequence[str],
    fates: Mapping[int, str],
    places: Mapping[int, tuple[str, str] | None],
    reason: str,
    timeout: float,
) -> Verdict:
    """Of ranks that came, but not to a meeting.

    Args:
        fates: what became of them; none, if nothing is wrong with any.
        places: where they were last, and at what time, if that is known.
        reason: why the meeting was given up.
    """
    if not fates:
        return Verdict(f"all ranks are here, but the connection between them failed ({reason}): {_RESTART}")
    told = []
    for rank, fate in sorted(fates.items()):
        place = places[rank]
        if place is None:
            where = "(it has not called next() at all)"
        else:
            where = f"since {place[1]} ({place[0]})" if fate == SILENT else f"(last seen at {place[1]}: {place[0]})"
        told.append(f"{names[rank]} {fate} {where}")
    return Verdict(f"{'; '.join(told)} ({reason}): {'; '.join(_remedies(fates, timeout))}", tuple(sorted(fates)))


def storeless(names: Sequence[str], fates: Mapping[int, str], keepers: Collection[int], store: str) -> Verdict:
    """Where the store says nothing, and with it the others: only who can be seen to be gone is named.

    Args:
        keepers: ranks that may have kept the store. They are the first cause: others may have left because of that.
        store: what is wrong with it.
    """
    text = f"the store of torch.distributed {store}"
    if not fates:
        return Verdict(
            f"{text}: who keeps it, global rank 0 or the launcher, has ended, was stopped, or cannot be reached; look "
            f"into its output for the cause, then {_RESTART}"
        )
    # What was stopped was so before: nobody is by the loss of a store. Others may have ended because of it.
    first = [rank for rank in sorted(fates) if "stopped" in fates[rank]]
    first = first or [rank for rank in sorted(fates) if rank in keepers] or sorted(fates)
    told, others = (
        "; ".join(f"{names[rank]} {fates[rank]}" for rank in ranks)
        for ranks in (first, sorted(fates.keys() - {*first}))
    )
    others = f"; {others}, maybe because of that" if others else ""
    return Verdict(f"{told}, and {text}{others}: {_SEARCH}", tuple(first))


def _told(names: Sequence[str], ranks: Sequence[int]) -> str:
    """A long list is cut."""
    return ", ".join(names[rank] for rank in ranks[:8]) + f" and {len(ranks) - 8} more" * (len(ranks) > 8)


def _remedies(fates: Mapping[int, str], timeout: float = 0.0) -> list[str]:
    """What to do about such fates."""
    remedies = {
        "has not called": f"it has died with its node, is stuck, or does what takes longer than timeout={timeout:g} s, "
        f"such as an evaluation on one rank (give a larger timeout); else {_RESTART}",
        "its stream$": "if no error was the cause, let all ranks take as many batches (none may `break` alone), and "
        "close together",
        "died|ended|after": _SEARCH,
        "stopped": f"find out who stopped it, then {_RESTART}",
    }
    return [remedy for words, remedy in remedies.items() if any(re.search(words, fate) for fate in fates.values())]
