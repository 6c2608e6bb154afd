"""`flowstream cache info|prune` as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import lmdb
import pytest
from disk_caches import ROOT, SAMPLE, TOKEN, keys_of, losses_of

from flowstream.cli.__main__ import main
from flowstream.scoring.cache import Namespace
from flowstream.scoring.disk.records import Record
from flowstream.scoring.disk.upkeep import contents
from flowstream.scoring.disk_cache import DiskCache

OLD = Namespace("old", "sample", "Seq2SeqLMScorer T5ForConditionalGeneration bfloat16")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A cache of three namespaces; OLD was last used ten days ago, SAMPLE three."""
    cache = DiskCache(tmp_path)
    for namespace in (OLD, SAMPLE, TOKEN):
        cache.register(namespace)
        cache.put(keys_of(0, 1234, namespace), losses_of(keys_of(0, 1234, namespace)))
    cache.close()
    with lmdb.open(str(tmp_path), max_dbs=2) as file:
        namespaces = file.open_db(b"namespaces", create=False)
        with file.begin(write=True, db=namespaces) as transaction:
            for namespace, days in ((OLD, 10), (SAMPLE, 3)):
                day = (date.today() - timedelta(days=days)).isoformat()
                transaction.put(namespace.prefix, Record().touched(namespace, f"{day}T12:00:00").write())
    return tmp_path


def _levels(path: Path) -> list[tuple[str, str]]:
    return [(held.record.fingerprint, held.record.level) for held in contents(path).namespaces]


def test_info_shows_every_namespace_in_a_process_of_its_own(path: Path) -> None:
    command = [sys.executable, "-m", "flowstream", "cache", "info", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines[:-1])
    for namespace in (OLD, SAMPLE, TOKEN):
        (line,) = [line for line in lines if namespace.prefix.hex()[:8] in line]
        assert "1,234" in line
        assert namespace.level in line
        assert namespace.label.split()[0] in line
    assert (date.today() - timedelta(days=10)).isoformat() in done.stdout
    assert "free" in lines[-1]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--older-than-days", "5"], [TOKEN, SAMPLE]),
        (["--older-than-days", "0"], [TOKEN]),
        (["--keep-last", "1"], [TOKEN]),
        (["--keep-last", "0"], []),
        (["--keep-last", "5"], [TOKEN, SAMPLE, OLD]),
        (["--keep-last", "1", "--older-than-days", "5"], [TOKEN, SAMPLE]),
        (["--namespace", TOKEN.prefix.hex()], [SAMPLE, OLD]),
        (["--namespace", SAMPLE.prefix.hex()[:6].upper()], [TOKEN, OLD]),
        (["--keep-last", "0", "--dry-run"], [TOKEN, SAMPLE, OLD]),
    ],
)
def test_prune_deletes_what_meets_all_conditions(
    path: Path, options: list[str], left: list[Namespace], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "prune", str(path), *options]) == 0
    assert _levels(path) == [(namespace.fingerprint, namespace.level) for namespace in left]
    printed = capsys.readouterr().out
    for namespace in {OLD, SAMPLE, TOKEN} - set(left):
        assert f"{namespace.prefix.hex()} ({namespace.label}, 1,234 losses)" in printed
    for namespace in left:
        if "--dry-run" not in options:
            assert namespace.prefix.hex() not in printed


def test_prune_says_when_the_file_is_in_use(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = DiskCache(path)
    assert main(["cache", "prune", str(path), "--keep-last", "1"]) == 0
    cache.close()
    assert "not shrunk (it is open in this process)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what to delete: --older-than-days, --keep-last or --namespace"),
        (["--keep-last", "-1"], "count from 0"),
        (["--older-than-days", "-3"], "count from 0"),
        (["--namespace", "zz"], f"no namespace begins with 'zz'; there are: {TOKEN.prefix.hex()}"),
    ],
)
def test_impossible_conditions_are_refused_in_words(
    path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "prune", str(path), *options]) == 1
    assert message in capsys.readouterr().err
    assert len(_levels(path)) == 3


@pytest.mark.parametrize("command", [["info"], ["prune", "--keep-last", "0"]])
def test_what_is_no_cache_is_refused_in_words_and_left_alone(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", *command, str(tmp_path / "none")]) == 1
    assert "there is no loss cache at" in capsys.readouterr().err
    tmp_path.joinpath("notes.txt").write_text("of mine")
    assert main(["cache", *command, str(tmp_path)]) == 1
    assert "holds notes.txt" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]
