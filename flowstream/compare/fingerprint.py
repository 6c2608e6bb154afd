"""What identifies tensors, whole: two that differ in one bit have two fingerprints."""

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """Of their names, dtypes, shapes and content, in any order and on any device, as hex."""
    found = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
