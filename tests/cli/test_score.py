"""`flowstream score` fills a cache, that of the dtype and level asked for, and says what it found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetuning import problems, run, save_model, write_shards
from tiny_tokenizers import write_lines

NUM = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("score") / "model")


def test_each_sample_is_scored_once_however_it_is_stored(model: str, tmp_path: Path, capsys: Any) -> None:
    file = write_lines(tmp_path / "train.jsonl", problems(NUM))
    shards = write_shards(tmp_path / "shards", problems(NUM), num_shards=3)
    cache = tmp_path / "losses"
    for texts, level, share in (
        (file, "sample", 0),
        (file, "sample", 100),
        (shards, "sample", 100),
        (file, "token", 0),
    ):
        assert run("score", model=model, data=texts, cache=cache, level=level, max_length=64, batch_size=7) == 0
        told = capsys.readouterr().out
        assert told.startswith(f"{NUM} samples in "), told
        assert f"{share}% of them known before" in told
        assert f"Train with --cache {cache}" in told


def test_mistakes_are_told_in_one_line(model: str, tmp_path: Path, capsys: Any) -> None:
    file = write_lines(tmp_path / "train.jsonl", problems(3))
    for changed, told in (
        ({"model": tmp_path / "no"}, "there is no folder"),
        ({"cache": Path(file) / "losses"}, "cannot be made (Not a directory): give another folder"),
        ({"data": tmp_path / "no.jsonl"}, "there is no file"),
        ({"prompt_column": "question"}, "no column question"),
        ({"cache": file}, "train.jsonl"),
        ({"batch_size": 0}, "--batch-size is 0: give 1 or more"),
    ):
        assert run("score", **{"model": model, "data": file, "cache": tmp_path / "losses", **changed}) == 1
        found = capsys.readouterr().err
        assert found.startswith("flowstream: ")
        assert found.count("\n") == 1, found
        assert told in found
