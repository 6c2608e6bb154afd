"""Notices of other libraries, which whoever types a command can do nothing about, are kept from the terminal."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

_LIBRARIES = r"(accelerate|datasets|huggingface_hub|peft|torch|transformers|webdataset)\b"


@contextmanager
def quiet() -> Iterator[None]:
    """Errors are told, and what a user asks for: by `python -W` or PYTHONWARNINGS, and TRANSFORMERS_VERBOSITY."""
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                for kind in (DeprecationWarning, FutureWarning, UserWarning):
                    warnings.filterwarnings("ignore", category=kind, module=_LIBRARIES)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
