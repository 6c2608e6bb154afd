"""Entering a model without a trace: its modes, its forward, its rotary positions, and what the thread has set."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

_COMPILED = "_compiled_call_impl"
"""Where `nn.Module.compile` keeps what is called in place of the module."""


@contextmanager
def entered(model: nn.Module, modules: list[nn.Module]) -> Iterator[None]:
    """The model (these are its modules) in eval mode, with its class's forward, without gradients or autocast.

    What the caller compiled in place (`model.compile()`) runs uncompiled: under other modes and another attention it
    would be compiled anew, until Dynamo gives it up, and training with it.

    It has read nothing yet: rotary frequencies that follow the longest sequence so far are those of a new model.
    """
    with ExitStack() as stack:
        # All of these are thread-local, and the caller's would leak in. no_grad rather than inference mode:
        # inference tensors raise when something saves them for backward.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {device_of(model).type, "cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_unread(modules))
        training = [module for module in modules if module.training]
        compiled = [(vars(module), call) for module in modules if (call := vars(module).get(_COMPILED)) is not None]
        patched = vars(model).get("forward")
        try:
            for own, _ in compiled:
                own[_COMPILED] = None
            _set_training(training, False)
            if patched is not None and has_forward(model):
                vars(model)["forward"] = _own_forward(model)
            yield
        finally:
            if patched is not None:
                vars(model)["forward"] = patched
            _set_training(training, True)
            for own, call in compiled:
                own[_COMPILED] = call


def modules_of(model: nn.Module) -> list[nn.Module]:
    """What `model.modules()` gives, in no promised order and a third of the time: each micro-batch asks."""
    found = {id(model): model}
    stack = [model]
    while stack:
        for child in stack.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                stack.append(child)
    return list(found.values())


def _set_training(modules: list[nn.Module], training: bool) -> None:
    for module in modules:
        own = vars(module)
        if "training" in own:
            own["training"] = training  # nn.Module's setter would take milliseconds for all of a large model
        else:  # a scripted module
            module.training = training


@contextmanager
def _unread(modules: list[nn.Module]) -> Iterator[None]:
    """Rotary positions of the kinds "dynamic" and "longrope" as they were made, and afterwards as they are now.

    transformers' modules keep the frequencies of the longest sequence that they have read: without this, a loss would
    depend on what was scored, or trained on, before.
    """
    following = [module for module in modules if _follows(vars(module).get("rope_type"))]
    before = [(vars(module).copy(), module._buffers.copy()) for module in following]
    try:
        for module in following:
            for name, buffer in list(module._buffers.items()):
                original = getattr(module, f"{name.removesuffix('inv_freq')}original_inv_freq", None)
                if name.endswith("inv_freq") and buffer is not None and original is not None:
                    module._buffers[name] = original.to(buffer.device, copy=True)  # it is written in place
            for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
                setattr(module, name, module.original_max_seq_len)
        yield
    finally:
        for module, (attributes, buffers) in zip(following, before, strict=True):
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def _follows(rope_type: Any) -> bool:
    """One kind of rotary positions, or one for each kind of layer."""
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(kind in ("dynamic", "longrope") for kind in kinds)


def has_forward(model: nn.Module) -> bool:
    """Whether the class has a forward, so that one on the instance was put over it (by TRL, or for autocast)."""
    forward = inspect.getattr_static(type(model), "forward")
    return isinstance(forward, FunctionType) and forward is not nn.Module.forward


def _own_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward of the model's class, through the hook that accelerate set for a model on several devices."""
    hook = vars(model).get("_hf_hook")
    if hook is None:
        return MethodType(type(model).forward, model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = hook.pre_forward(model, *args, **kwargs)
        return hook.post_forward(model, type(model).forward(model, *args, **kwargs))

    return forward


def forward_names(model: nn.Module) -> list[str]:
    """Names of the forward's arguments, in order, without *args and **kwargs."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    forward = MethodType(type(model).forward, model) if has_forward(model) else model.forward
    parameters = inspect.signature(forward).parameters
    return [name for name, parameter in parameters.items() if parameter.kind in kinds]


def device_of(model: nn.Module) -> torch.device:
    for tensor in chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")
