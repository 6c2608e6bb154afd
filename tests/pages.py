"""What a page may hold: it is read by a parser, and must ask for nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """A page, read: its text, and the tags that it opens. `AssertionError` where tags do not close one another."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(document)
        self.close()
        assert not self._open, f"left open: {self._open}"

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read_alone(document: str) -> Page:
    """The page, once it is known to load nothing from elsewhere."""
    page = Page(document)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
    for name, value in page.attributes:
        if name.rpartition(":")[2] in ("src", "href"):
            assert value.startswith("#"), (name, value)
        assert not name.startswith("on"), name
    assert not re.search(r"@import|url\((?!['\"]?#)", document)
    return page
