"""What the reference says of the samples to learn: scored once, told on the way, and gone on with after a kill."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from finetuning import save_model
from transformers import LlamaModel

import flowstream as fs
from flowstream.compare.material import Material
from flowstream.compare.reference import load_reference, score
from flowstream.finetune.encoding import Encoded
from flowstream.finetune.tokens import TokenDataset

NUM = 600  # more than two windows


def samples(num: int, seed: int) -> TokenDataset:
    draws = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 97, (5,), generator=draws).tolist() for _ in range(num)]
    return TokenDataset.of(Encoded(ids=ids, labels=[-100, -100, *ids[2:]]) for ids in rows)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    names = ("validation", "test", "general_validation", "general_test")
    parts = {name: samples(4, seed) for seed, name in enumerate(names)}
    model = save_model(tmp_path_factory.mktemp("reference") / "model", num_hidden_layers=1)
    return Material(model=model, pad_id=0, train=samples(NUM, 9), **parts)


@pytest.fixture(scope="module")
def losses(material: Material) -> Any:
    """[n, 3], by one plain forward pass."""
    ids = torch.stack([material.train[index]["input_ids"] for index in range(NUM)])
    logits = load_reference(material.model)(input_ids=ids).logits[:, 1:-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 2:], reduction="none").double().numpy()


@contextmanager
def forwards() -> Iterator[list[int]]:
    """Tokens of each forward pass of any model."""
    found: list[int] = []

    def seen(module: Any, args: Any, output: Any) -> None:
        if isinstance(module, LlamaModel):
            found.append(output.last_hidden_state[..., 0].numel())

    handle = torch.nn.modules.module.register_module_forward_hook(seen)
    try:
        yield found
    finally:
        handle.remove()


def test_samples_and_tokens_are_scored_once_and_told_on_the_way(
    material: Material, losses: Any, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    found = score(material, tmp_path / "losses", levels=("sample", "token"), on_scored=lambda *now: told.append(now))
    of_samples = losses.mean(1)
    tau = np.sort(of_samples)[(NUM - 1) // 2]
    weight = np.exp(-of_samples / tau)
    assert (found.tau, found.mean_weight) == pytest.approx((tau, weight.mean()), rel=1e-4)
    assert found.ess == pytest.approx(weight.sum() ** 2 / (weight**2).sum() / NUM, rel=1e-4)
    assert told[-1] == (2 * NUM, 2 * NUM)
    assert told == sorted(told)
    assert len(told) == 2 * math.ceil(NUM / 32)
    assert not (tmp_path / "losses.partial").exists()
    scorer = fs.CausalLMScorer(load_reference(material.model))
    with (
        forwards() as read,
        fs.FlowStream(
            material.loader(batch_size=50, seed=0),
            scorer,
            level="token",
            temperature=fs.FixedTemperature(2.0),
            cache=tmp_path / "losses",
        ) as stream,
    ):
        for batch in stream:
            expected = np.exp(-losses[batch["sample"].numpy()] / 2)
            np.testing.assert_allclose(batch["flow_weight"][:, 2:].numpy(), expected, atol=2e-3)  # kept in fp16
    assert not read


@pytest.mark.parametrize("stop_at", [1, NUM // 32 + 1])
def test_stopped_on_the_way_it_finds_again_what_was_scored(material: Material, tmp_path: Path, stop_at: int) -> None:
    def stop(done: int, of: int) -> None:
        if done >= min(stop_at * 32, of):
            raise KeyboardInterrupt

    with forwards() as at_once:
        whole = score(material, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        score(material, tmp_path / "losses", on_scored=stop)
    assert [path.name for path in tmp_path.glob("losses*")] == ["losses.partial"]
    with forwards() as again:
        assert score(material, tmp_path / "losses") == whole
    assert sum(again) <= sum(at_once) - 256 * 4  # a window; the last token of a sample is not read
    with forwards() as known:  # killed before anybody was told
        assert score(material, tmp_path / "losses") == whole
    assert sum(known) == sum(at_once) - NUM * 4
    assert [path.name for path in tmp_path.glob("losses*")] == ["losses"]


def test_without_a_level_nothing_is_scored(material: Material, tmp_path: Path) -> None:
    found = score(material, tmp_path / "losses", levels=())
    assert math.isnan(found.tau)
    assert math.isnan(found.mean_weight)
    assert found.validation.target_loss > 0
    assert not list(tmp_path.iterdir())


def test_a_fingerprint_is_of_every_weight(material: Material, tmp_path: Path) -> None:
    found = score(material, tmp_path / "losses", levels=())
    model = load_reference(material.model)
    model.lm_head.weight[7, 3] += 1e-6
    model.save_pretrained(tmp_path / "other")
    other = Material(**{**vars(material), "model": str(tmp_path / "other")})
    changed = score(other, tmp_path / "losses", levels=())
    assert found.fingerprint != changed.fingerprint
    assert score(material, tmp_path / "losses", levels=()).fingerprint == found.fingerprint
