"""The switch of a model's attention to packs: what it refuses, and that it leaves no trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flowstream.scoring import packing
from flowstream.scoring.packing import Pack, Packing, Unpackable, asked, offsets_of, reason_against


def make_pack(*lengths: int, filled: int = 0) -> Pack:
    stops = np.cumsum(lengths).tolist()
    length = stops[-1] + filled
    offsets = torch.from_numpy(offsets_of(stops, length)).to(torch.int32)
    first = [stop - n for stop, n in zip(stops, lengths, strict=True)]
    return Pack(stops, length, torch.arange(stops[-1]), first, offsets)


def run(model: Any, pack: Pack) -> Any:
    lengths = np.diff(pack.offsets.numpy())
    ids = torch.arange(3, 3 + pack.length)[None]
    positions = torch.cat([torch.arange(int(n)) for n in lengths])[None]
    with torch.no_grad():
        return model(input_ids=ids, position_ids=positions, use_cache=False)


@pytest.fixture
def llama(tiny: Any) -> Any:
    return tiny("llama")


def test_a_pack_knows_where_its_samples_lie() -> None:
    assert list(make_pack(3, 1, 4).bounds) == [(0, 3), (3, 4), (4, 8)]
    assert make_pack(3, 1, 4).max_length == 4
    assert make_pack(3, 1, filled=7).max_length == 7
    assert offsets_of([3, 4], 4).tolist() == [0, 3, 4]
    assert offsets_of([3, 4], 9).tolist() == [0, 3, 4, 9]


def test_attention_over_packs_without_a_pack_raises(llama: Any) -> None:
    packing.register()
    llama.config._attn_implementation = packing.NAME
    with pytest.raises(Unpackable, match="LlamaAttention is no causal attention over the pack"):
        run(llama, make_pack(3, 4))
    llama.config._attn_implementation = packing.ASKING
    with pytest.raises((Unpackable, AttributeError)):
        run(llama, make_pack(3, 4))


def test_a_pack_ends_with_its_context(llama: Any) -> None:
    pack, had = make_pack(3, 4), llama.config._attn_implementation
    with Packing(llama).of(pack):
        run(llama, pack)
    assert llama.config._attn_implementation == had
    llama.config._attn_implementation = packing.NAME
    with pytest.raises(Unpackable):
        run(llama, pack)


@pytest.mark.parametrize("name", [packing.NAME, packing.ASKING])
def test_attention_over_packs_is_never_what_is_put_back(llama: Any, name: str) -> None:
    llama.config._attn_implementation = name
    for switch in (Packing(llama).of, lambda pack: asked(llama, pack)):
        with pytest.raises(RuntimeError, match=f"attention is '{name}' already: another thread"), switch(make_pack(3)):
            pass


def test_a_batch_of_another_size_than_the_pack_raises(llama: Any) -> None:
    with Packing(llama, trims=False).of(make_pack(3, 4)):
        with pytest.raises(Unpackable, match=r"attends over \[1, 2, 9, 8\], not over a pack of 7"):
            run(llama, make_pack(9))
        with pytest.raises(Unpackable, match="not over a pack of 7"):
            llama(input_ids=torch.ones(2, 7, dtype=torch.long))


def test_a_mask_or_an_argument_that_is_not_known_raises(llama: Any) -> None:
    states = [torch.zeros(1, heads, 7, 8) for heads in (4, 2, 2)]
    module = llama.model.layers[0].self_attn
    with Packing(llama, trims=False).of(make_pack(3, 4)):
        with pytest.raises(Unpackable, match="no causal attention"):
            packing._attend(module, *states, torch.ones(1, 1, 7, 7))
        with pytest.raises(Unpackable, match="hands s_aux, score_bias to its attention"):
            packing._attend(module, *states, None, s_aux=torch.zeros(4), score_bias=1, use_cache=False, head_mask=None)
        module.is_causal = False
        with pytest.raises(Unpackable, match="no causal attention"):
            packing._attend(module, *states, None)


def test_models_tell_their_attention_of_all_that_their_masks_hold(tiny: Any) -> None:
    for name, settings in (
        ("llama", {}),
        ("mistral", {"sliding_window": 4096}),
        ("gemma2", {"sliding_window": 1000}),
        ("gemma3", {"sliding_window": 3}),
        ("gpt2", {}),
    ):
        model, pack = tiny(name, **settings), make_pack(9)
        had = model.config._attn_implementation
        with asked(model, pack):
            model(input_ids=torch.arange(3, 12)[None], use_cache=False)
        assert model.config._attn_implementation == had


@pytest.mark.parametrize("window", [4096, 100_000])
def test_a_model_that_does_not_is_found_out_however_long_its_window(tiny: Any, window: int) -> None:
    model = tiny("phimoe", sliding_window=window)
    with asked(model, make_pack(9)), pytest.raises(Unpackable, match="PhimoeAttention has a mask"):
        model(input_ids=torch.arange(3, 12)[None], use_cache=False)
    other = tiny("mistral", sliding_window=window)
    other.model.layers[1].self_attn.config = other.config
    other.config.sliding_window = window
    for layer in other.model.layers:
        layer.self_attn.sliding_window = window - 1
        layer.self_attn.config = type(other.config)(**(other.config.to_dict() | {"sliding_window": window - 1}))
    with asked(other, make_pack(9)), pytest.raises(Unpackable, match="MistralAttention has a mask"):
        other(input_ids=torch.arange(3, 12)[None], use_cache=False)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "its attention cannot be exchanged"),
        ("lfm2", "it has layers of the kind conv"),
        ("llama4", "it has layers of the kind chunked_attention"),
    ],
)
def test_what_a_configuration_tells_against_packs(tiny: Any, name: str, reason: str) -> None:
    assert reason_against(tiny(name), frozenset({"input_ids", "position_ids"})) == reason


def test_models_without_positions_or_with_convolutions_are_not_packed(llama: Any) -> None:
    assert reason_against(llama, frozenset({"input_ids"})) == "its forward takes no position_ids"
    assert reason_against(llama, frozenset({"position_ids"})) is None
    llama.model.layers[0].conv = nn.Conv1d(4, 4, 3)
    reason = reason_against(llama, frozenset({"position_ids"}))
    assert reason == "it has convolutions or recurrences over the sequence"
