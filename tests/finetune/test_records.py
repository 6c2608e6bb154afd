"""Records of files: what is read, where each stands, and what is said of paths and files that are wrong."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_tokenizers import PROBLEM, write_lines

from flowstream.finetune.records import is_sharded, records

ROWS = [{"prompt": f"how {number}?", "response": f'well {number}, τ\nand "so"'} for number in range(5)]


def refused(spec: str, split: str = "train") -> str:
    """What is said, in one line."""
    with pytest.raises((ValueError, OSError)) as error:
        list(records(spec, split=split))
    message = str(error.value)
    assert "\n" not in message
    return message


# -- JSON ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a byte-order mark"])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_lines_are_records_that_know_their_number(tmp_path: Path, mark: bytes, ending: bytes) -> None:
    path = tmp_path / "train.jsonl"
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
    path.write_bytes(mark + ending.join([*lines[:2], b"", b"  ", *lines[2:]]))
    assert list(records(str(path))) == [
        (f"{path} line {number}", row) for number, row in zip((1, 2, 5, 6, 7), ROWS, strict=True)
    ]


def test_compressed_lines_and_lists_hold_the_same_records(tmp_path: Path) -> None:
    lines = Path(write_lines(tmp_path / "train.jsonl", ROWS)).read_bytes()
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "train.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "train.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    for name in ("train.jsonl", "train.jsonl.gz", "train.json", "train.json.gz"):
        assert [record for _, record in records(str(tmp_path / name))] == ROWS
    assert next(records(str(tmp_path / "train.json")))[0] == f"{tmp_path}/train.json item 1"


def test_braces_name_files_in_order(tmp_path: Path) -> None:
    for number in range(3):
        write_lines(tmp_path / f"part-{number}.jsonl", ROWS[number : number + 1])
    found = [record for _, record in records(str(tmp_path / "part-{2..0}.jsonl"))]
    assert found == ROWS[:3][::-1]
    odd = write_lines(tmp_path / "of {mine}.jsonl", ROWS)  # a file of that very name
    assert [record for _, record in records(odd)] == ROWS


def test_a_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "train.jsonl", ROWS)
    assert len(list(records("~/train.jsonl"))) == 5


def test_an_empty_file_has_no_record(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text("\n")
        assert list(records(str(tmp_path / name))) == []


GOOD = b'{"prompt": "a", "response": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            GOOD + b"{'prompt': 1}\n",
            " line 2 is not JSON: Expecting property name enclosed in double quotes at",
        ),
        ("a.jsonl", GOOD + GOOD[:20], " line 2 is not JSON: Unterminated string starting at at column 17"),
        ("a.jsonl", GOOD + b"[1, 2]\n", " line 2 is a list, where an object with columns was expected"),
        ("a.jsonl", b'"text"\n', " line 1 is a string, where an object with columns was expected"),
        ("a.jsonl", b"3\n", " line 1 is a number, where an object with columns was expected"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', " line 1 is not UTF-8 text: byte 12 is 0xff"),
        (
            "a.json",
            GOOD * 2,
            " is not JSON: Extra data at line 2 column 1; if each line is an object of its own, name it",
        ),
        ("a.json", GOOD, " holds an object, where a list of objects was expected"),
        ("a.json", b'[{"prompt": 1}, null]', " item 2 is null, where an object with columns was expected"),
        ("a.jsonl.gz", GOOD, " is not a whole gzip file (Not a gzipped file (b'{\"')): write it anew"),
        (
            "a.jsonl.gz",
            gzip.compress(GOOD * 9)[:-12],
            " is not a whole gzip file (Compressed file ended before the end",
        ),
        (
            "a.txt",
            b"how are you",
            " is none of .jsonl, .json, .tar: convert it, or write hf:FOLDER for a folder of .parquet",
        ),
    ],
)
def test_a_file_of_another_form_is_refused_where_it_differs(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert refused(str(path)).startswith(f"{path}{message}")


# -- paths -----------------------------------------------------------------------------------------


def test_a_path_that_is_not_there_is_told_with_the_name_that_is_nearest(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    path = write_lines(tmp_path / "gsm8k" / "train.jsonl", ROWS)
    away = tmp_path / "gsm8k" / "trian.json"
    assert refused(str(away)) == f"there is no file {away} (did you mean {path}?)"
    wrong = tmp_path / "gms8k" / "train.jsonl"
    folders = f"nor a folder {wrong.parent} (did you mean {tmp_path}/gsm8k?)"
    assert refused(str(wrong)) == f"there is no file {wrong}, {folders}"
    other = tmp_path / "gsm8k" / "zzz"
    assert refused(str(other)) == f"there is no file {other}"


def test_a_bare_name_may_be_one_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    advice = "a data set of the Hugging Face hub is written hf:"
    assert refused("gsm8k") == f"there is no file gsm8k; {advice}gsm8k"
    write_lines(tmp_path / "gsm8k.jsonl", ROWS)
    assert refused("gsm8k") == f"there is no file gsm8k (did you mean gsm8k.jsonl?); {advice}gsm8k"
    assert refused("openai/gsm8k") == f"there is no file openai/gsm8k, nor a folder openai; {advice}openai/gsm8k"
    assert refused("gsm") == f"there is no file gsm; {advice}gsm"


def test_shards_that_are_not_there_are_counted(tmp_path: Path) -> None:
    pattern = str(tmp_path / "part-{00..05}.tar")
    assert refused(pattern) == f"{pattern} names 6 files, and none is there; the first is {tmp_path}/part-00.tar"
    for number in (0, 3):
        (tmp_path / f"part-{number:02d}.tar").touch()
    missing = ", ".join(f"{tmp_path}/part-0{number}.tar" for number in (1, 2, 4))
    assert refused(pattern) == (
        f"{pattern} names 6 files, of which {missing} and 1 more are not there; write the numbers of those that are"
    )
    pattern = str(tmp_path / "part-0{3,4}.tar")
    assert f"of which {tmp_path}/part-04.tar is not there" in refused(pattern)
    assert refused(str(tmp_path / "part-{0..9.tar")).endswith(
        "a brace is not closed; shards are written 'part-{000..099}.tar'"
    )


def test_a_folder_is_refused_with_what_to_write_for_it(tmp_path: Path) -> None:
    advice = f"give a .jsonl file, shards as 'part-{{000..099}}.tar', or hf:{tmp_path} if the package datasets reads it"
    assert refused(str(tmp_path)) == f"{tmp_path} is a folder: {advice}"
    path = write_lines(tmp_path / "train.jsonl", ROWS)
    assert refused(str(tmp_path)) == f"{tmp_path} is a folder: give a file in it, such as {path}"
    for number in range(8, 12):
        (tmp_path / f"v2-{number:03d}-of-12.tar").touch()
    pattern = f"{tmp_path}/v2-{{008..011}}-of-12.tar"
    assert refused(str(tmp_path)) == f"{tmp_path} is a folder: write the 4 shards in it as '{pattern}'"
    (tmp_path / "v2-009-of-12.tar").unlink()
    listed = "v2-008-of-12.tar,v2-010-of-12.tar,v2-011-of-12.tar"
    assert f"write the 3 shards in it as '{tmp_path}/{{{listed},…}}'" in refused(str(tmp_path))


def test_tar_files_and_addresses_are_shards(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar", "c.jsonl"):
        (tmp_path / name).touch()
    assert is_sharded(str(tmp_path / "{a,b}.tar"))
    assert not is_sharded(str(tmp_path / "{a.tar,c.jsonl}"))
    assert not is_sharded(str(tmp_path / "c.jsonl"))
    assert is_sharded("https://example.com/{000..999}.tar")
    assert is_sharded("pipe:cat here.tar")
    assert not is_sharded("hf:gsm8k")


# -- Hugging Face ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of files, as data sets are published. No network is asked, and no cache of the user is written to."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    folder = tmp_path / "published"
    folder.mkdir()
    write_lines(folder / "train.jsonl", ROWS)
    write_lines(folder / "test.jsonl", ROWS[:2])
    return folder


def test_a_folder_of_files_is_read_by_split(folder: Path) -> None:
    assert list(records(f"hf:{folder}")) == [
        (f"hf:{folder}@train row {number}", row) for number, row in enumerate(ROWS)
    ]
    assert [record for _, record in records(f"hf:{folder}", split="test")] == ROWS[:2]
    assert [record for _, record in records(f"hf:{folder}@test")] == ROWS[:2]
    assert [record for _, record in records(f"hf:{folder}@train[:60%]", split="test")] == ROWS[:3]


CONFIGURATIONS = {"main": "train", "other": "test"}


def test_a_configuration_is_named_behind_a_colon(folder: Path) -> None:
    configurations = [f"- config_name: {name}\n  data_files: {file}.jsonl" for name, file in CONFIGURATIONS.items()]
    (folder / "README.md").write_text("\n".join(["---", "configs:", *configurations, "---", ""]))
    assert [record for _, record in records(f"hf:{folder}:other")] == ROWS[:2]
    assert [record for _, record in records(f"hf:{folder}:main@train[1:3]")] == ROWS[1:3]
    for name in (f"hf:{folder}", f"hf:{folder}:none"):
        message = refused(name)
        assert "main" in message
        assert message.endswith(f". Write hf:{folder}:CONFIG")


def test_what_save_to_disk_wrote_is_read(folder: Path, tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=one, test=one.select([3])).save_to_disk(str(tmp_path / "both"))
    assert [record for _, record in records(f"hf:{tmp_path}/one")] == ROWS
    assert [record for _, record in records(f"hf:{tmp_path}/both@test")] == ROWS[3:4]
    assert refused(f"hf:{tmp_path}/both@dev") == (
        f"hf:{tmp_path}/both: Unknown split 'dev', there are train, test. Write hf:{tmp_path}/both@SPLIT"
    )
    assert "it was saved as one split, and has no split 'test'" in refused(f"hf:{tmp_path}/one", split="test")


def test_what_is_wrong_with_a_name_is_said_with_what_to_write(folder: Path, tmp_path: Path) -> None:
    message = refused(f"hf:{folder}@dev")
    assert "'test'" in message.replace('"', "'")
    assert message.endswith(f". Write hf:{folder}@SPLIT")
    assert refused(f"hf:{tmp_path}/publisht") == f"there is no folder {tmp_path}/publisht (did you mean {folder}?)"
    assert refused(f"hf:{folder}/train.jsonl") == (
        f"hf:{folder}/train.jsonl is a file: give it without hf: (.jsonl, .json, .tar), or its folder"
    )
    for name in ("hf:", "hf:@train", "hf:name@"):
        assert refused(name) == f"{name} names no data set: write hf:NAME, hf:NAME:CONFIG or hf:NAME@SPLIT"
    message = refused("hf:nobody/nothing")
    assert message.startswith("hf:nobody/nothing: ")
    assert message.endswith(
        "Write hf:NAME as on huggingface.co/datasets, or hf:FOLDER with .jsonl, .parquet or .csv files"
    )


def test_without_the_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refused("hf:gsm8k") == "hf:gsm8k is read by the package datasets: pip install 'flowstream[datasets]'"


def test_messages_come_from_files_as_they_were_written(folder: Path, tmp_path: Path) -> None:
    chats: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": PROBLEM["question"]}]} for _ in range(2)]
    write_lines(folder / "train.jsonl", chats)
    write_lines(folder / "test.jsonl", chats)
    assert [record for _, record in records(f"hf:{folder}")] == chats
