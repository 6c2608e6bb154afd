"""What the stream asks of a loader: to be begun, pulled from, and taken up again where it stood."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

Snapshot: TypeAlias = dict[str, Any]
"""Plain values and tensors, as `torch.load(weights_only=True)` reads them."""


class Source(Protocol):
    """A loader whose position can be told and taken up again. Owns the loader's iterator."""

    @property
    def kind(self) -> str:
        """How it is resumed, in a word. A snapshot is for sources of its own kind."""

    @property
    def caveat(self) -> str:
        """What a resume does not give back exactly, with the remedy; empty where it gives back everything."""

    def start(self) -> None:
        """Begin the next epoch. The loader is not asked for anything before the first `pull`."""

    def pull(self) -> Any:
        """The next batch; `StopIteration` at the end of the epoch; whatever the loader raises."""

    def snapshot(self) -> Snapshot:
        """Where the loader stands after the batches pulled so far: a copy, that no later pull changes."""

    def restore(self, snapshot: Snapshot) -> None:
        """Begin an epoch at that place.

        Raises:
            ValueError: the snapshot is of a loader that was built in another way.
            RuntimeError: the loader ends before that place.
        """

    def legacy(self) -> Snapshot:
        """What an epoch leaves to the next one: a generator's state, say. Asked for after the last batch."""

    def inherit(self, legacy: Snapshot) -> None:
        """Let the next `start` begin what follows the epoch that left this, if it left anything."""

    def close(self) -> None:
        """Let go of the loader's iterator."""
