"""Adapters that make a base another model than the run starts from: told by their weights, or by what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flowstream.scoring.adapters import layer_kinds, switched
from flowstream.scoring.entering import entered

_MOVING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that take out of the base's weights what the adapter starts with."""

_PLAIN_LORA = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"})


def refuse_prompt(model: nn.Module) -> None:
    """`ValueError` for a `PeftModel` with a learned prompt or prefix: nothing tells whether it was trained."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return
    for name, config in configs.items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"the adapter {name!r} ({type(config).__name__}) learns a prompt, which moves the losses from the "
                'start: pass trained_adapters="ignore" to score with the base model, without the prompt'
            )


def refuse_moved(model: nn.Module) -> None:
    """`ValueError` if making an adapter changed the weights of the base."""
    configs = getattr(model, "peft_config", None)
    for name, config in configs.items() if isinstance(configs, dict) else ():
        start = "kasa" if getattr(config, "use_kasa", False) else getattr(config, "init_lora_weights", None)
        if isinstance(start, str) and start.lower().startswith((*_MOVING, "kasa")):
            raise ValueError(
                f"the adapter {name!r} was initialised with {start!r}, which took its first weights out of the base: "
                "without the adapter the base is no longer the pre-trained model. Give the scorer a model of its own "
                "(from_pretrained, or a copy made before the adapter)"
            )


def refuse_trained(model: nn.Module, run: Callable[[], Tensor | None]) -> None:
    """`ValueError` if the active adapters change what the base says.

    LoRA, modules_to_save and trained tokens tell by their weights, to the bit. Of others the logits of `run()` are
    compared, with adapters and without.
    """
    undecided: Any = None
    kinds = layer_kinds()
    for name, layer in model.named_modules() if kinds else ():
        if not isinstance(layer, kinds):
            continue
        with torch.inference_mode(False), torch.no_grad():
            moved = _is_moved(layer)
        if moved:
            raise ValueError(_trained(f"of {name!r}"))
        if moved is None and undecided is None:
            undecided = layer
    if undecided is None:
        return
    modules = list(model.modules())
    with entered(model, modules):
        with switched(modules, off=True):
            without = run()
        with switched(modules, off=False):
            adapted = run()
    if without is None or adapted is None:
        raise ValueError(
            f"the reference carries adapters ({type(undecided).__module__}.{type(undecided).__name__}) of which "
            'nothing tells whether they were trained: if the base is meant, pass trained_adapters="ignore"; or build '
            "the scorer from the base, before it is wrapped"
        )
    # Some methods are the identity up to rounding only (DoRA divides by a norm that another device computed).
    tolerance = 64 * torch.finfo(without.dtype).eps * without.abs().max().float()
    if not bool((adapted.float() - without.float()).abs().max() <= tolerance):
        raise ValueError(_trained(f"(the first in a {type(undecided).__name__})"))


def _trained(where: str) -> str:
    return (
        f"the adapters on the reference {where} change what the model says: they were trained, or do not begin as the "
        "identity (init_lora_weights=False), so that the base alone is not what this run starts from. If the base is "
        'meant (a run that is resumed, and whose reference is the base), pass trained_adapters="ignore", or build the '
        "scorer from the base before it is wrapped. If the adapted model is meant, merge a copy of it first "
        "(merge_and_unload) and pass that"
    )


def _is_moved(layer: Any) -> bool | None:
    """Whether the active adapters change what a layer computes, or `None` where its weights do not tell."""
    active = [name for name in layer.active_adapters if isinstance(name, str)]
    copies = layer._modules.get("modules_to_save")
    if copies is not None:
        return any(not _same(copies[name], layer.original_module) for name in active if name in copies)
    if "token_adapter" in layer._modules:
        return False  # a layer of its own, which is asked as well
    if (tokens := getattr(layer, "trainable_tokens_delta", None)) is not None:
        weight = layer.get_base_layer().weight
        return any(not _equal(tokens[n], weight[layer.token_indices[n]]) for n in active if n in tokens)
    if type(layer).__module__.startswith("peft.tuners.lora."):
        known = (getattr(layer, kind, {}) for kind in _PLAIN_LORA)
        adapters = set(active) & set().union(*known)
        if any(_adds(layer, name) for name in adapters):
            return True
        # The others have further weights (DoRA a magnitude), which may add something of their own.
        further = [getattr(layer, kind, {}) for kind in {*layer.adapter_layer_names} - _PLAIN_LORA]
        if not any(name in kind for name in adapters for kind in [*further, getattr(layer, "lora_variant", {})]):
            return False
    return None


def _adds(layer: Any, name: str) -> bool:
    """Whether plain LoRA adds something: neither factor is 0, or a bias is not."""
    if name in layer.lora_embedding_A:
        factors = [layer.lora_embedding_A[name], layer.lora_embedding_B[name]]
        bias = None
    else:
        factors = [layer.lora_A[name].weight, layer.lora_B[name].weight]
        bias = layer.lora_B[name].bias
    return all(bool(factor.any()) for factor in factors) or (bias is not None and bool(bias.any()))


def _same(module: nn.Module, other: nn.Module) -> bool:
    ours, theirs = module.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(_equal(ours[name], theirs[name]) for name in ours)


def _equal(adapter: Tensor, base: Tensor) -> bool:
    """PEFT keeps what trains in fp32, also over a base in half precision."""
    return torch.equal(adapter, base.to(adapter.dtype))
