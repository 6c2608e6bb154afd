"""Figures as SVG that stands in a page and needs nothing from outside."""

from __future__ import annotations

import io
import re
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = {
    "black": "#222222",
    "blue": "#0072b2",
    "green": "#009e73",
    "vermilion": "#d55e00",
    "purple": "#cc79a7",
    "orange": "#e69f00",
    "sky": "#56b4e9",
}
"""Okabe and Ito's, which the colour-blind can tell apart."""


def check_matplotlib(extra: str = "train") -> None:
    """`ValueError` with the remedy where there is nothing to draw with. Call it before the work, not after it."""
    if find_spec("matplotlib") is None:
        raise ValueError(f"the report draws with matplotlib: pip install 'flowstream[{extra}]'")


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element: no prologue, no metadata, no fixed size, the page's own fonts."""
    import matplotlib

    target = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "flowstream"}), warnings.catch_warnings():
        # Letters that matplotlib's font lacks are in the reader's, which draws them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = target.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    return re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r' height="[^"]*pt"', "", drawn, count=1), count=1)


def label(name: str) -> str:
    """A user's name as it stands, where matplotlib would read a formula or hide it from a legend."""
    plain = name.replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain
