"""`flowstream train` as it is typed: its help, its plan, and what it says of mistakes, in one line."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning import problems, run, save_model, write_shards
from tiny_tokenizers import CHAT, write_lines
from transformers import AutoModelForCausalLM


class Place:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_model(folder / "model")
        self.texts = write_lines(folder / "train.jsonl", problems(20))
        self.shards = write_shards(folder / "shards", problems(20), num_shards=2)

    def options(self, **options: Any) -> dict[str, Any]:
        common = {"model": self.model, "data": self.texts, "out": self.folder / "out", "max_length": 64}
        return common | {"batch_size": 4} | options


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("train"))


def failed(capsys: Any, *arguments: object, **options: object) -> str:
    """The one line in which a command says what is wrong, before it has written anything."""
    assert run("train", *arguments, **options) == 1
    found = capsys.readouterr()
    assert found.err.startswith("flowstream: ")
    assert found.err.count("\n") == 1, found.err
    assert "Traceback" not in found.out + found.err
    return str(found.err)


def test_a_plan_loads_no_weights_and_writes_nothing(place: Place, capsys: Any, tmp_path: Path) -> None:
    shutil.copytree(place.model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    asked = place.options(model=tmp_path / "model", out=tmp_path / "out", dry_run=True, epochs=2, cache=tmp_path / "c")
    before = sorted(tmp_path.rglob("*"))
    assert run("train", **asked) == 0
    assert sorted(tmp_path.rglob("*")) == before
    told = capsys.readouterr()
    assert told.err == ""
    for line in (r"data +20 samples, ", r"steps +10, of 40 samples", r"scoring +at most 20 samples, \+17% of training"):
        assert re.search(line, told.out), told.out


def test_mistakes_are_told_in_one_line_that_says_what_to_do(place: Place, capsys: Any, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    columns = write_lines(tmp_path / "columns.jsonl", [{"question": "how", "answer": "well"}])
    chat = write_lines(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    long = write_lines(tmp_path / "long.jsonl", [{"prompt": "how", "response": "well " * 200}])
    (tmp_path / "file").touch()
    shutil.copytree(place.model, tmp_path / "other")
    (adapters := tmp_path / "adapters").mkdir()
    (adapters / "adapter_config.json").write_text("{}")
    for changed, told in (
        ({"model": tmp_path / "no"}, "there is no folder"),
        ({"model": tmp_path}, "has no config.json"),
        ({"data": tmp_path / "train.jsonl"}, "there is no file"),
        ({"data": place.texts.replace("train", "trian")}, "did you mean"),
        ({"data": empty}, "is empty: there is no sample in it"),
        ({"data": columns}, "Set --prompt-column question --response-column answer"),
        ({"data": chat}, "the tokenizer has no chat template"),
        ({"data": long}, "raise --max-length, or say --overlong truncate or --overlong drop"),
        ({"data": long, "overlong": "drop"}, "raise --max-length"),
        ({"data": long, "max_length": 1000}, "set --max-length 128"),
        ({"data": place.shards}, "give --max-steps"),
        ({"data": "hf:./nowhere"}, "there is no folder"),
        ({"eval": ["train.jsonl"]}, "write name=file"),
        ({"eval": [f"a={tmp_path / 'no.txt'}"]}, "there is no file"),
        ({"out": tmp_path / "file"}, "is a file: give a folder"),
        ({"batch_size": 0}, "--batch-size is 0: give 1 or more"),
        ({"target_ess": 1.5}, "--target-ess is 1.5: give a share between 0 and 1"),
        ({"target_ess": 0.5, "quantile": 0.2}, "give one of them"),
        ({"mode": "resample", "level": "token"}, "use --level sample, or --mode weight"),
        ({"lora_alpha": 4}, "give --lora-rank, too"),
        ({"lora_rank": 4, "reference": place.model}, "leave out --reference"),
        ({"cache": tmp_path / "file"}, f"--cache {tmp_path / 'file'} cannot be made (File exists)"),
        ({"out": tmp_path / "file" / "out"}, "cannot be made (Not a directory): give another folder"),
        ({"out": place.model}, "is the folder of --model, which would be written over: give another"),
        ({"out": tmp_path / "other", "reference": tmp_path / "other"}, "is the folder of --reference"),
        ({"model": adapters}, "holds adapters only, as --no-merge writes them"),
    ):
        assert told in failed(capsys, **place.options(**changed)), changed
    assert not (place.folder / "out" / "checkpoint-1").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [("matplotlib", {}), ("accelerate", {}), ("tensorboard", {}), ("peft", {"lora_rank": 2})],
)
def test_a_package_that_is_missing_is_told_before_the_work(
    name: str, options: dict[str, Any], place: Place, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    told = failed(capsys, **place.options(data="nowhere.jsonl", **options))
    assert told == f"flowstream: {name} is not installed: pip install 'flowstream[train]'\n"


def test_what_is_not_asked_for_need_not_be_installed(
    place: Place, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    importlib.import_module("flowstream.finetune.run")  # transformers looks for both in ways of its own
    for name in ("tensorboard", "peft"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "there is no file" in failed(capsys, **place.options(data="nowhere.jsonl", tensorboard=False))


def test_help_describes_every_option(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        run("train", "--help")
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "None" not in told
    for option in (
        "--model",
        "--data",
        "--mode {weight,resample}",
        "--prompt-column",
        "--resume",
        "--dry-run",
        "--eval",
    ):
        assert option in told


def test_where_resampling_keeps_nothing_no_untrained_model_is_written(place: Place, capsys: Any) -> None:
    out = place.folder / "nothing"
    texts = write_lines(place.folder / "sixty.jsonl", problems(60))
    asked = place.options(data=texts, mode="resample", target_ess=0.2, max_steps=2, tensorboard=False, out=out)
    assert run("train", **asked) == 1
    assert "no step was done, an epoch had no batch left" in capsys.readouterr().err
    assert not (out / "config.json").exists()


def test_a_single_step_learns(place: Place, tmp_path: Path) -> None:
    asked = place.options(data=write_lines(tmp_path / "three.jsonl", problems(3)), out=tmp_path / "out")
    assert run("train", **asked, tensorboard=False) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (place.model, tmp_path / "out"))
    assert any(not torch.equal(one, other) for one, other in zip(before.parameters(), after.parameters(), strict=True))
