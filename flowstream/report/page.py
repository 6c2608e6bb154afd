"""The pieces of a self-contained HTML page: its frame, its style, tables and escapes."""

import html
from collections.abc import Iterable, Mapping, Sequence

_STYLE = """
:root { color-scheme: light; }
body {
  font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 66rem; margin: 2rem auto; padding: 0 1rem;
}
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p { max-width: 46rem; }
p.lead { color: #555; margin-top: 0; }
svg { width: 100%; height: auto; font-family: system-ui, sans-serif; }
svg.narrow { display: block; max-width: 34rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { color: #555; font-weight: 600; vertical-align: bottom; }
pre {
  background: #f6f6f4; padding: .7rem .9rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; margin: .3rem 0;
}
.sample { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem; margin-bottom: 1.4rem; }
.sample > * { min-width: 0; }
.sample > pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.sample > p { grid-column: 1 / -1; margin: 0; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole document; nothing in it is loaded from elsewhere."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>{text(title)}</title><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def text(words: object) -> str:
    """Words as text of the page."""
    return html.escape(str(words))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts."""
    cells = "".join(f"<th>{text(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{cells}</tr>{lines}</table></div>"


def pairs(values: Mapping[str, object]) -> str:
    """Names and values in one paragraph."""
    return "<p>" + "; ".join(f"{text(name)}: <code>{text(value)}</code>" for name, value in values.items()) + "</p>"


def narrow(svg: str) -> str:
    """A figure that would be too large at full width."""
    return svg.replace("<svg ", "<svg class='narrow' ", 1)


def sample(caption: str, left: str, right: str) -> str:
    """Two texts side by side under a caption, which is a piece of the page; the texts are escaped."""
    return f"<div class='sample'><p>{caption}</p><pre>{text(left)}</pre><pre>{text(right)}</pre></div>"
