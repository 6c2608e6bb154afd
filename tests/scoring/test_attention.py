"""Kernels of attention over packs, against a plain softmax of each sample in fp64."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowstream.scoring import attention
from flowstream.scoring.packing import Pack, offsets_of


def make_pack(lengths: tuple[int, ...], filled: int, first: list[int] | None = None, device: str = "cpu") -> Pack:
    stops = np.cumsum(lengths).tolist()
    length = stops[-1] + filled
    offsets = torch.from_numpy(offsets_of(stops, length)).to(device, torch.int32)
    starts = [stop - n for stop, n in zip(stops, lengths, strict=True)]
    return Pack(stops, length, torch.arange(length, device=device), starts if first is None else first, offsets)


def make_states(
    pack: Pack, heads: int = 4, kv_heads: int = 2, dim: int = 8, value_dim: int = 8, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    return [torch.randn(1, h, pack.length, d, generator=generator).to(dtype) for h, d in shapes]


def plain(
    query: Tensor, key: Tensor, value: Tensor, pack: Pack, scale: float | None, window: int | None, cap: float | None
) -> Tensor:
    """[1, T, H, D] in fp64, a query at a time; 0 where a pack is filled up."""
    query, key, value = (t[0].double().cpu() for t in (query, key, value))
    heads, groups = len(query), len(query) // len(key)
    out = torch.zeros(pack.length, heads, value.shape[-1], dtype=torch.float64)
    starts = [0, *pack.stops[:-1]]
    for start, stop in zip(starts, pack.stops, strict=True):
        for i, head in itertools.product(range(start, stop), range(heads)):
            begin = start if window is None else max(start, i - window + 1)
            keys, values = key[head // groups, begin : i + 1], value[head // groups, begin : i + 1]
            scores = keys @ query[head, i] * (query.shape[-1] ** -0.5 if scale is None else scale)
            if cap is not None:
                scores = cap * torch.tanh(scores / cap)
            out[i, head] = torch.softmax(scores, 0) @ values
    return out[None]


CASES = {
    "plain": {},
    "scale": {"scale": 0.5},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "window longer than any": {"window": 100},
    "softcap": {"cap": 0.7},
    "softcap and window": {"cap": 0.7, "window": 3, "scale": 1.0},
}


def check(kernel: Any, case: str, tolerance: float, *, device: str = "cpu", filled: int = 3, **shape: Any) -> None:
    settings = {"scale": None, "window": None, "cap": None} | CASES[case]
    pack = make_pack((5, 1, 9, 2), filled, device=device)
    states = make_states(pack, **shape)
    out = kernel(*(t.to(device) for t in states), pack, settings["scale"], settings["window"], settings["cap"])
    assert out.dtype == states[0].dtype
    real = slice(0, pack.stops[-1])
    expected = plain(*states, pack, **settings)
    torch.testing.assert_close(out[:, real].double().cpu(), expected[:, real], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("filled", [0, 3])
@pytest.mark.parametrize(("kv_heads", "value_dim"), [(4, 8), (2, 8), (1, 8), (4, 6), (2, 12)])
def test_by_sample(case: str, filled: int, kv_heads: int, value_dim: int) -> None:
    check(attention.by_sample, case, 1e-5, filled=filled, kv_heads=kv_heads, value_dim=value_dim)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_by_flex(case: str, kv_heads: int) -> None:
    check(attention.by_flex, case, 1e-5, kv_heads=kv_heads)


LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=6).map(tuple)


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 200), st.none() | st.integers(1, 300))
def test_blocks_of_keys_that_flex_attention_looks_at_hold_all_that_is_seen(
    lengths: tuple[int, ...], filled: int, window: int | None
) -> None:
    pack = make_pack(lengths, filled)
    looked_at = attention._blocks(pack, window).to_dense()[0, 0].bool()
    sample = np.repeat(np.arange(len(lengths) + 1), [*lengths, filled])
    row, column = np.arange(pack.length)[:, None], np.arange(pack.length)[None, :]
    seen = (sample[:, None] == sample[None, :]) & (column <= row)
    if window is not None:
        seen &= column > row - window
    blocks = -(-pack.length // 128)
    whole = np.zeros((blocks * 128, blocks * 128), dtype=bool)
    whole[: pack.length, : pack.length] = seen
    needed = torch.from_numpy(whole.reshape(blocks, 128, blocks, 128).any(axis=(1, 3)))
    assert not (needed & ~looked_at).any()
    assert looked_at.equal(looked_at.tril())


@pytest.mark.parametrize("case", CASES)
def test_queries_before_the_first_that_is_needed_are_left_out(case: str) -> None:
    """Of each sample only those from `first` on are looked at: the others may hold anything."""
    settings = {"scale": None, "window": None, "cap": None} | CASES[case]
    first = [4, 5, 8, 16]
    pack = make_pack((5, 1, 9, 2), 2, first)
    query, key, value = make_states(pack)
    expected = plain(query, key, value, pack, **settings)
    needed = torch.zeros(pack.length, dtype=torch.bool)
    for begin, stop in zip(first, pack.stops, strict=True):
        needed[begin:stop] = True
    query[:, :, ~needed] = float("nan")
    out = attention.by_sample(
        query, key, value, pack, settings["scale"], settings["window"], settings["cap"], first=first
    )
    torch.testing.assert_close(out[:, needed].double(), expected[:, needed], rtol=1e-5, atol=1e-5)
    assert not out[:, ~needed].any()


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=5).map(tuple),
    st.integers(0, 4),
    st.none() | st.integers(1, 8),
    st.none() | st.floats(0.5, 50),
)
def test_no_sample_sees_another(lengths: tuple[int, ...], filled: int, window: int | None, cap: float | None) -> None:
    pack = make_pack(lengths, filled)
    query, key, value = make_states(pack)
    out = attention.over_pack(query, key, value, pack, None, window, cap)
    stop = pack.stops[0]
    one = make_pack(lengths[:1], 0)
    alone = attention.over_pack(query[:, :, :stop], key[:, :, :stop], value[:, :, :stop], one, None, window, cap)
    torch.testing.assert_close(out[:, :stop], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_by_sample_in_half_precision(case: str, dtype: torch.dtype) -> None:
    check(attention.by_sample, case, {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype], dtype=dtype)


# On a GPU


def importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("by_varlen", "torch.nn.attention.varlen"),
        ("by_flash_attn", "flash_attn"),
        ("by_flex", "triton"),
        ("by_sample", "torch"),
        ("over_pack", "torch"),
    ],
)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("filled", [0, 111])
@pytest.mark.filterwarnings("ignore")
def test_kernels_on_a_gpu(name: str, module: str, kv_heads: int, filled: int) -> None:
    if not importable(module):
        pytest.skip(f"needs {module}")
    for case in CASES:
        if name == "by_varlen" and "softcap" in case:
            continue
        shape: dict[str, Any] = {"kv_heads": kv_heads, "dim": 32, "value_dim": 32, "dtype": torch.bfloat16}
        check(getattr(attention, name), case, 2e-2, device="cuda", filled=filled, **shape)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_no_fast_kernel_knows_is_computed_on_a_gpu_all_the_same(dtype: torch.dtype) -> None:
    """Value heads of another size, and heads of a size that is no multiple of 8."""
    for case in CASES:
        tolerance = {torch.float32: 1e-3, torch.bfloat16: 2e-2}[dtype]
        check(attention.over_pack, case, tolerance, device="cuda", dim=20, value_dim=12, dtype=dtype)
