"""Attention over packs: samples one after the other in a single row, none of which sees another.

A pack is run as `[1, T]` with positions that restart. Without more, samples would attend to each other, silently (up to
10 nats wrong): the attention that is registered here with transformers, under `NAME`, looks up the pack under way, and
raises for whatever it does not know.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowstream.scoring import attention
from flowstream.scoring.last_layer import LabelledRows
from flowstream.scoring.turn import InUse

NAME = "flowstream_packed"
"""The attention's name with transformers."""

ASKING = "flowstream_asking"
"""Another, by which a model is asked for its masks once: see `asked`."""

_UNCHANGING = frozenset({"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"})
_UNCHANGING |= {"return_dict", "num_items_in_batch", "output_router_logits", "logits_to_keep", "past_key_values"}
"""What models hand to an attention that does not change its result."""

_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})


class Unpackable(RuntimeError):
    """The model asks for something that attention over packs does not know."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Pack:
    """Where the samples of a pack lie, as numbers on the host and, for kernels, on the device."""

    stops: Sequence[int]
    """Where each sample ends, and the next begins."""

    length: int
    """Tokens, with what fills the pack up."""

    labelled: Tensor
    """[n] int64, ascending, on the device: the rows whose losses are wanted."""

    first_labelled: Sequence[int]
    """Of each sample, the first of them."""

    offsets: Tensor
    """[S + 1] int32, on the device: 0 and the stops; what fills the pack up is one more sample."""

    @property
    def bounds(self) -> Iterator[tuple[int, int]]:
        """Start and stop of each sample, without what fills the pack up."""
        return zip((0, *self.stops[:-1]), self.stops, strict=True)

    @property
    def max_length(self) -> int:
        return max(max(stop - start for start, stop in self.bounds), self.length - self.stops[-1])


def offsets_of(stops: Sequence[int], length: int) -> NDArray[np.int64]:
    """What `Pack.offsets` holds."""
    return np.array([0, *stops] + [length] * (length > stops[-1]))


_under_way = threading.local()


class Packing:
    """Owns the switch of a model's attention to packs, and what in its last layer needs the labelled rows only."""

    def __init__(self, model: nn.Module, *, trims: bool = True) -> None:
        self._configs = _configs(model)
        self._rows = LabelledRows(model) if trims else None

    @contextmanager
    def of(self, pack: Pack) -> Iterator[None]:
        """The model reads this pack. Afterwards its attention is the one it had."""
        with ExitStack() as stack:
            if self._rows is not None:
                stack.enter_context(self._rows.only(pack.labelled, pack.length))
            stack.enter_context(_switched(self._configs, NAME, pack, self._rows.attention if self._rows else None))
            yield


@contextmanager
def asked(model: nn.Module, pack: Pack) -> Iterator[None]:
    """The model reads this pack of one sample; `Unpackable` unless its attention is told of all that its masks hold.

    Attention over packs sees no masks: a window that is only in them would be lost, and no trial of a few tokens would
    show it.
    """
    _under_way.masks = []
    try:
        with _switched(_configs(model), ASKING, pack, None):
            yield
    finally:
        del _under_way.masks


@contextmanager
def _switched(configs: Sequence[Any], name: str, pack: Pack, trimmed: nn.Module | None) -> Iterator[None]:
    """The attention of this name over this pack in the configurations, outer ones first."""
    register()
    before = [config._attn_implementation for config in configs]
    for own in before:
        if own in (NAME, ASKING):  # to put that back would leave it there for good
            raise InUse(
                f"the model's attention is {own!r} already: another thread is scoring it, or the model was copied "
                "while one did. Score it in one thread at a time, and set model.config._attn_implementation to an "
                "attention of transformers"
            )
    _under_way.pack, _under_way.trimmed = pack, trimmed
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        del _under_way.pack, _under_way.trimmed
        # Outer ones first here too: setting one sets those within it.
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


