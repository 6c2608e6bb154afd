"""What all methods share: splits that are disjoint, one order for all loaders of a seed, and a file to find it in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finetuning import problems, save_model
from tiny_tokenizers import write_lines

from flowstream.compare.material import Material, read_material
from flowstream.compare.settings import Settings
from flowstream.finetune.settings import Texts
from flowstream.finetune.tokens import TokenDataset


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("material")
    general = folder / "general.txt"
    general.write_text("how are you and what is in this text that is no problem " * 20)
    return Settings(
        model=save_model(folder / "model", num_hidden_layers=1),
        data=write_lines(folder / "train.jsonl", problems(80)),
        general=str(general),
        texts=Texts(max_length=32),
        max_evaluated=6,
    )


def rows(dataset: TokenDataset) -> list[tuple[int, ...]]:
    return [tuple(dataset[index]["input_ids"].tolist()) for index in range(len(dataset))]


def test_splits_are_disjoint_and_no_sample_is_lost_that_is_in_none(settings: Settings) -> None:
    material = read_material(settings)
    train, validation, test = (rows(getattr(material, name)) for name in ("train", "validation", "test"))
    assert len(validation) == len(test) == 6
    assert not set(train) & set(validation)
    assert not set(train) & set(test)
    assert not set(validation) & set(test)
    assert settings.data is not None
    assert set(train) | set(validation) | set(test) == set(
        rows(read_material(replace(settings, **given(settings))).train)
    )
    general = rows(material.general_validation), rows(material.general_test)
    assert [len(part) for part in general] == [6, 6]
    assert read_material(settings).fingerprint == material.fingerprint


def given(settings: Settings) -> dict[str, Any]:
    """Held-out texts that have nothing in common with the data, nor with each other."""
    assert settings.data is not None
    return {
        name: write_lines(
            Path(settings.data).with_name(f"other-{name}.jsonl"),
            [{"prompt": "thanks " * 3, "response": f"{name} {k}"} for k in range(8)],
        )
        for name in ("validation", "test")
    }


def test_what_is_in_a_given_test_set_is_not_learnt(settings: Settings) -> None:
    assert settings.data is not None
    test = write_lines(Path(settings.data).with_name("test.jsonl"), problems(80)[:20])
    material = read_material(replace(settings, test=test))
    assert not set(rows(material.train)) & set(
        rows(read_material(replace(settings, data=test, **given(settings))).train)
    )


def test_a_choice_that_has_seen_the_test_is_refused(settings: Settings) -> None:
    assert settings.data is not None
    held_out = given(settings)
    seen = [json.loads(line) for line in Path(held_out["test"]).read_text().splitlines()][:3]
    both = write_lines(Path(settings.data).with_name("both.jsonl"), [*problems(5, seed=9), *seen])
    told = rf"--test {held_out['test']} has 3 samples that are in --validation {both}, too: .* Leave them out of one"
    with pytest.raises(ValueError, match=told):
        read_material(replace(settings, test=held_out["test"], validation=both))
    general = write_lines(Path(settings.data).with_name("general.jsonl"), [*seen, *problems(80)[:2]])
    with pytest.raises(
        ValueError, match=rf"--general {general} has 2 texts that are in --data .* Leave them out of one"
    ):
        read_material(replace(settings, general=general))


def test_a_text_that_is_there_twice_is_not_in_both_halves(settings: Settings) -> None:
    assert settings.data is not None
    texts = [{"prompt": "how are you", "response": f"thanks {k}"} for k in range(4)]
    general = write_lines(Path(settings.data).with_name("repeated.jsonl"), [row for row in texts for _ in range(2)])
    material = read_material(replace(settings, general=general))
    validation, test = rows(material.general_validation), rows(material.general_test)
    assert len(validation) == len(test) == 2
    assert not set(validation) & set(test)


def test_fewer_samples_are_drawn_from_all_the_same_every_time(settings: Settings) -> None:
    whole, drawn, again = (read_material(replace(settings, max_samples=num)) for num in (None, 20, 20))
    assert drawn.fingerprint == again.fingerprint
    some, every = rows(drawn.train), rows(whole.train)
    assert len(some) == 20
    places = [every.index(row) for row in some]
    assert places == sorted(places)
    assert max(places) > 40
    assert rows(drawn.test) == rows(whole.test)
    assert read_material(replace(settings, max_samples=1000)).fingerprint == whole.fingerprint


def test_every_loader_of_a_seed_has_one_order_and_each_pass_another(settings: Settings) -> None:
    material = read_material(settings)

    def order(seed: int, only: frozenset[int] | None = None, num_passes: int = 1) -> list[list[int]]:
        loader = material.loader(batch_size=4, seed=seed, only=only)
        return [[number for batch in loader for number in batch["sample"].tolist()] for _ in range(num_passes)]

    assert order(0) == order(0)
    assert order(0) != order(1)
    first, second = order(0, num_passes=2)
    assert first != second
    assert len(first) == len(set(first)) == len(material.train) // 4 * 4
    assert sorted(order(0, frozenset(range(10, 18)))[0]) == list(range(10, 18))
    in_order = [number for batch in material.loader(batch_size=4, seed=None) for number in batch["sample"].tolist()]
    assert in_order == list(range(len(material.train)))


def test_a_file_gives_back_what_was_saved_and_finds_a_model_beside_it(settings: Settings, tmp_path: Path) -> None:
    material = read_material(settings)
    material.save(tmp_path / "material.safetensors")
    loaded = Material.load(tmp_path / "material.safetensors")
    assert (loaded.fingerprint, loaded.model, loaded.pad_id) == (material.fingerprint, settings.model, material.pad_id)
    replace(material, model=str(tmp_path / "checkpoint")).save(tmp_path / "material.safetensors")
    tmp_path.rename(moved := tmp_path.with_name("moved"))
    assert Material.load(moved / "material.safetensors").model == str(moved / "checkpoint")


@pytest.mark.parametrize(
    ("lrs", "further"),
    [
        ("2e-4,4e-4", [1e-4, 2**0.5 * 1e-4, 2**1.5 * 1e-4]),
        ("1e-3", [5e-4, 2**-0.5 * 1e-3]),
        ("1e-3,1.2e-3", [5e-4, 2**-0.5 * 1e-3]),
    ],
)
def test_standards_rates_are_at_most_a_root_of_2_apart_from_half_of_the_lowest(lrs: str, further: list[float]) -> None:
    assert Settings(lrs=lrs).dense_rates == pytest.approx(further)
