"""Who is to blame, in words: from what is known of the ranks to a verdict that tells what to do."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from flowstream.distributed.rank_error import Verdict

__all__ = ["SILENT", "absent", "lost", "storeless"]

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


def absent(names: Sequence[str], missing: Sequence[int], fates: Mapping[int, str | None], patience: float) -> Verdict:
    """Of ranks that never came. `names`: of all ranks; `fates`: what became of them, where that is known."""
    which = [names[rank] + (f" ({fates[rank]})" if fates.get(rank) else "") for rank in missing[:8]]
    text = ", ".join(which) + f" and {len(missing) - 8} more" * (len(missing) > 8)
    text += f" did not come, of {len(names)} ranks that wait {patience:g} s for each other: {_CAUSES}"
    return Verdict(text, tuple(missing))


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
    remedies = {
        f"it has died with its node, is stuck, or does what takes longer than timeout={timeout:g} s, such as an "
        f"evaluation on one rank (give a larger timeout); else {_RESTART}": (SILENT,),
        "if no error closed it, let all ranks take as many batches, and close together": ("closed",),
        _SEARCH: ("died", "ended", "after"),
        f"find out who stopped it, then {_RESTART}": ("stopped",),
    }
    needed = [
        text for text, words in remedies.items() if any(word in fate for fate in fates.values() for word in words)
    ]
    told = []
    for rank, fate in sorted(fates.items()):
        place = places[rank]
        if place is None:
            where = "(it has not called next() at all)"
        else:
            where = f"since {place[1]} ({place[0]})" if fate == SILENT else f"(last seen at {place[1]}: {place[0]})"
        told.append(f"{names[rank]} {fate} {where}")
    return Verdict(f"{'; '.join(told)} ({reason}): {'; '.join(needed)}", tuple(sorted(fates)))


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
    first = tuple(rank for rank in sorted(fates) if rank in keepers)
    told = "; ".join(f"{names[rank]} {fates[rank]}" for rank in [*first, *sorted(fates.keys() - {*first})])
    return Verdict(f"{told}, and {text}: {_SEARCH}", first or tuple(sorted(fates)))
