"""The frozen reference: copied or shared, entered without a trace, and watched for drift."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor, nn

from flowstream.scoring import adapters
from flowstream.scoring.checksum import Checksum, Places
from flowstream.scoring.device import Lane
from flowstream.scoring.entering import device_of, entered, forward_names, has_forward, modules_of
from flowstream.scoring.head import logits_of
from flowstream.scoring.out_of_memory import enough_to_try, is_out_of_memory
from flowstream.scoring.trained_adapters import refuse_moved, refuse_prompt, refuse_trained
from flowstream.scoring.turn import InUse, turn

Copy = bool | Literal["auto"]
TrainedAdapters = Literal["refuse", "ignore"]

_VOLATILE_CONFIG = frozenset(
    {"_name_or_path", "architectures", "transformers_version", "use_cache", "dtype", "torch_dtype"}
)
"""What a configuration says that changes no loss (class and dtype are read from the model itself)."""


class Reference:
    """Owns the frozen model of a scorer: its own copy, or the caller's model shared as it is.

    `copy="auto"` copies if a parameter requires a gradient (the model will be trained) or if `device` is another
    device; `True` always copies; `False` shares. A shared model gets every flag back after each use. Where it may be in
    training, it is used in the thread that made the reference only; a copy in any.

    Of a model with PEFT adapters the base is the reference, with its adapters off while it scores: `"auto"` shares it,
    `True` copies the base alone. Adapters that change what the base says are refused, as the base is then not what the
    run starts from; `trained_adapters="ignore"` says that it is meant all the same.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        copy: Copy = "auto",
        device: torch.device | str | None = None,
        trained_adapters: TrainedAdapters = "refuse",
    ) -> None:
        if copy not in (True, False, "auto"):
            raise ValueError(f"copy must be True, False or 'auto', not {copy!r}")
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"a reference is a torch.nn.Module, not {type(model).__name__}: pass the model, or use "
                "from_pretrained for a name or a path"
            )
        if trained_adapters not in ("refuse", "ignore"):
            raise ValueError(f"trained_adapters must be 'refuse' or 'ignore', not {trained_adapters!r}")
        given, model = model, _unwrap(model)
        _refuse(model)
        self.adapted = adapted = bool(adapters.layers_of(modules_of(model)))
        """Whether the model it was taken from carries PEFT adapters."""
        where = device_of(model)
        wanted = where if device is None else _indexed(torch.device(device))
        if wanted != where and (copy is False or (adapted and copy == "auto")):
            shares = "copy=False shares the model" if copy is False else "a model with PEFT adapters is shared"
            raise ValueError(
                f"{shares}, which is on {where}, and would move it to {wanted}: leave `device` out, or use copy=True"
            )
        if copy == "auto":
            copy = not adapted and (wanted != where or any(p.requires_grad for p in model.parameters()))
        self.copied = bool(copy)
        with turn(model, waits=self.copied):  # in between, its attention is the one over packs
            if trained_adapters == "refuse":
                for wrapper in _wrappers(given):
                    refuse_prompt(wrapper)
                with enough_to_try():
                    refuse_trained(model, lambda: _probe(model))
            self.model = _frozen_copy(model, wanted) if self.copied else model
        self._thread = threading.get_ident()
        names = forward_names(self.model)
        self.accepted = frozenset(names)
        """Names of the arguments that the model's forward takes."""
        self.first = names[0] if names else None
        """The first of them: what a lone input is."""
        self._places: Places = {}
        self._sampled = self._sample().on_cpu()
        self._watched: Callable[[], Checksum] | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is now (of its first parameter)."""
        return device_of(self.model)

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
        """The model in eval mode, without adapters, gradients or autocast, whatever the caller has set.

        All is put back after. What a trainer put over the model's forward is not followed. `InUse` (a `RuntimeError`)
        where another thread may be running a shared model meanwhile; for a copy, it is waited for.
        """
        _refuse_partitioned(self.model)
        modules = modules_of(self.model)  # as they are now: adapters come and go
        if not self.copied and threading.get_ident() != self._thread:
            _refuse_training(modules)
        with turn(self.model, waits=self.copied), entered(self.model, modules), adapters.switched(modules, off=True):
            yield self.model

    def settle(self) -> None:
        """What the weights are now is what they must stay: quantised layers may pack theirs anew when first used."""
        self._sampled = self._sample().on_cpu()

    def watch(self, lane: Lane) -> None:
        """Take a window's checksum along with its scores: `check()` then waits for nothing but these.

        Called within `lane.entered()`. On a CPU `check()` reads the weights itself.
        """
        if lane.device.type == "cuda":
            self._watched = self._sample().fetched(lane)

    def check(self) -> None:
        """Raise `RuntimeError` if a sampled parameter or buffer differs from what it was at the start.

        On a CUDA device, as of the last `watch()`: nothing scored, nothing to check.
        """
        if self.device.type == "cuda" and self._watched is None:
            return
        now = self._sample() if self._watched is None else self._watched()
        self._watched = None
        if now == self._sampled:
            return
        before, after = self._sampled.by_name(), now.by_name()
        changed = [name for name in after if after[name] != before.get(name)]
        changed += [name for name in before if name not in after]
        if not changed:  # moved to another device
            self._sampled = now
            return
        cause = "it is being trained"
        if self.adapted and not self.copied:
            cause += (
                ", or adapters were merged into it and taken out again (merge_adapter() and unmerge_adapter(), which "
                "leave the base's weights off by rounding)"
            )
        raise RuntimeError(
            f"the reference has changed since the scorer was made ({changed[0]!r}, {len(changed)} of {len(after)} "
            f"tensors): {cause}, and its losses would drift with it. Give the scorer a copy of its own (copy=True), or "
            "load the weights before you make the scorer"
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

    def _sample(self) -> Checksum:
        """A few elements of every parameter and persistent buffer of the base."""
        return Checksum.of(adapters.bare_modules(self.model), self._places)


def _probe(model: nn.Module) -> Tensor | None:
    """Logits of a few tokens, or `None` where the model is none of language or fails on them."""
    try:
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
        ids = torch.linspace(0, len(weight) - 1, 16, device=weight.device).long()[None]
        inputs = {"input_ids": ids}
        if "decoder_input_ids" in forward_names(model):
            inputs["decoder_input_ids"] = ids
        return logits_of(model(**inputs))
    except Exception as error:  # whatever it is or needs besides, it cannot be asked
        if is_out_of_memory(error):
            raise
        return None


def _refuse_training(modules: list[nn.Module]) -> None:
    """`InUse` for a model that its own thread may be training while another scores it."""
    trained = any(module.training for module in modules) or bool(adapters.layers_of(modules))
    if trained or any(p is not None and p.requires_grad for module in modules for p in module._parameters.values()):
        raise InUse(
            "the stream is iterated in another thread than the one that made its scorer, over a model that is shared "
            "and may be in training: scoring would switch its attention, its modes and its adapters under the "
            "training. Make the scorer and iterate in the thread that trains, or pass copy=True"
        )


def _wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what it is around, down to the one that is around nothing."""
    while True:
        yield model
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif (base := adapters.unwrapped(model)) is not None:
            model = base
        else:
            return


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile, DistributedDataParallel and PEFT put around it."""
    *_, model = _wrappers(model)
    return model


def _refuse(model: nn.Module) -> None:
    _refuse_partitioned(model)
    adapters.refuse_unknown(model)
    adapters.refuse_merged(adapters.layers_of(modules_of(model)))
    refuse_moved(model)
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("the reference has parameters on the meta device: load its weights first")


def _refuse_partitioned(model: nn.Module) -> None:
    if hasattr(next(model.parameters(), None), "ds_id"):
        raise ValueError(
            "the reference's parameters are partitioned by DeepSpeed ZeRO-3, and no rank has them whole: load a "
            "reference of its own outside of DeepSpeed (from_pretrained, before the trainer is made), or use ZeRO "
            "stage 2"
        )


def _frozen_copy(model: nn.Module, device: torch.device) -> nn.Module:
    with torch.inference_mode(False), torch.no_grad():
        try:
            with adapters.taken_out(model):
                clone = copy.deepcopy(model)
        except Exception as error:
            raise RuntimeError(
                f"{type(model).__name__} cannot be copied ({error}): build the scorer with from_pretrained, or freeze "
                "a second model (requires_grad_(False)) and pass it with copy=False"
            ) from error
        # A trainer's patch of `forward` is a closure over the caller's model, and would be followed back to it.
        if "_hf_hook" not in vars(clone) and has_forward(clone):
            vars(clone).pop("forward", None)
        clone.requires_grad_(False)
        for module in clone.modules():  # not clone.eval(): models override it to keep a part in train mode
            module.training = False
        return clone.to(device)


def _indexed(device: torch.device) -> torch.device:
    """`cuda` as the `cuda:0` that it stands for."""
    if device.index is not None or device.type == "cpu":
        return device
    return torch.empty(0, device=device).device
