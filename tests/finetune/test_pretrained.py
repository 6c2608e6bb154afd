"""A model, its tokenizer and its reference are what was asked for, or an error says in a line what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build
from finetuning import save_model

from flowstream.finetune.encoding import Encoded
from flowstream.finetune.pretrained import (
    check_fits,
    empty_models,
    load_config,
    load_model,
    load_reference,
    load_scorer,
    load_tokenizer,
)
from flowstream.finetune.settings import Settings
from flowstream.finetune.tokens import TokenDataset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("pretrained") / "model")


def settings(path: str, **options: Any) -> Settings:
    return Settings(model=path, data="x.jsonl", out=Path("out"), **options)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"lora_rank": 2}, {"lora_rank": 2, "bf16": True}])
def test_shapes_without_weights_are_those_of_the_model(options: dict[str, Any], path: str) -> None:
    model, (empty, reference) = load_model(settings(path, **options)), empty_models(settings(path, **options))
    assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()} == {
        name: (p.shape, p.dtype, p.requires_grad) for name, p in empty.named_parameters()
    }
    assert all(p.is_meta for p in empty.parameters())
    assert (reference is None) == ("lora_rank" in options)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_the_reference_of_adapters_is_the_base_and_else_a_model_of_its_own(path: str) -> None:
    assert load_reference(settings(path, lora_rank=2), CPU) is None
    assert load_reference(settings(path), CPU) is not None
    assert load_reference(settings("nothing", reference=path), CPU) is not None


def test_a_tokenizer_that_cannot_pad_pads_with_its_end(path: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(Path(path, "config.json"), tmp_path)
    found = load_tokenizer(str(tmp_path))
    assert found.pad_token_id == found.eos_token_id
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end-of-sequence token: set eos_token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("load", [load_tokenizer, load_config])
def test_a_path_where_no_model_is_says_so(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no config.json: give a folder that save_pretrained wrote"):
        load(str(tmp_path))
    for name in (str(tmp_path / "no"), "./no", "a/b/c"):
        with pytest.raises(ValueError, match="there is no folder .* or a name on the Hub"):
            load(name)


def test_what_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    build("t5").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a t5, which is no causal language model"):
        empty_models(settings(str(tmp_path)))


def test_weights_that_are_not_there_are_told_in_a_line(path: str, tmp_path: Path) -> None:
    shutil.copy(Path(path, "config.json"), tmp_path)
    with pytest.raises(ValueError, match="has no causal language model that could be loaded") as raised:
        load_scorer(str(tmp_path), bf16=False, device=CPU)
    assert "\n" not in str(raised.value)
    Path(tmp_path, "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(ValueError, match="unheard-of") as raised:
        load_config(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_samples_that_the_model_cannot_read_are_refused_before_it_is_loaded(path: str) -> None:
    config, tokenizer = load_config(path), load_tokenizer(path)

    def check(ids: list[int]) -> None:
        check_fits("tiny", config, tokenizer, TokenDataset.of([Encoded(ids=ids, labels=[-100, *ids[1:]])]), "x.jsonl")

    check([5] * 128)
    with pytest.raises(ValueError, match="x.jsonl has a sample of 129 tokens, and tiny reads 128: set --max-length"):
        check([5] * 129)
    with pytest.raises(ValueError, match="its tokenizer gives the id 9999"):
        check([5, 9999])
