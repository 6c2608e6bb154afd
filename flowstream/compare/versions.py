"""What a figure was measured with."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = ("flowstream", "torch", "transformers", "tokenizers", "webdataset", "matplotlib")


def versions() -> dict[str, str]:
    """Package → version, and the machine."""
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return "not installed"
