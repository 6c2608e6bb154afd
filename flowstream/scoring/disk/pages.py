"""An LMDB file read as the pages it is made of, to find damage before it is mapped.

LMDB trusts its file. Pages that are missing or whose offsets are wrong make it read beyond the map, which ends the
process (SIGBUS, SIGSEGV) where an error could have been told. So all pages that a snapshot reaches are looked at first,
for what LMDB relies on: about 0.1 s for a million losses. What a page says of keys and losses is left to the checksum
of each entry.

The layout is that of LMDB 0.9 (data version 1), mdb.c: a page's header is its number (u64), pad, flags, and the bounds
of its free space (u16 each); then u16 offsets of nodes. A node is a size or child (u16 low, u16 high), flags, size of
key (u16 each), key, value.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAGIC = 0xBEEFC0DE
_VERSION = 1
_HEADER = 16
_BRANCH, _LEAF, _OVERFLOW, _META = 1, 2, 4, 8
_BIG, _TREE = 1, 2
"""Flags of a leaf's node: its value stands on overflow pages; it is the record of another tree."""
_NO_ROOT = 2**64 - 1
_TREE_RECORD = struct.Struct("<IHHQQQQQ")
_ROOT = 5 + 2
"""Where in such a record the root is; the depth is at 2."""
_CHUNK = 2048
"""Pages looked at together."""

Array = NDArray[Any]


class DamageError(ValueError):
    """The file is not one that LMDB may be let loose on; the message says what is wrong with it."""


@dataclass(frozen=True)
class Meta:
    """One of the two pages at the beginning that say where everything is."""

    page_size: int
    roots: tuple[tuple[int, int], ...]
    """(root, depth) of the tree of free pages, and of the main one."""
    transaction: int
    """Number of the transaction that wrote it."""


def read_metas(file: int) -> list[Meta] | None:
    """Both meta pages of an open file; `None` if it is empty, or of a later LMDB. `DamageError` if there are none."""
    begin = os.pread(file, 4096, 0)
    if not begin:
        return None
    if len(begin) < 192 or struct.unpack_from("<I", begin, _HEADER)[0] != _MAGIC:
        raise DamageError("it does not begin as an LMDB file does")
    if struct.unpack_from("<I", begin, _HEADER + 4)[0] != _VERSION:
        return None
    page_size = struct.unpack_from("<I", begin, _HEADER + 24)[0]
    if page_size not in {2**n for n in range(8, 17)}:
        raise DamageError(f"its pages would have {page_size} bytes")
    return [_meta(os.pread(file, 192, number * page_size), page_size) for number in range(2)]


def check_pages(file: int, meta: Meta, max_bytes: int) -> None:
    """`DamageError` unless all pages that `meta` reaches are in the file, and nodes are within their pages.

    The snapshot must not change meanwhile: hold a read transaction. Where a tree's leaves take more than `max_bytes`,
    only that they are in the file is looked at.
    """
    num_pages = os.fstat(file).st_size // meta.page_size
    trees = list(meta.roots)
    while trees:
        root, depth = trees.pop()
        if root == _NO_ROOT:
            continue
        if not 1 <= depth <= 32:
            raise DamageError(f"a tree would be {depth} pages deep")
        numbers: Array = np.array([root], dtype=np.uint64)
        for level in range(depth):
            kind = _LEAF if level == depth - 1 else _BRANCH
            children = []
            if kind == _LEAF and len(numbers) * meta.page_size > max_bytes:
                _check_numbers(numbers, num_pages)
                continue
            for pages in _pages(file, numbers, num_pages, meta.page_size, kind):
                if kind == _BRANCH:
                    children.append(pages.children())
                else:
                    _check_overflow(file, pages, num_pages)
                    trees += pages.trees()
            numbers = np.concatenate(children) if children else numbers[:0]
            if len(numbers) > num_pages:
                raise DamageError("a page is reached twice")


