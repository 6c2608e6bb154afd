"""Kernels of causal attention within the samples of a pack, and which one is taken."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

_logger = logging.getLogger("flowstream")


class Bounds(Protocol):
    """Where the samples of a pack lie (`packing.Pack`)."""

    @property
    def bounds(self) -> Iterator[tuple[int, int]]: ...
    @property
    def offsets(self) -> Tensor: ...
    @property
    def length(self) -> int: ...
    @property
    def max_length(self) -> int: ...


Kernel = Callable[..., Tensor]
"""query [1, H, T, D], key and value [1, H or fewer, T, D], pack, scale, window (keys that a query sees, its own
included), softcap → [1, T, H, D]."""


def over_pack(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: Bounds,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    first: Sequence[int] | None = None,
) -> Tensor:
    """[1, T, H, D] causal attention within each sample; of each, only queries from `first` on are needed."""
    kernel = _kernel(query.device, query.dtype, query.shape[-1], value.shape[-1], softcap is not None)
    if kernel is by_sample:
        return by_sample(query, key, value, pack, scale, window, softcap, first)
    return kernel(query, key, value, pack, scale, window, softcap)


@functools.cache
def _kernel(device: torch.device, dtype: torch.dtype, dim: int, value_dim: int, capped: bool) -> Kernel:
    """The fastest kernel that computes what is asked. `by_sample` computes everything, everywhere."""
    kernel: Kernel = by_sample
    if device.type == "cuda":
        flash = (
            dtype in (torch.float16, torch.bfloat16)
            and dim == value_dim <= 256
            and dim % 8 == 0
            and torch.cuda.get_device_capability(device) >= (8, 0)
        )
        if flash and not capped and _spec("torch.nn.attention.varlen"):
            kernel = by_varlen
        elif flash and _spec("flash_attn"):
            kernel = by_flash_attn
        elif capped and dim == value_dim >= 16 and dim & (dim - 1) == 0 and _spec("triton"):
            kernel = by_flex
    _logger.info(
        "attention over packs: %s (%s, %s, heads of %d%s)",
        kernel.__name__.removeprefix("by_"),
        device.type,
        dtype,
        dim,
        ", softcap" if capped else "",
    )
    return kernel


def _spec(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def by_sample(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: Bounds,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    first: Sequence[int] | None = None,
) -> Tensor:
    """A sample at a time. On a CPU nothing is faster; on a GPU it costs a launch a sample."""
    heads = query.shape[1]
    out = query.new_zeros(1, query.shape[2], heads, value.shape[-1])
    shared = key.shape[1] != heads
    for number, (start, stop) in enumerate(pack.bounds):
        begin = start if first is None else first[number]
        queries, keys, values = query[:, :, begin:stop], key[:, :, start:stop], value[:, :, start:stop]
        whole = begin == start and (window is None or stop - start <= window)
        mask = None if whole and softcap is None else _band(stop - begin, stop - start, window, query.device)
        if softcap is None:
            found = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=shared
            )
        else:
            assert mask is not None
            found = _capped(queries, keys, values, mask, scale, softcap)
        out[:, begin:stop] = found.transpose(1, 2)
    return out


def _band(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool: what each of the last queries sees."""
    column = torch.arange(num_keys, device=device)
    row = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    mask = column <= row
    return mask if window is None else mask & (column > row - window)


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, softcap: float) -> Tensor:
    """As the model's own eager attention: the softmax in fp32, the rest in the model's dtype."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, float("-inf"))
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def by_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: Bounds,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """torch's own variable-length attention: one launch. Half precision, no softcap."""
    from torch.nn.attention.varlen import varlen_attn

    further: dict[str, Any] = {"scale": scale, "window_size": ((window or 0) - 1, 0)}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in _parameters(varlen_attn):
            further["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    out = varlen_attn(q, k, v, pack.offsets, pack.offsets, pack.max_length, pack.max_length, **further)
    assert isinstance(out, Tensor)  # no auxiliary result was asked for
    return out[None]


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def by_flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: Bounds,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The flash-attn package, which knows softcaps."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]

    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    out: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        pack.offsets,
        pack.offsets,
        pack.max_length,
        pack.max_length,
        softmax_scale=scale,
        causal=True,
        window_size=((window or 0) - 1, 0),
        softcap=softcap or 0.0,
    )
    return out[None]


def by_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: Bounds,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """torch's flex attention, compiled on a GPU: softcaps and windows in one launch."""
    from torch.nn.attention.flex_attention import flex_attention

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if softcap is None else torch.tanh(score / softcap) * softcap

    flex: Any = flex_attention
    attend = _compiled(flex) if query.is_cuda else flex
    shared = query.shape[1] != key.shape[1]
    mask = _blocks(pack, window)
    out: Tensor = attend(query, key, value, score_mod=capped, block_mask=mask, scale=scale, enable_gqa=shared)
    return out.transpose(1, 2)


_BLOCK = 128

_masks: WeakKeyDictionary[Any, dict[int | None, Any]] = WeakKeyDictionary()
"""Of a pack, what each kind of layer sees: made once for all layers."""


def _blocks(pack: Bounds, window: int | None) -> Any:
    """A `BlockMask`: of each block of queries, the blocks of keys from the first that one of them sees to its own.

    flex attention's `create_block_mask` would look at all pairs of tokens.
    """
    from torch.nn.attention.flex_attention import BlockMask

    made = _masks.setdefault(pack, {})
    if window in made:
        return made[window]
    offsets = pack.offsets.to(torch.int64)
    stops = offsets[1:].contiguous()
    sample = torch.searchsorted(stops, torch.arange(pack.length, device=offsets.device), right=True)

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (sample[i] == sample[j]) & (j <= i)
        return seen if window is None else seen & (j > i - window)

    block = torch.arange(-(-pack.length // _BLOCK), device=offsets.device)
    row = block * _BLOCK
    seen_from = offsets[torch.searchsorted(stops, row, right=True)]
    if window is not None:
        seen_from = torch.maximum(seen_from, row - window + 1)
    first = seen_from // _BLOCK
    counts = (block - first + 1).to(torch.int32)
    indices = torch.minimum(first[:, None] + block, block[-1]).to(torch.int32)
    made[window] = BlockMask.from_kv_blocks(
        counts[None, None],
        indices[None, None],
        BLOCK_SIZE=_BLOCK,
        mask_mod=sees,
        seq_lengths=(pack.length, pack.length),
    )
    return made[window]


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
