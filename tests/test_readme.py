"""The README's code runs as it stands, and names what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

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


def test_the_other_lines_of_the_readme_score_with_adapters_off_and_train_without_logits(tiny):
    lora, linear = SNIPPETS[1:]
    names = {"fs": fs, "peft": pytest.importorskip("peft"), "base": tiny("llama")}
    exec(lora, names)
    ids = torch.randint(3, 97, (4, 12), generator=torch.Generator().manual_seed(0))
    (batch,) = fs.FlowStream([{"input_ids": ids, "labels": ids}], names["scorer"])
    names |= {"model": names["base"], "labels": batch.pop("labels"), "weight": batch.pop("flow_weight"), "batch": batch}
    exec(linear, names)
    expected = fs.weighted_lm_loss(names["base"](**batch).logits, names["labels"], names["weight"])
    torch.testing.assert_close(names["loss"], expected)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\bfs\.(\w+)", README.read_text()))))
def test_names_in_the_readme_are_public(name):
    assert name in fs.__all__


def test_no_placeholder_and_no_dead_link_is_left():
    text = README.read_text()
    assert not re.findall(r"\b[A-Z]+_OUTPUT\b", text)
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (README.parent / target).exists(), target
