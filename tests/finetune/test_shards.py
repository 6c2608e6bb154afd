"""Tar shards: records of their members, and streams of tokens that ranks share and that resume."""

from __future__ import annotations

import gc
import io
import json
import pickle
import re
import tarfile
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
from tiny_tokenizers import byte_level

import flowstream as fs
from flowstream.distributed.world import World
from flowstream.finetune.collate import Collate
from flowstream.finetune.encoding import Encoder
from flowstream.finetune.records import records
from flowstream.finetune.shards import token_stream
from flowstream.finetune.tokens import read_tokens

TOKENIZER = byte_level()
ROWS = [{"prompt": f"how {number}?", "response": f"{'well ' * (number % 7)}{number}\n"} for number in range(40)]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Of 10 samples each; in every other shard, columns are members of their own."""
    for shard in range(4):
        members = {}
        for number in range(10 * shard, 10 * shard + 10):
            if shard % 2:
                members |= {f"{number:04d}.{name}.txt": text.encode() for name, text in ROWS[number].items()}
                members[f"{number:04d}.jpg"] = b"\xff\xd8"
            else:
                members[f"{number:04d}.json"] = json.dumps(ROWS[number]).encode()
        write_tar(tmp_path / f"{shard:03d}.tar", members)
    return str(tmp_path / "{000..003}.tar")


def encoder(**options: Any) -> Encoder:
    return Encoder(**{"tokenizer": TOKENIZER, "max_length": 128} | options)


def texts(samples: Any) -> list[str]:
    return [TOKENIZER.decode(sample["input_ids"], skip_special_tokens=True) for sample in samples]


def in_order() -> list[str]:
    return [row["prompt"] + row["response"] for row in ROWS]


def test_samples_are_records_that_know_their_shard_and_key(shards: str, tmp_path: Path) -> None:
    assert list(records(shards)) == [
        (f"{tmp_path}/{number // 10:03d}.tar sample {number:04d}", row) for number, row in enumerate(ROWS)
    ]


def test_members_may_hold_one_column_as_json(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hello"}]
    write_tar(tmp_path / "a.tar", {"x.messages.json": json.dumps(chat).encode(), "x.json": b'{"id": 3}'})
    assert list(records(str(tmp_path / "a.tar"))) == [(f"{tmp_path}/a.tar sample x", {"messages": chat, "id": 3})]


def test_shards_in_memory_and_as_a_stream_give_the_same_samples(shards: str) -> None:
    dataset = read_tokens(shards, encoder())
    stream = list(token_stream(shards, encoder(), seed=0, shuffle=0))
    assert len(stream) == len(dataset) == 40
    for sample, expected in zip(stream, dataset, strict=True):
        torch.testing.assert_close(sample["input_ids"], expected["input_ids"])
        torch.testing.assert_close(sample["labels"], expected["labels"])
    assert texts(stream) == in_order()


def test_an_epoch_has_every_sample_once_in_an_order_that_seed_and_epoch_give(shards: str) -> None:
    orders = []
    for seed in (0, 0, 1):
        stream = token_stream(shards, encoder(), seed=seed, shuffle=16)
        orders.append([texts(stream), texts(stream)])
    assert orders[0] == orders[1]
    epochs = orders[0] + orders[2]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert all(sorted(epoch) == sorted(in_order()) for epoch in epochs)


def test_ranks_share_the_shards_and_a_rank_without_one_has_nothing(shards: str) -> None:
    for world_size in (3, 5):
        worlds = [World(rank, world_size, tuple(range(world_size)), (rank,), rank) for rank in range(world_size)]
        parts = [texts(token_stream(shards, encoder(), seed=0, shuffle=8, process_group=world)) for world in worlds]
        assert sorted(text for part in parts for text in part) == sorted(in_order())
        assert [len(part) for part in parts] == ([20, 10, 10] if world_size == 3 else [10, 10, 10, 10, 0])


def test_samples_that_are_dropped_are_left_out(shards: str) -> None:
    short = encoder(max_length=12, overlong="drop")
    dataset = read_tokens(shards, short)
    assert 0 < dataset.num_dropped < 40
    found = texts(token_stream(shards, short, seed=0, shuffle=0))
    assert found == ["".join(dataset.text(i, TOKENIZER)) for i in range(len(dataset))]


def test_worker_processes_share_the_shards(shards: str) -> None:
    stream = token_stream(shards, encoder(), seed=0, shuffle=8)
    assert sorted(texts(pickle.loads(pickle.dumps(stream)))) == sorted(in_order())
    loader = wds.WebLoader(stream.batched(4, collation_fn=Collate.of(TOKENIZER)), batch_size=None, num_workers=2)
    found = [text for batch in loader for text in texts({"input_ids": row} for row in batch["input_ids"])]
    assert sorted(found) == sorted(in_order())


def num_labelled(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (batch["labels"] != -100).sum(dim=1).float()


def flow(shards: str, shuffle: int) -> fs.FlowStream:
    loader = token_stream(shards, encoder(), seed=3, shuffle=shuffle).batched(4, collation_fn=Collate.of(TOKENIZER))
    temperature = fs.RunningMedian(warmup_samples=8)
    return fs.FlowStream(loader, fs.FunctionScorer(num_labelled), temperature=temperature, window=2)


@pytest.mark.parametrize("shuffle", [0, 16])
@pytest.mark.parametrize("num", [3, 10, 13])
def test_a_stream_over_them_goes_on_where_it_was(shards: str, shuffle: int, num: int) -> None:
    def taken(stream: fs.FlowStream, count: int) -> list[Any]:
        found: list[Any] = []
        while len(found) < count:
            found += [(batch["input_ids"], batch["flow_weight"]) for batch in islice(stream, count - len(found))]
        return found

    with flow(shards, shuffle) as whole, flow(shards, shuffle) as first, flow(shards, shuffle) as second:
        expected = taken(whole, num + 9)
        taken(first, num)
        second.load_state_dict(first.state_dict())
        assert second.epoch == (num - 1) // 10 or num % 10 == 0
        torch.testing.assert_close(taken(second, 9), expected[num:], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"x.jpg": b"", "x.cls": b"3"},
            " sample x has .jpg, .cls, and no column: write a .json with the columns, or .pro",
        ),
        ({"x.json": b"{"}, " sample x.json is not JSON: Expecting property name"),
        ({"x.json": b"[]"}, " sample x.json is no object with columns"),
        ({"x.prompt.txt": b"\xff"}, " sample x.prompt.txt is not UTF-8 text: byte 0 is 0xff"),
        ({"x.messages.json": b"hello"}, " sample x.messages.json is not JSON: Expecting value"),
        (
            {"x.prompt.txt": b"how", "x.text.txt": b"well"},
            " sample x has no column response; it has prompt, text. Set --response-column NAME, or",
        ),
    ],
)
def test_a_sample_of_another_form_is_refused_with_its_shard(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, members)
    for read in (read_tokens, partial(token_stream, seed=0)):
        with pytest.raises(ValueError, match="^" + re.escape(f"{path}{message}")):
            list(read(str(path), encoder()))


def test_a_long_sample_of_a_stream_is_refused_with_its_place(shards: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"sample 0004 has \d+ tokens, and the limit is 12: raise --max-length, or"
    ) as e:
        list(token_stream(shards, encoder(max_length=12), seed=0, shuffle=0))
    assert str(e.value).startswith(f"{tmp_path}/000.tar")


@pytest.mark.filterwarnings("ignore:unclosed file")  # webdataset's, of a shard that it cannot open
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, {f"{number}.json": json.dumps(ROWS[1]).encode() * 20 for number in range(3)})
    content = path.read_bytes()
    path.write_bytes(content[:1500] if damage == "cut" else b"how are you" * 100)
    for read in (read_tokens, partial(token_stream, seed=0)):
        with pytest.raises(ValueError, match=rf"^{path}: damaged or no tar file \(.+\): write it anew$"):
            list(read(str(path), encoder()))
    gc.collect()


def test_a_name_that_comes_twice_in_a_shard_is_told(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for _ in range(2):
            entry = tarfile.TarInfo("x.json")
            entry.size = 2
            archive.addfile(entry, io.BytesIO(b"{}"))
    with pytest.raises(ValueError, match=r"^x.json: duplicate file name in tar file"):
        list(records(str(tmp_path / "a.tar")))


def test_only_shards_are_streamed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match=r"a.jsonl is no tar shard: read it with read_tokens$"):
        token_stream(str(tmp_path / "a.jsonl"), encoder(), seed=0)
    with pytest.raises(FileNotFoundError, match="there is no file .*b.tar"):
        token_stream(str(tmp_path / "b.tar"), encoder(), seed=0)