@dataclass(frozen=True)
class _Pages:
    """Some pages of one kind, with where their nodes are."""

    bytes: Array
    """[m, page size] uint8."""
    at: Array
    """[n] index of each node into the flattened bytes."""
    room: Array
    """[n] bytes from there to the end of the page."""

    def words(self, field: int) -> Array:
        """[n] the u16 at place `field` of each node."""
        words: Array = self.bytes.reshape(-1).view("<u2")[self.at // 2 + field]
        return words.astype(np.int64)

    def children(self) -> Array:
        numbers: Array = self.words(0) | self.words(1) << 16 | self.words(2) << 32
        return numbers.astype(np.uint64)

    def check_sizes(self, kind: int) -> None:
        """`DamageError` if a node goes beyond its page."""
        size = 8 + self.words(3)
        if kind == _LEAF:
            flags = self.words(2)
            if (flags & ~(_BIG | _TREE)).any():
                raise DamageError("a node has flags that are not used here")
            size += np.where(flags & _BIG, 8, self.words(0) | self.words(1) << 16)
        if (size > self.room).any():
            raise DamageError("a node goes beyond its page")

    def trees(self) -> list[tuple[int, int]]:
        """(root, depth) of the trees whose records stand here."""
        flags = self.words(2)
        found = []
        for at, key_size in zip(self.at[flags & _TREE > 0], self.words(3)[flags & _TREE > 0], strict=True):
            record = self.bytes.reshape(-1)[at + 8 + key_size :][: _TREE_RECORD.size].tobytes()
            if len(record) < _TREE_RECORD.size:
                raise DamageError("the record of a tree goes beyond its page")
            found.append(_tree(record))
        return found

    def overflow(self) -> tuple[Array, Array]:
        """First overflow page and number of bytes, of each value that stands there."""
        big = self.words(2) & _BIG > 0
        where = (self.at + 8 + self.words(3))[big]
        number = self.bytes.reshape(-1)[where[:, None] + np.arange(8)].copy().view("<u8").reshape(-1)
        return number, (self.words(0) | self.words(1) << 16)[big]


def _pages(file: int, numbers: Array, num_pages: int, page_size: int, kind: int) -> Iterator[_Pages]:
    """The pages of these numbers, checked, some at a time."""
    _check_numbers(numbers, num_pages)
    for begin in range(0, len(numbers), _CHUNK):
        some = numbers[begin : begin + _CHUNK]
        raw = b"".join([os.pread(file, page_size, number * page_size) for number in some.tolist()])
        if len(raw) != len(some) * page_size:
            raise DamageError("it has become shorter")
        pages = np.frombuffer(raw, dtype=np.uint8).reshape(-1, page_size)
        words = pages.view("<u2")
        lower, upper = words[:, 6].astype(np.int64), words[:, 7].astype(np.int64)
        if page_size == 2**16:
            upper = np.where(upper == 0, page_size, upper)
        wrong = (pages[:, :8].copy().view("<u8")[:, 0] != some) | (words[:, 5] != kind)
        wrong |= (lower < _HEADER) | (lower > upper) | (upper > page_size) | (lower % 2 > 0)
        num_nodes = (lower - _HEADER) // 2
        wrong |= num_nodes < (2 if kind == _BRANCH else 1)
        if wrong.any():
            raise DamageError(f"page {int(some[wrong][0])} is not what it should be")
        page = np.repeat(np.arange(len(some)), num_nodes)
        slot = np.arange(len(page)) - np.repeat(np.cumsum(num_nodes) - num_nodes, num_nodes)
        offset = words[page, _HEADER // 2 + slot].astype(np.int64)
        if ((offset < upper[page]) | (offset > page_size - 8) | (offset % 2 > 0)).any():
            raise DamageError("a node lies outside its page")
        found = _Pages(pages, page * page_size + offset, page_size - offset)
        found.check_sizes(kind)
        yield found


def _check_numbers(numbers: Array, num_pages: int) -> None:
    if (numbers >= num_pages).any() or (numbers < 2).any():
        raise DamageError(f"it refers to page {int(numbers.max())}, and has {num_pages}: was it cut off?")


def _check_overflow(file: int, pages: _Pages, num_pages: int) -> None:
    page_size = pages.bytes.shape[1]
    for number, num_bytes in zip(*map(np.ndarray.tolist, pages.overflow()), strict=True):
        needed = -(-(_HEADER + num_bytes) // page_size)
        if not 2 <= number <= num_pages - needed:
            raise DamageError(f"it refers to page {number + needed - 1}, and has {num_pages}: was it cut off?")
        own, _, flags, count = struct.unpack("<QHHI", os.pread(file, _HEADER, number * page_size))
        if own != number or flags != _OVERFLOW or count < needed:
            raise DamageError(f"page {number} is not what it should be")


def _meta(page: bytes, page_size: int) -> Meta:
    if len(page) < 192 or struct.unpack_from("<II", page, _HEADER) != (_MAGIC, _VERSION):
        raise DamageError("one of the two pages that it begins with is damaged")
    if not struct.unpack_from("<H", page, 10)[0] & _META:
        raise DamageError("one of the two pages that it begins with is damaged")
    roots = tuple(_tree(page[_HEADER + 24 + 48 * number :][:48]) for number in range(2))
    return Meta(page_size, roots, struct.unpack_from("<Q", page, _HEADER + 24 + 96 + 8)[0])


def _tree(record: bytes) -> tuple[int, int]:
    values = _TREE_RECORD.unpack(record)
    return values[_ROOT], values[2]
