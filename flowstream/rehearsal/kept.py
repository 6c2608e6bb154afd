"""What the prior model said, kept in a file for later runs."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowstream.batch import content_hash
from flowstream.rehearsal.spec import Rehearsal

_logger = logging.getLogger("flowstream")

_VERSION = 1
_NUM_COMPARED = 64
"""Samples that tell one set of prior data from another."""

Columns = dict[str, NDArray[Any]]
"""An entry a sample: "width", "loss", "was_correct", "label"."""


def path_of(rehearsal: Rehearsal) -> Path | None:
    """The file of this model, this criterion and these data."""
    if rehearsal.cache == "memory" or rehearsal.strategy == "random":
        return None
    num = len(rehearsal.prior)
    compared = np.linspace(0, num - 1, min(num, _NUM_COMPARED)).astype(int).tolist()
    digest = hashlib.blake2b(digest_size=16)
    for told in (_VERSION, num, rehearsal.measure, rehearsal.scorer.fingerprint()):
        digest.update(repr(told).encode())
    for i in compared:
        digest.update(content_hash(rehearsal.collate_fn([rehearsal.prior[i]])).encode())
    return Path(rehearsal.cache).expanduser() / f"prior-{digest.hexdigest()}.npz"


def read(path: Path | None) -> Columns | None:
    if path is None or not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file) as stored:
            return {name: stored[name] for name in ("width", "loss", "was_correct", "label")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        _logger.warning("%s cannot be read (%s): the prior data are scored anew", path, error)
        return None


def write(path: Path, columns: Columns) -> None:
    """Whole or not at all. A disk that takes nothing is told, and no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            np.savez(file, **columns)  # type: ignore[arg-type]
        os.replace(file.name, path)
    except OSError as error:
        _logger.warning("what the prior model said cannot be kept at %s: %s", path, error)
