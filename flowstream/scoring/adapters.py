"""PEFT adapters on a reference: where they are, and off while it scores."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_ABSENT = object()

_BASES = ("original_module", "base_layer", "token_adapter")
"""Where a layer of PEFT's keeps what it stands in for, itself or in another such layer."""

# PEFT is never imported here: where it is not loaded, no model carries its adapters.


def _kinds(*names: tuple[str, str]) -> tuple[type, ...]:
    """PEFT's classes of these names, those that there are."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return tuple(kind for kind in found if isinstance(kind, type))


def layer_kinds() -> tuple[type, ...]:
    """What stands in for a layer of the base: tuner layers, and wrappers of modules_to_save and of trained tokens."""
    return _kinds(("peft.tuners.tuners_utils", "BaseTunerLayer"), ("peft.utils.other", "AuxiliaryTrainingWrapper"))


def unwrapped(model: nn.Module) -> nn.Module | None:
    """What a `PeftModel` or a tuner is around; `None` for other models."""
    if isinstance(model, _kinds(("peft.peft_model", "PeftModel"), ("peft.mixed_model", "PeftMixedModel"))):
        return model.base_model  # type: ignore[return-value]
    if isinstance(model, _kinds(("peft.tuners.tuners_utils", "BaseTuner"))):
        return model.model  # type: ignore[return-value]
    return None


def layers_of(modules: list[nn.Module]) -> list[Any]:
    """Those of a model's modules that adapters can be switched off in."""
    kinds = layer_kinds()
    if not kinds:
        return []
    adapting = {kind for kind in {type(module) for module in modules} if issubclass(kind, kinds)}
    return [module for module in modules if type(module) in adapting] if adapting else []


def bare_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` as before the adapters came: theirs left out, the base's under its own names."""
    return _walk(model, "", set(), layer_kinds())


def _walk(module: nn.Module, name: str, seen: set[int], kinds: tuple[type, ...]) -> Iterator[tuple[str, nn.Module]]:
    module = _base_of(module, kinds)
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen, kinds)


def base_of(module: nn.Module) -> nn.Module:
    """The layer of the base that an adapter's layer stands in for; any other module itself."""
    return _base_of(module, layer_kinds())


def embeddings_of(model: nn.Module, getter: str) -> nn.Module | None:
    """The base's `get_input_embeddings` or `get_output_embeddings`; `None` where a model has none."""
    try:
        return base_of(getattr(model, getter)())
    except (AttributeError, NotImplementedError):
        return None


def _base_of(module: nn.Module, kinds: tuple[type, ...]) -> nn.Module:
    while isinstance(module, kinds):
        inner = (module._modules.get(name) for name in _BASES)
        if (found := next((child for child in inner if child is not None), None)) is None:
            return module
        module = found
    return module


def refuse_unknown(model: nn.Module) -> None:
    """`ValueError` for adapters that are no layers of their own, so that they cannot be set aside."""
    # PEFT's attention moves the base's weights out of the module whenever it runs.
    moving = _kinds(("peft.tuners.lora.layer", "MultiheadAttention"))
    for layer in layers_of(list(model.modules())):
        replaced = "forward" in vars(layer) and "_hf_hook" not in vars(layer)  # as X-LoRA does
        if replaced or isinstance(layer, moving):
            _refuse_kind(layer)
    for _, module in bare_modules(model):
        if type(module).__module__.partition(".")[0] == "peft":
            _refuse_kind(module)


def _refuse_kind(module: nn.Module) -> None:
    kind = type(module)
    raise ValueError(
        f"the model carries PEFT adapters ({kind.__module__}.{kind.__name__}) which this scorer cannot set aside: "
        "score with a base model of its own, made before it is wrapped, or with from_pretrained"
    )


@contextmanager
def taken_out(model: nn.Module) -> Iterator[None]:
    """The model without its adapters' modules, which are put back after: to copy the base alone."""
    kinds = layer_kinds()
    places = [
        (module, name, child)
        for _, module in bare_modules(model)
        for name, child in module._modules.items()
        if child is not None and isinstance(child, kinds)
    ]
    try:
        for module, name, child in places:
            module._modules[name] = _base_of(child, kinds)
        yield
    finally:
        for module, name, child in places:
            module._modules[name] = child


def refuse_merged(layers: list[Any]) -> None:
    """`ValueError` if adapters are merged into the base's weights."""
    for layer in layers:
        if merged := getattr(layer, "merged_adapters", None):
            raise ValueError(
                f"adapters are merged into the reference ({list(merged)} in a {type(layer).__name__}): its weights "
                "are no longer the base's, and scoring must not rewrite them. Unmerge them (unmerge_adapter()), or "
                "give the scorer a base model of its own with from_pretrained"
            )


@contextmanager
def switched(modules: list[nn.Module], *, off: bool) -> Iterator[None]:
    """All adapters among a model's modules off (or on), and each as it was afterwards.

    PEFT's own `disable_adapter()` is not used: it sets `requires_grad` of every adapter, switches those on afterwards
    that were off, and unmerges. A layer looks at this one attribute when it runs.
    """
    layers = layers_of(modules)
    refuse_merged(layers)
    before = [vars(layer).get("_disable_adapters", _ABSENT) for layer in layers]
    try:
        for layer in layers:
            vars(layer)["_disable_adapters"] = off
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            if value is _ABSENT:
                vars(layer).pop("_disable_adapters", None)
            else:
                vars(layer)["_disable_adapters"] = value
