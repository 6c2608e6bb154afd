"""`flowstream inspect` as a user runs it, against a plain loop over the samples."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import read_alone
from texts import alone
from tiny_tokenizers import PROBLEM, byte_level, write_lines

from flowstream.cli.__main__ import main

COLUMNS = ["--prompt-column", "question", "--response-column", "answer"]
PROBLEMS = [
    {"question": f"{k} clips and {3 * k % 7} more <b>?</b>", "answer": f"{k}+{3 * k % 7} = {'so ' * (k % 4)}\n#### {k}"}
    for k in range(11)
] + [PROBLEM]


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny Llama and its tokenizer, and the folder they are saved in."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level()
    built = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    built.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return built, folder


@pytest.fixture(scope="module")
def losses(model: tuple[Any, Path]) -> list[float]:
    """Mean loss of the answer's tokens and the end, each sample alone."""
    tokenizer, found = byte_level(), []
    for problem in PROBLEMS:
        prompt, answer = (tokenizer(text)["input_ids"] for text in (problem["question"], problem["answer"]))
        ids = torch.tensor([*prompt, *answer, tokenizer.eos_token_id])
        found.append(float(alone(model[0], ids, ids)[len(prompt) :].mean()))
    return found


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write_lines(tmp_path / "problems.jsonl", PROBLEMS)


def inspected(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["inspect", *args]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def shown(printed: str) -> dict[int, float]:
    """Position → loss of the samples that were printed."""
    lines = re.findall(r"^ *([\d.]+) +weight [\d.]+ +sample (\d+):", printed, re.MULTILINE)
    return {int(number) - 1: float(loss) for loss, number in lines}


def test_losses_and_table_are_those_of_a_plain_loop(
    model: tuple[Any, Path], losses: list[float], file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    options = ["--model", str(model[1]), *COLUMNS, "--batch-size", "5", "--num-shown", "6", "--out", str(out)]
    printed = inspected(capsys, file, *options)
    assert shown(printed) == pytest.approx(dict(enumerate(losses)), abs=6e-4)
    assert [*shown(printed)] == [int(k) for k in (*np.argsort(losses)[:6], *np.argsort(losses)[::-1][:6])]
    tau = float(np.median(losses))
    weights = np.exp(-np.array(losses) / tau)
    row = next(line.split() for line in printed.splitlines() if line.strip().startswith("median"))
    ess = weights.sum() ** 2 / (weights**2).sum() / len(weights)
    expected = (tau, weights.mean(), ess, weights.min(), weights.max())
    assert [float(cell) for cell in row[1:6]] == pytest.approx(expected, rel=2e-3)
    assert f"wrote {out}" in " ".join(printed.split())
    assert "--limit" not in printed

    page = read_alone(out.read_text(encoding="utf-8"))
    assert all(cell in page.words for cell in row[1:6])
    for problem in PROBLEMS:
        assert problem["question"] in page.words
        assert problem["answer"] in page.words


def test_of_many_samples_the_first_are_taken_and_it_says_so(
    model: tuple[Any, Path], losses: list[float], file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(model[1]), *COLUMNS, "--out", str(tmp_path / "page.html"), "--limit"]
    printed = inspected(capsys, file, *options, "4")
    assert shown(printed) == pytest.approx(dict(enumerate(losses[:4])), abs=6e-4)
    assert "these are the first 4 samples: --limit takes more of them, 0 all" in printed
    assert "12 samples" in inspected(capsys, file, *options, "0", "--num-shown", "0")


def test_a_cache_keeps_the_losses(
    model: tuple[Any, Path], file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(model[1]), *COLUMNS, "--out", str(tmp_path / "page.html")]
    first = inspected(capsys, file, *options, "--cache", str(tmp_path / "cache"))
    assert inspected(capsys, file, *options, "--cache", str(tmp_path / "cache")) == first
    assert main(["cache", "info", str(tmp_path / "cache")]) == 0
    assert re.search(r"\bLlamaForCausalLM\b", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "-1"], "--limit -1: give at least 0"),
        (["--batch-size", "0"], "--batch-size 0: give at least 1"),
        (["--num-shown", "-2"], "--num-shown -2: give at least 0"),
        (["--out", "none/page.html"], "--out none/page.html: there is no folder none"),
        (["--device", "gpu"], "--device gpu: "),
        (["--model", "./none"], "there is no folder ./none"),
        (["--max-length", "12"], "raise --max-length, or say --overlong truncate or --overlong drop"),
        (["--prompt-column", "ask"], "has no column ask; it has answer, question. Set --prompt-column question"),
    ],
)
def test_mistakes_are_told_in_one_line(
    model: tuple[Any, Path],
    file: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", file, "--model", str(model[1]), *COLUMNS, *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("flowstream: ")
    assert message in line
    assert not list(tmp_path.glob("**/*.html"))


def test_a_file_that_is_not_there_or_empty_and_a_model_without_weights_are_told_in_one_line(
    model: tuple[Any, Path],
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    bare = tmp_path / "bare"
    byte_level().save_pretrained(bare)
    (bare / "config.json").write_text(json.dumps(model[0].config.to_dict()))
    for args in (["none.jsonl", str(model[1])], ["empty.jsonl", str(model[1])], [file, str(bare)]):
        assert main(["inspect", args[0], "--model", args[1], *COLUMNS]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("flowstream: ")
        assert Path(args[0]).name in line or str(bare) in line
