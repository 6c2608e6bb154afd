"""The last layer on some rows, against all of it on all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flowstream.scoring.last_layer import LabelledRows

LENGTH = 9


def hidden_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.base_model(input_ids=torch.arange(3, 3 + LENGTH)[None], use_cache=False)[0]
    return out


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "phi", "opt", "gpt2", "mixtral", "olmo2", "deepseek_v3"])
@pytest.mark.parametrize("rows", [[0], [8], [2, 3, 7], list(range(LENGTH))])
def test_rows_that_are_wanted_come_out_as_ever(tiny: Any, name: str, rows: list[int]) -> None:
    model = tiny(name)
    expected = hidden_of(model)
    with LabelledRows(model).only(torch.tensor(rows), LENGTH):
        found = hidden_of(model)
    torch.testing.assert_close(found[:, rows], expected[:, rows], rtol=1e-5, atol=1e-5)
    assert hidden_of(model).equal(expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2_moe", "phi"])
def test_only_wanted_rows_are_computed(tiny: Any, name: str) -> None:
    model, sizes = tiny(name), []
    for layer in model.base_model.layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp):
            module.forward = _recording(module.forward, sizes)
    with LabelledRows(model).only(torch.tensor([2, 5]), LENGTH):
        hidden_of(model)
    first, last = sizes[:3], sizes[3:]
    assert first == [LENGTH] * 3
    assert sorted(last) == [2, 2, LENGTH]  # the keys are needed of all


def _recording(forward: Any, sizes: list[int]) -> Any:
    def recorded(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(hidden.shape[1])
        return forward(hidden, *args, **kwargs)

    return recorded


def test_hooks_are_gone_afterwards_and_when_the_forward_raises(tiny: Any) -> None:
    model = tiny("llama")
    with pytest.raises(KeyError), LabelledRows(model).only(torch.tensor([1]), LENGTH):
        raise KeyError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_is_built_otherwise_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    rows = LabelledRows(model)
    assert rows.attention is None
    with rows.only(torch.tensor([0]), 3):
        assert model(torch.ones(1, 3, 2)).shape == (1, 3, 2)