def reason_against(model: nn.Module, accepted: frozenset[str]) -> str | None:
    """Why a model cannot be packed, as far as its configuration tells; `None` where only trying can tell."""
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be exchanged"
    if "position_ids" not in accepted:
        return "its forward takes no position_ids"
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    kinds = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if kinds:
        return f"it has layers of the kind {', '.join(sorted(map(str, kinds)))}"
    if getattr(config, "attention_chunk_size", None):
        return "its attention is chunked"
    if any(isinstance(module, nn.Conv1d | nn.RNNBase) for module in model.modules()):
        return "it has convolutions or recurrences over the sequence"
    return None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **further: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, H or fewer, T, D] → [1, T, H, D], as transformers' attention functions."""
    sliding_window = sliding_window or None  # 0 is a configuration's way to say none
    if torch.compiler.is_compiling():
        return _attend_opaquely(query, key, value, scaling, sliding_window, softcap), None
    pack: Pack | None = getattr(_under_way, "pack", None)
    unknown = sorted(name for name, given in further.items() if given is not None and name not in _UNCHANGING)
    if unknown:
        raise Unpackable(f"{type(module).__name__} hands {', '.join(unknown)} to its attention")
    if pack is None or attention_mask is not None or not getattr(module, "is_causal", True):
        raise Unpackable(f"{type(module).__name__} is no causal attention over the pack")
    if query.shape[0] != 1 or query.shape[2] != pack.length or key.shape[2] != pack.length:
        raise Unpackable(f"{type(module).__name__} attends over {list(key.shape)}, not over a pack of {pack.length}")
    first = pack.first_labelled if module is _under_way.trimmed else None
    return attention.over_pack(query, key, value, pack, scaling, sliding_window, softcap, first), None


@torch.library.custom_op("flowstream::packed_attention", mutates_args=())
def _attend_opaquely(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """For torch.compile, which sees a single operator: where samples end is a matter of each pack, not of the graph."""
    return attention.over_pack(query, key, value, _under_way.pack, scale, window, softcap).contiguous()


@_attend_opaquely.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None, softcap: float | None
) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])


def _attend_asking(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **further: Any
) -> tuple[Tensor, None]:
    window = further.get("sliding_window") or None
    if attention_mask is None:
        holds = window is None
    else:
        given = [function for mask, function in _under_way.masks if mask is attention_mask]
        holds = bool(given) and _is_band(given[0], window)
    if not holds:
        raise Unpackable(f"{type(module).__name__} has a mask that its attention is not told of")
    return _attend(module, query, key, value, None, **further)


def _mask_asked(
    *, batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Any], **further: Any
) -> Tensor:
    mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=further.get("device"))
    _under_way.masks.append((mask, mask_function))
    return mask


def _is_band(function: Callable[..., Any], window: int | None) -> bool:
    """Whether a mask function is causal with this window: at small and large positions, and about the window."""
    ends = [2**k for k in range(20)] + ([] if window is None else [window, 2 * window])
    at = torch.tensor(sorted({0} | {end + step for end in ends for step in (-1, 0, 1)}))
    row, column = at[:, None], at[None, :]
    zero = torch.zeros((), dtype=torch.int64)
    found = torch.as_tensor(function(zero, zero, row, column))
    expected = column <= row
    if window is not None:
        expected &= column > row - window
    return bool((found == expected).all())


def _configs(model: nn.Module) -> list[Any]:
    """The configurations that the modules of a model read, and those within them, outer ones first."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if hasattr(config, "to_dict") and hasattr(config, "_attn_implementation") and id(config) not in found:
            found[id(config)] = config
            for name in getattr(config, "sub_configs", ()):
                add(getattr(config, name, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())


@functools.cache
def register() -> None:
    """Once, when a model is first read in packs: importing transformers' modeling takes seconds."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionInterface.register(ASKING, _attend_asking)
    AttentionMaskInterface.register(ASKING, _mask_asked)
