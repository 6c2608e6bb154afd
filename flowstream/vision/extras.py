"""timm and torchvision, which only some models and datasets need."""

from __future__ import annotations

import importlib
from typing import Any


def imported(name: str) -> Any:
    """The package. `ValueError` with the remedy where it is not there, or does not fit the torch that is."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{name.partition('.')[0]} is not installed: pip install 'flowstream[vision]'") from None
    except (
        RuntimeError
    ) as error:  # its operators are not there: built for another torch, or for CUDA beside a CPU build
        import torch

        raise ValueError(
            f"the torchvision that is installed is not built for torch {torch.__version__} ({error}): install the one "
            "from the same place as torch"
        ) from error
