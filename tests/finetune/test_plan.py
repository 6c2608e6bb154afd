"""The plan of a run, against independent counts: parameters, bytes that an optimizer holds, batches of a loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning import problems, save_model
from tiny_tokenizers import write_lines

from flowstream.finetune.loading import Material
from flowstream.finetune.plan import Plan, plan_of
from flowstream.finetune.pretrained import empty_models, load_model, load_tokenizer
from flowstream.finetune.settings import Settings, Texts

NUM = 46


class Place:
    def __init__(self, folder: Path) -> None:
        self.model = save_model(folder / "model")
        self.wide = save_model(folder / "wide", hidden_size=64)
        self.texts = write_lines(folder / "train.jsonl", problems(NUM))
        self.encoder = Texts(max_length=64).encoder(load_tokenizer(self.model))
        self.material = Material.of(self.texts, self.encoder, split="train")

    def settings(self, **options: Any) -> Settings:
        return Settings(**{"model": self.model, "data": self.texts, "out": Path("out"), "batch_size": 4} | options)

    def plan(self, *, material: Material | None = None, world_size: int = 1, **options: Any) -> Plan:
        settings = self.settings(**options)
        models = empty_models(settings)
        return plan_of(settings, material or self.material, *models, torch.device("cpu"), world_size)

    def num_batches(self, batch_size: int) -> int:
        return len(list(self.material.loader(self.encoder, batch_size=batch_size, seed=0)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("plan"))


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"lora_rank": 2, "bf16": True}])
def test_parameters_and_bytes_are_those_of_the_loaded_model(options: dict[str, Any], place: Place) -> None:
    plan, model = place.plan(**options), load_model(place.settings(**options))
    ids = torch.arange(3, 11)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    held = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held += [parameter.grad for parameter in trained]
    assert plan.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert plan.num_trainable == sum(parameter.numel() for parameter in trained)
    assert plan.model_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert plan.training_bytes == sum(tensor.nbytes for tensor in held if tensor is not None)
    assert plan.reference_bytes == (0 if options else plan.model_bytes)


def test_another_reference_counts_with_its_own_size(place: Place) -> None:
    wide = place.plan(model=place.wide)
    plan = place.plan(reference=place.wide)
    assert plan.reference_bytes == wide.model_bytes
    assert plan.share_of_training / place.plan().share_of_training == pytest.approx(
        wide.num_parameters / plan.num_parameters
    )
    assert place.plan(reference=place.wide, bf16=True).reference_bytes == wide.model_bytes // 2


def test_steps_are_the_batches_of_the_loader_in_groups(place: Place) -> None:
    assert place.plan().num_steps == place.num_batches(4)
    assert place.plan(epochs=3).num_steps == 3 * place.num_batches(4)
    assert place.plan(accumulate=4, epochs=2).num_steps == 2 * -(-place.num_batches(4) // 4)
    assert place.plan(world_size=2, batch_size=2).num_steps == place.num_batches(4)
    assert place.plan(epochs=0.01).num_steps == 1
    assert place.plan(max_steps=5).num_steps == 5
    assert place.plan(epochs=2).num_trained == 2 * NUM


def test_a_resampled_epoch_has_as_many_steps_as_are_expected_to_be_kept(place: Place) -> None:
    plan = place.plan(mode="resample", epochs=10)
    assert plan.num_steps == 10 * 0.4 * place.num_batches(4)
    assert plan.num_trained == 4 * plan.num_steps


def test_what_is_scored(place: Place) -> None:
    assert place.plan(epochs=3).num_scored == NUM  # kept from the first epoch on
    assert place.plan(epochs=3, cache="none").num_scored == 3 * NUM
    assert place.plan(max_steps=1).num_scored == NUM  # all are in the first window
    shards = Material(None, "")
    assert place.plan(material=shards, max_steps=1).num_scored == 1024 + 256
    assert place.plan(material=shards, max_steps=1000).num_scored == 4000 + 256
    assert place.plan(material=shards, max_steps=1000, mode="resample").num_scored == 10_000 + 256
    assert place.plan(material=shards, max_steps=1000, world_size=2).num_scored == 8000 + 2 * 256


def test_the_cost_of_scoring_is_a_third_and_of_adapters_about_a_half(place: Place) -> None:
    assert place.plan().share_of_training == pytest.approx(1 / 3)
    assert place.plan(gradient_checkpointing=True).share_of_training == pytest.approx(1 / 4)
    adapted = place.plan(lora_rank=1)
    trained = adapted.num_trainable / adapted.num_parameters
    assert adapted.share_of_training == pytest.approx(1 / (2 + trained))


def test_shards_need_a_number_of_steps(place: Place) -> None:
    with pytest.raises(ValueError, match="nobody knows how many samples shards have: give --max-steps"):
        place.plan(material=Material(None, ""))


def test_its_lines_fit_a_terminal(place: Place) -> None:
    for options in ({}, {"lora_rank": 2, "bf16": True}, {"mode": "resample", "max_steps": 100_000}):
        rows = place.plan(**options).rows()
        width = max(len(name) for name, _ in rows)
        assert all(width + 2 + len(value) <= 80 for _, value in rows), rows
