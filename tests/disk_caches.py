"""Loss caches on disk for tests: losses that follow from their keys, and processes that write them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowstream.scoring.cache import Namespace, content_key

ROOT = Path(__file__).parents[1]
_PIPE = subprocess.PIPE

SAMPLE = Namespace("reference", "sample", "CausalLMScorer LlamaForCausalLM float32")
TOKEN = Namespace("reference", "token", "CausalLMScorer LlamaForCausalLM float32")

_PREAMBLE = f"""
import sys, types
# Without what the packages import, torch above all, a process starts in a fraction of the time.
for name, folder in (("flowstream", "flowstream"), ("flowstream.scoring", "flowstream/scoring")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [{str(ROOT)!r} + "/" + folder]
sys.path.insert(0, {str(ROOT / "tests")!r})
import logging, os, random, time
from disk_caches import SAMPLE, TOKEN, keys_of, losses_of, num_right
from flowstream.scoring.disk_cache import DiskCache
logging.basicConfig(format="%(message)s")
"""


def keys_of(window: object, num: int = 100, namespace: Namespace = SAMPLE) -> list[bytes]:
    """The keys of a window, which may have any name."""
    return [content_key(namespace, f"{window} {number}".encode()) for number in range(num)]


def losses_of(keys: Sequence[bytes]) -> list[NDArray[Any]]:
    """What stands under these keys: of samples 4 bytes of the key, of tokens up to 2,550 float16."""
    return [_token_losses(key) if key[:8] == TOKEN.prefix else np.frombuffer(key, np.float32, 1, 12) for key in keys]


def _token_losses(key: bytes) -> NDArray[Any]:
    return np.resize(np.frombuffer(key, np.uint8, 16, 8).astype(np.float16), 10 * key[8] + 1)


def num_right(keys: Sequence[bytes], found: Sequence[NDArray[Any] | None]) -> int:
    """How many were found; those that were must be what `losses_of` says."""
    for key, value in zip(keys, found, strict=True):
        if value is not None:
            (loss,) = losses_of([key])
            assert (value.dtype, value.tobytes()) == (loss.dtype, loss.tobytes()), key.hex()
    return sum(value is not None for value in found)


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs `program` with `DiskCache` and the names of this module; `arguments` are `sys.argv[1:]`."""
    command = [sys.executable, "-c", _PREAMBLE + program, *map(str, arguments)]
    return subprocess.Popen(command, stdin=_PIPE, stdout=_PIPE, stderr=_PIPE, text=True)


def output(process: subprocess.Popen[str], told: str = "") -> tuple[str, str]:
    """What it printed and logged until it ended, without an error; `told` is its input."""
    printed, logged = process.communicate(told, timeout=60)
    assert process.returncode == 0, logged
    return printed, logged
