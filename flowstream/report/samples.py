"""The easiest and the hardest samples, as they stand in a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flowstream.report.extremes import SampleNote
from flowstream.report.page import sample, text


def side_by_side(title: str, notes: Sequence[SampleNote]) -> Iterable[str]:
    """Prompt and response of each sample, under its place, loss and weight; nothing where there are none."""
    if notes:
        yield f"<h3>{text(title)}</h3>"
    for note in notes:
        caption = f"{text(note.place)}: loss {number(note.loss)} nats, weight {number(note.weight)}"
        yield sample(caption, note.prompt, note.response)


def number(value: float) -> str:
    """A number to four digits, as a table shows it."""
    return f"{value:.4g}" if value == value else "–"
