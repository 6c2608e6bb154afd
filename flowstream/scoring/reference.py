"""The frozen reference: copied or shared, entered without a trace, and watched for drift."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

Copy = bool | Literal["auto"]

_NUM_SAMPLED = 4096
"""Elements that a checksum reads, over all parameters together …"""
_MIN_SAMPLED = 8
"""… and at least from each, so that a single trained layer is noticed."""

_VOLATILE_CONFIG = frozenset(
    {"_name_or_path", "architectures", "transformers_version", "use_cache", "dtype", "torch_dtype"}
)
"""What a configuration says that changes no loss (class and dtype are read from the model itself)."""


class Reference:
    """Owns the frozen model of a scorer: its own copy, or the caller's model shared as it is.

    `copy="auto"` copies if a parameter requires a gradient (the model will be trained) or if `device` is another
    device; `True` always copies; `False` shares. A shared model gets every flag back after each use.
    """

    def __init__(self, model: nn.Module, *, copy: Copy = "auto", device: torch.device | str | None = None) -> None:
        if copy not in (True, False, "auto"):
            raise ValueError(f"copy must be True, False or 'auto', not {copy!r}")
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"a reference is a torch.nn.Module, not {type(model).__name__}: pass the model, or use "
                "from_pretrained for a name or a path"
            )
        model = _unwrap(model)
        _refuse(model)
        where = _device_of(model)
        wanted = where if device is None else _indexed(torch.device(device))
        if copy is False and wanted != where:
            raise ValueError(
                f"copy=False shares the model, which is on {where}, and would move it to {wanted}: leave `device` "
                "out, or use copy=True"
            )
        if copy == "auto":
            copy = wanted != where or any(p.requires_grad for p in model.parameters())
        self.copied = bool(copy)
        self.model = _frozen_copy(model, wanted) if self.copied else model
        names = _forward_names(self.model)
        self.accepted = frozenset(names)
        """Names of the arguments that the model's forward takes."""
        self.first = names[0] if names else None
        """The first of them: what a lone input is."""
        self._places: dict[tuple[str, int], Tensor] = {}
        self._sampled = self._sample()

    @property
    def device(self) -> torch.device:
        """Where the model is now (of its first parameter)."""
        return _device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating parameter."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def config(self) -> Any:
        """The model's Hugging Face configuration, or `None`."""
        return getattr(self.model, "config", None)

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The model in eval mode, without gradients or autocast, whatever the caller has set; all put back after."""
        with ExitStack() as stack:
            # All of these are thread-local, and the caller's would leak in. no_grad rather than inference mode:
            # inference tensors raise when something saves them for backward.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for kind in {self.device.type, "cpu"}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            training = [] if self.copied else [m for m in self.model.modules() if m.training]
            try:
                for module in training:
                    module.training = False
                yield self.model
            finally:
                for module in training:
                    module.training = True

    def check(self) -> None:
        """Raise `RuntimeError` if a sampled parameter or buffer differs from what it was at the start."""
        now = self._sample()
        if now == self._sampled:
            return
        before, after = self._sampled.by_name(), now.by_name()
        changed = [name for name in after if after[name] != before.get(name)]
        changed += [name for name in before if name not in after]
        if not changed:  # moved to another device
            self._sampled = now
            return
        raise RuntimeError(
            f"the reference has changed since the scorer was made ({changed[0]!r}, {len(changed)} of {len(after)} "
            "tensors): it is being trained, and its losses would drift with it. Give the scorer a copy of its own "
            "(copy=True), or load the weights before you make the scorer"
        )

    def fingerprint(self, *parts: object) -> str:
        """What identifies the weights, the architecture, and `parts` (the scorer and its version), as hex."""
        digest = xxhash.xxh3_128()
        config = self.config
        named = config.to_dict() if hasattr(config, "to_dict") else {}
        named = {key: value for key, value in named.items() if key not in _VOLATILE_CONFIG}
        kind = type(self.model)
        digest.update(f"{parts!r} {kind.__module__}.{kind.__qualname__}".encode())
        digest.update(json.dumps(named, sort_keys=True, default=repr).encode())
        digest.update(str(getattr(config, "_attn_implementation", None)).encode())
        for name, (described, values) in self._sampled.by_name().items():
            digest.update(f"{name} {described}".encode() + values)
        return digest.hexdigest()

    def _sample(self) -> _Checksum:
        """A few elements of every parameter and persistent buffer."""
        with torch.inference_mode(False), torch.no_grad():
            tensors = [(name, _bits(tensor)) for name, tensor in _named_tensors(self.model)]
            total = sum(tensor.numel() for _, tensor in tensors)
            taken: dict[_Group, list[Tensor]] = {}
            names: list[tuple[str, _Group, torch.Size, int]] = []
            for number, (name, tensor) in enumerate(tensors):
                group, numel = (tensor.dtype, tensor.device), tensor.numel()
                index = self._places.get((name, numel))
                if index is None or index.device != tensor.device:
                    index = self._places[name, numel] = _sampled_index(number, numel, total).to(tensor.device)
                taken.setdefault(group, []).append(torch.take(tensor, index))
                names.append((name, group, tensor.shape, len(index)))
            return _Checksum(names, {group: torch.cat(values) for group, values in taken.items()})


_Group = tuple[torch.dtype, torch.device]


@dataclass(frozen=True, slots=True)
class _Checksum:
    """A few elements of each tensor; those of one dtype and device together, so that comparing costs one launch."""

    names: list[tuple[str, _Group, torch.Size, int]]
    """Of each tensor in order: name, group, shape, and how many elements of the group's are its."""
    values: dict[_Group, Tensor]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Checksum) or self.names != other.names:
            return False
        # As bits: NaN is as good a weight as any, and 0.0 is not -0.0.
        return all(torch.equal(_as_bytes(self.values[g]), _as_bytes(other.values[g])) for g in self.values)

    def by_name(self) -> dict[str, tuple[str, bytes]]:
        """Name → (dtype and shape, the elements as bytes)."""
        rest = {group: values.cpu() for group, values in self.values.items()}
        found = {}
        for name, group, shape, count in self.names:
            found[name] = (f"{group[0]} {tuple(shape)}", _as_bytes(rest[group][:count]).numpy().tobytes())
            rest[group] = rest[group][count:]
        return found


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile and DistributedDataParallel put around it."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _refuse(model: nn.Module) -> None:
    adapted = getattr(model, "peft_config", None) is not None
    if adapted or any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} carries PEFT adapters, which this scorer cannot set aside: score with the base "
            "model, made before it is wrapped, or with from_pretrained"
        )
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("the reference has parameters on the meta device: load its weights first")


