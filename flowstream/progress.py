"""What a user sees of a stream: a bar while the first window is scored, then one line a window."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from flowstream.making import Window
from flowstream.read_ahead import ReadAhead

_Show = Callable[[str, float, float], None]


class Progress:
    """Writes to the terminal through rich: a bar only while `next()` makes the first window wait, then plain lines."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._is_line_open = False
        self._next_at = 0.0

    def first_window(self, window: Window, reader: ReadAhead) -> None:
        """Pull and score the first window under a bar: before the first step the stream would look hung."""
        with self._bar("flowstream: pulling the first window") as advance:
            while window.gathers and reader.pull():
                window.advance(1e-9)
                advance("flowstream: pulling the first window", reader.next_ordinal, reader.next_ordinal + 1)
            for percent in range(100):
                window.advance(percent / 100)
                advance("flowstream: scoring the first window", percent, 100)

    def line(self, epoch: int, window: int, metrics: Mapping[str, float]) -> None:
        """Show the window that goes into delivery."""
        text = (
            f"flowstream epoch {epoch} window {window}: "
            f"τ {metrics['flow/tau']:.4g} ± {metrics['flow/tau_error']:.2g} nats, "
            f"mean weight {metrics['flow/mean_weight']:.2f}, ESS {metrics['flow/ess']:.0%}, "
            f"{metrics['flow/samples_seen']:.0f} samples, scoring {metrics['flow/score_seconds']:.1f} s"
        )
        if not math.isnan(metrics["flow/window_seconds"]):
            text += f", {metrics['flow/window_seconds']:.1f} s a window"
        if self._console.is_terminal:
            self._console.print(Text(text, style="cyan"), end="\r", overflow="ellipsis", no_wrap=True, crop=True)
            self._is_line_open = True
        elif time.monotonic() >= self._next_at:  # in a log every line stays
            self._next_at = time.monotonic() + 30
            self._console.print(text, soft_wrap=True)

    def close(self) -> None:
        """Leave the line, at the end of an epoch."""
        if self._is_line_open:
            self._console.print()
            self._is_line_open = False

    @contextlib.contextmanager
    def _bar(self, title: str) -> Iterator[_Show]:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        bar = Bar(*columns, console=self._console, transient=True)
        try:
            bar.start()
        except LiveError:
            yield lambda description, done, total: None
            return
        task = bar.add_task(title, total=None)

        def show(description: str, done: float, total: float) -> None:
            bar.update(task, description=description, completed=done, total=total)

        try:
            yield show
        finally:
            bar.stop()
