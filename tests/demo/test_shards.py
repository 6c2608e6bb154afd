"""Tar shards of problems, written and read back with webdataset."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowstream.demo.problems import Problem
from flowstream.demo.shards import IGNORED, Encoder, open_shards, write_shards

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves shards open


@pytest.fixture
def shards(problems: list[Problem], tmp_path: Path) -> list[Path]:
    return write_shards(problems, tmp_path / "shards", num_shards=4)


def read(shards: list[Path], encoder: Encoder, seed: int = 0, num_epochs: int = 1) -> list[list[int]]:
    loader = open_shards(shards, encoder, batch=8, seed=seed)
    return [[number for batch in loader for number in batch["sample"].tolist()] for _ in range(num_epochs)]


def test_shards_are_tar_files_of_equal_size_that_hold_every_problem(
    shards: list[Path], problems: list[Problem]
) -> None:
    found = []
    for shard in shards:
        with tarfile.open(shard) as archive:
            members = archive.getmembers()
            assert len(members) == 12
            found += [json.loads(archive.extractfile(member).read()) for member in members]  # type: ignore[union-attr]
    assert [entry["number"] for entry in found] == list(range(48))
    assert [entry["question"] for entry in found] == [problem.question for problem in problems]


def test_the_same_problems_give_the_same_bytes_and_stale_shards_go(shards: list[Path], problems: list[Problem]) -> None:
    before = [shard.read_bytes() for shard in shards]
    assert [shard.read_bytes() for shard in write_shards(problems, shards[0].parent, num_shards=4)] == before
    assert len(write_shards(problems, shards[0].parent, num_shards=2)) == 2
    assert len(list(shards[0].parent.iterdir())) == 2


def test_an_epoch_has_every_problem_once_in_an_order_of_its_own_that_the_seed_replays(
    shards: list[Path], encoder: Encoder
) -> None:
    orders = read(shards, encoder, seed=0, num_epochs=3) + read(shards, encoder, seed=1, num_epochs=3)
    assert all(sorted(order) == list(range(48)) for order in orders)
    assert len(set(map(tuple, orders))) == 6
    assert read(shards, encoder, seed=1, num_epochs=3) == orders[3:]


def test_only_the_subset_is_read(shards: list[Path], encoder: Encoder) -> None:
    subset = set(range(0, 48, 3))
    loader = open_shards(shards, encoder, batch=8, seed=0, only=subset)
    assert {number for batch in loader for number in batch["sample"].tolist()} == subset


def test_batches_label_the_answer_and_its_end_and_nothing_else(
    shards: list[Path], encoder: Encoder, problems: list[Problem]
) -> None:
    batch: dict[str, Tensor] = next(iter(open_shards(shards, encoder, batch=8, seed=0)))
    for number, ids, mask, labels in zip(
        *(batch[name] for name in ("sample", "input_ids", "attention_mask", "labels")), strict=True
    ):
        problem = problems[number]
        length = int(mask.sum())
        assert mask[:length].all()
        assert (ids[length:] == encoder.tokenizer.pad_token_id).all()
        labelled = labels != IGNORED
        assert torch.equal(labels[labelled], ids[labelled])
        assert not labelled[length:].any()
        assert encoder.tokenizer.decode(labels[labelled]) == problem.worked + encoder.tokenizer.eos_token
        before = ids[~labelled & mask.bool()]
        assert encoder.tokenizer.decode(before) == encoder.tokenizer.bos_token + problem.question + "\n"