def _frozen_copy(model: nn.Module, device: torch.device) -> nn.Module:
    with torch.inference_mode(False), torch.no_grad():
        try:
            clone = copy.deepcopy(model)
        except Exception as error:
            raise RuntimeError(
                f"{type(model).__name__} cannot be copied ({error}): build the scorer with from_pretrained, or freeze "
                "a second model (requires_grad_(False)) and pass it with copy=False"
            ) from error
        # A trainer's patch of `forward` is a closure over the caller's model, and would be followed back to it.
        if "_hf_hook" not in vars(clone):
            vars(clone).pop("forward", None)
        clone.requires_grad_(False)
        for module in clone.modules():  # not clone.eval(): models override it to keep a part in train mode
            module.training = False
        return clone.to(device)


def _device_of(model: nn.Module) -> torch.device:
    for tensor in chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _indexed(device: torch.device) -> torch.device:
    """`cuda` as the `cuda:0` that it stands for."""
    if device.index is not None or device.type == "cpu":
        return device
    return torch.empty(0, device=device).device


def _forward_names(model: nn.Module) -> list[str]:
    """Names of the forward's arguments, in order, without *args and **kwargs."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(model.forward).parameters
    return [name for name, parameter in parameters.items() if parameter.kind in kinds]


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters (tied ones once) and persistent buffers, this rank's part of those that are sharded."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            # Buffers that are not saved are derived, and may move: rotary frequencies follow the longest sequence seen.
            if tensor is None or id(tensor) in seen or name in module._non_persistent_buffers_set:
                continue
            seen.add(id(tensor))
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            yield f"{prefix}.{name}" if prefix else name, local


def _sampled_index(number: int, numel: int, total: int) -> Tensor:
    """Which elements of tensor `number` a checksum reads: a pure function, spread over the tensor."""
    if numel == 0:
        return torch.from_numpy(np.zeros(0, dtype=np.int64))
    count = min(numel, max(_MIN_SAMPLED, _NUM_SAMPLED * numel // max(total, 1)))
    generator = np.random.Generator(np.random.Philox(key=number))
    edges = np.linspace(0, numel, count, endpoint=False)
    return torch.from_numpy((edges + generator.random(count) * (numel / count)).astype(np.int64).clip(0, numel - 1))


def _bits(tensor: Tensor) -> Tensor:
    """Eight-bit floats cannot be indexed on every device; their bits can."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _as_bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)
