"""The README's code runs as it stands, and names what is there."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import accelerate
import lightning.pytorch as pl
import pytest
import torch
import trl_trainers
from torch.utils.data import DataLoader
from trainers import Texts, arguments, collate, sure_model

import flowstream as fs

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_ten_lines_of_the_readme_train_a_model(tiny):
    code = SNIPPETS[0]
    assert len(code.strip().splitlines()) <= 12
    model = tiny("llama")
    ids = torch.randint(3, 97, (64, 12), generator=torch.Generator().manual_seed(0))
    loader = [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in ids.split(8)]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    names = {"pretrained_model": model, "model": model, "loader": loader, "optimizer": optimizer}
    exec(code, names)
    assert names["loss"].item() > 0
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def snippet(word: str) -> str:
    """The one piece of code that has the word."""
    (found,) = [code for code in SNIPPETS if word in code]
    return found


def untrained(model):
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def assert_trained(model, before):
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_from_trainer(tmp_path):
    model = sure_model()
    before = untrained(model)
    names = {"model": model, "dataset": Texts(), "collate": collate, "args": arguments(tmp_path, max_steps=2)}
    exec(snippet("FlowTrainer("), names)
    assert_trained(model, before)
    assert "flow/tau" in names["trainer"].flow_stream.metrics()


def test_from_trl(tmp_path):
    model = trl_trainers.model()
    before = untrained(model)
    names = {
        "model": model,
        "conversations": trl_trainers.conversations(8),
        "tokenizer": trl_trainers.tokenizer(trl_trainers.TEMPLATE),
        "sft_args": trl_trainers.arguments(tmp_path, max_steps=2),
    }
    exec(snippet("FlowSFTTrainer("), names)
    assert_trained(model, before)


def test_from_a_plain_loop(tiny, tmp_path, monkeypatch):
    (changes,) = re.findall(r"```diff\n(.*?)```", README.read_text(), flags=re.DOTALL)
    code = "\n".join(line[1:] for line in changes.splitlines() if line[:1] in "+ ")
    monkeypatch.chdir(tmp_path)
    model = tiny("llama")
    before = untrained(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = [collate(Texts().rows[first : first + 4]) for first in range(0, 16, 4)]
    names = {"fs": fs, "torch": torch, "model": model, "loader": loader, "optimizer": optimizer}
    exec(code, names | {"device": "cpu", "step": 0})
    assert_trained(model, before)
    assert (tmp_path / "model.pt").exists()
    assert list((tmp_path / "stream").iterdir())


def test_from_accelerate(tiny):
    loader = DataLoader(Texts(), batch_size=4, collate_fn=collate)
    model = tiny("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    names = {"fs": fs, "model": model, "optimizer": optimizer, "loader": loader}
    names["accelerator"] = accelerate.Accelerator(cpu=True)
    exec(snippet("import prepare"), names)
    batch = next(iter(names["loader"]))
    assert {"flow_weight", "flow_denominator"} <= batch.keys()


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_from_lightning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = sure_model()
    before = untrained(model)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    names = {
        "fs": fs,
        "model": model,
        "loader": DataLoader(Texts(), batch_size=4, collate_fn=collate),
        "Trainer": functools.partial(pl.Trainer, accelerator="cpu", **quiet),
    }
    code = snippet("FlowCallback(").replace("max_steps=1000", "max_steps=2").replace('"last"', "None")
    exec(code, names)
    assert_trained(model, before)


def test_the_other_lines_of_the_readme_score_with_adapters_off_and_train_without_logits(tiny):
    lora, linear = snippet("peft.get_peft_model"), snippet("weighted_linear_cross_entropy")
    names = {"fs": fs, "peft": pytest.importorskip("peft"), "base": tiny("llama")}
    exec(lora, names)
    ids = torch.randint(3, 97, (4, 12), generator=torch.Generator().manual_seed(0))
    (batch,) = fs.FlowStream([{"input_ids": ids, "labels": ids}], names["scorer"])
    names |= {"model": names["base"], "labels": batch.pop("labels"), "weight": batch.pop("flow_weight"), "batch": batch}
    exec(linear, names)
    expected = fs.weighted_lm_loss(names["base"](**batch).logits, names["labels"], names["weight"])
    torch.testing.assert_close(names["loss"], expected)


def test_companions_train_together(tiny):
    model, reference = tiny("llama"), tiny("llama")
    before = untrained(model)
    ids = torch.randint(3, 97, (8, 12), generator=torch.Generator().manual_seed(0))
    stream = fs.FlowStream([{"input_ids": part, "labels": part} for part in ids.split(4)], fs.CausalLMScorer(reference))
    names = {"fs": fs, "torch": torch, "model": model, "reference": reference, "stream": stream}
    exec(snippet("fs.MoFO("), names)
    assert_trained(model, before)
    assert all(torch.equal(dict(model.named_parameters())[name], before[name]) for name in names["mask"].frozen)
    torch.testing.assert_close(
        names["between"].lm_head.weight, before["lm_head.weight"].lerp(model.lm_head.weight, 0.5)
    )


def test_a_new_head_comes_first(tiny):
    draws = torch.Generator().manual_seed(0)
    loader = [(torch.randn(4, 3, 8, 8, generator=draws), torch.arange(4)) for _ in range(2)]
    pretrained = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(192, 7))
    names = {"fs": fs, "pretrained": pretrained, "num_classes": 4, "loader": loader}
    code = snippet("fs.linear_probe(").replace("steps=1000", "steps=2")
    exec(code, names | {"tuned": fs.linear_probe(pretrained, 4, loader, steps=1)}, found := {})
    assert torch.equal(found["before"][2].weight, pretrained[2].weight)
    assert len(next(iter(found["stream"]))) == 3


def test_rehearsal_hears_of_the_tuned_model(tiny):
    model, scorer = tiny("llama"), fs.CausalLMScorer(tiny("llama"))
    ids = torch.randint(3, 97, (64, 12), generator=torch.Generator().manual_seed(0))
    prior = [{"input_ids": row, "labels": row} for row in ids[:40]]
    loader = [{"input_ids": part, "labels": part} for part in ids[16:].split(4)]
    names = {"fs": fs, "model": model, "scorer": scorer, "prior": prior, "loader": loader}
    exec(snippet("fs.Rehearsal("), names)
    next(iter(names["stream"]))  # what was told of the first window goes into the next
    assert names["stream"].rehearsal.counts().sum() > 0


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\bfs\.(\w+)", README.read_text()))))
def test_names_in_the_readme_are_public(name):
    assert name in fs.__all__


def test_no_placeholder_and_no_dead_link_is_left():
    text = README.read_text()
    assert not re.findall(r"\b[A-Z]+_OUTPUT\b", text)
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (README.parent / target).exists(), target
