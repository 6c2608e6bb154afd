"""A data set in memory holds what the encoder gave, batches pad it, and evaluation sets name it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import BEGIN, CHAT, MARKED_TEMPLATE, PROBLEM, byte_level, write_lines
from torch.utils.data import DataLoader

from flowstream.finetune.collate import Collate
from flowstream.finetune.encoding import Columns, Encoded, Encoder
from flowstream.finetune.evaluation_sets import parse, read_evaluation_sets, rows_of_text
from flowstream.finetune.tokens import TokenDataset, read_tokens

PLAIN = byte_level(MARKED_TEMPLATE)
ROWS = [{"prompt": f"how {n}?\n", "response": f"{'fine ' * n}\n#### {n}"} for n in range(1, 9)]


def encoder(**options: Any) -> Encoder:
    return Encoder(**{"tokenizer": PLAIN, "max_length": 512} | options)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write_lines(tmp_path / "train.jsonl", ROWS)


# -- in memory -------------------------------------------------------------------------------------


def test_every_sample_is_what_the_encoder_gives(path: str) -> None:
    dataset = read_tokens(path, encoder())
    expected = [encoder()(row, "here") for row in ROWS]
    assert [sample["input_ids"].tolist() for sample in dataset] == [e.ids for e in expected if e]
    assert [sample["labels"].tolist() for sample in dataset] == [e.labels for e in expected if e]
    assert all(value.dtype == torch.int64 for value in dataset[0].values())
    lengths = [len(e.ids) for e in expected if e]
    assert dataset.lengths.tolist() == lengths
    assert dataset.num_tokens == sum(lengths)
    assert dataset.num_labelled == sum(label != -100 for e in expected if e for label in e.labels)
    assert (dataset.num_dropped, dataset.num_truncated) == (0, 0)


def test_texts_are_given_back(path: str, tmp_path: Path) -> None:
    dataset = read_tokens(path, encoder())
    assert [dataset.text(i, PLAIN) for i in range(8)] == [(row["prompt"], row["response"]) for row in ROWS]
    problems = write_lines(tmp_path / "gsm8k.jsonl", [PROBLEM])
    begins = byte_level(begins=True)
    gsm8k = encoder(tokenizer=begins, columns=Columns(prompt="question", response="answer"))
    assert read_tokens(problems, gsm8k).text(0, begins) == (PROBLEM["question"], PROBLEM["answer"])
    chat = read_tokens(write_lines(tmp_path / "chat.jsonl", [{"messages": CHAT}]), encoder())
    prompt, rest = chat.text(0, PLAIN)
    assert prompt == "system\nbe brief\nuser\nhello\nassistant\n"
    assert rest == "fine thanks\nuser\nhow are you\nassistant\nwell\n"


@given(
    st.lists(
        st.none() | st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=2, max_size=9), max_size=6
    )
)
@settings(max_examples=50)
def test_any_samples_come_out_as_they_went_in(samples: list[list[tuple[int, bool]] | None]) -> None:
    encoded = [
        None
        if s is None
        else Encoded(ids=[i for i, _ in s], labels=[i if mine else -100 for i, mine in s], num_cut=len(s) % 2)
        for s in samples
    ]
    dataset = TokenDataset.of(encoded)
    kept = [e for e in encoded if e is not None]
    assert [(s["input_ids"].tolist(), s["labels"].tolist()) for s in dataset] == [(e.ids, e.labels) for e in kept]
    assert dataset.num_dropped == len(encoded) - len(kept)
    assert dataset.num_truncated == sum(e.num_cut for e in kept)


def test_a_token_takes_five_bytes(path: str) -> None:
    dataset = read_tokens(path, encoder())
    assert dataset.ids.nbytes + dataset.is_labelled.nbytes == 5 * dataset.num_tokens


def test_indices_are_those_of_a_list(path: str) -> None:
    dataset = read_tokens(path, encoder())
    assert dataset[-1]["input_ids"].tolist() == dataset[7]["input_ids"].tolist()
    for index in (8, -9):
        with pytest.raises(IndexError, match=f"sample {index} of 8"):
            dataset[index]


def test_long_samples_are_counted(path: str) -> None:
    lengths = read_tokens(path, encoder()).lengths.tolist()
    limit = sorted(lengths)[4]
    num_long = sum(length > limit for length in lengths)
    dropped = read_tokens(path, encoder(max_length=limit, overlong="drop"))
    cut = read_tokens(path, encoder(max_length=limit, overlong="truncate"))
    assert (len(dropped), dropped.num_dropped, dropped.num_truncated) == (8 - num_long, num_long, 0)
    assert (len(cut), cut.num_dropped, cut.num_truncated) == (8, 0, num_long)
    assert cut.lengths.tolist() == [min(length, limit) for length in lengths]
    with pytest.raises(
        ValueError, match=rf"{path} line \d has \d+ tokens, and the limit is {limit}: raise --max-length"
    ):
        read_tokens(path, encoder(max_length=limit))


def test_a_limit_takes_the_first_ones_and_reads_no_further(path: str) -> None:
    with open(path, "a") as file:
        file.write("no JSON")
    assert [len(read_tokens(path, encoder(), limit=n)) for n in (1, 8)] == [1, 8]
    with pytest.raises(ValueError, match="line 9 is not JSON"):
        read_tokens(path, encoder(), limit=9)
    with pytest.raises(ValueError, match="the limit is 0 samples: it counts from 1"):
        read_tokens(path, encoder(), limit=0)


def test_nothing_there_or_nothing_left_is_refused(path: str, tmp_path: Path) -> None:
    empty = write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=f"^{empty} is empty: there is no sample in it$"):
        read_tokens(empty, encoder())
    for overlong in ("drop", "truncate"):
        message = f"^{path}: all 8 samples were dropped, for none fits into 3 tokens: raise --max-length$"
        with pytest.raises(ValueError, match=message):
            read_tokens(path, encoder(max_length=3, overlong=overlong))


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [1, 8])
def test_a_batch_is_padded_right_to_a_multiple(path: str, multiple: int) -> None:
    dataset = read_tokens(path, encoder())
    collate = Collate(7, multiple)
    loader = DataLoader(dataset, batch_size=3, collate_fn=collate)
    rows = iter(dataset)
    for batch in loader:
        longest = max(batch["attention_mask"].sum(dim=1).tolist())
        width = batch["input_ids"].shape[1]
        assert width % multiple == 0
        assert longest <= width < longest + multiple
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            row = next(rows)
            length = len(row["input_ids"])
            assert ids.tolist() == row["input_ids"].tolist() + [7] * (width - length)
            assert labels.tolist() == row["labels"].tolist() + [-100] * (width - length)
            assert mask.tolist() == [1] * length + [0] * (width - length)
    assert next(rows, None) is None


def test_the_padding_token_is_the_tokenizers_or_its_end() -> None:
    without = byte_level()
    assert Collate.of(without).pad_id == without.pad_token_id
    without.pad_token = None
    assert Collate.of(without).pad_id == without.eos_token_id


# -- evaluation sets -------------------------------------------------------------------------------


def test_evaluation_sets_are_read_as_training_data_is_or_as_plain_text(path: str, tmp_path: Path) -> None:
    text = tmp_path / "general=1.txt"
    text.write_text(PROBLEM["answer"] * 5, encoding="utf-8")
    target, general = read_evaluation_sets([f"target={path}", f"general={text}"], encoder(max_length=50))
    assert (target.name, general.name) == ("target", "general")
    assert [s["labels"].tolist() for s in target.dataset] == [
        s["labels"].tolist() for s in read_tokens(path, encoder())
    ]
    rows = general.dataset
    assert set(rows.lengths.tolist()[:-1]) == {50}
    assert PLAIN.decode(rows.ids.tolist()) == PROBLEM["answer"] * 5
    assert rows.num_labelled == rows.num_tokens - len(rows)
    assert len(read_evaluation_sets([f"a={text}"], encoder(max_length=50), limit=2)[0].dataset) == 2


@given(text=st.text(max_size=60), max_length=st.integers(2, 9), begins=st.booleans())
@settings(max_examples=50)
def test_rows_hold_every_token_of_a_text_behind_a_beginning(text: str, max_length: int, begins: bool) -> None:
    tokenizer = BEGINS if begins else PLAIN
    here = encoder(tokenizer=tokenizer, max_length=max_length)
    rows = list(rows_of_text(text, here))
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = [tokenizer.convert_tokens_to_ids(BEGIN)] if begins else []
    found = [token for row in rows for token in row.ids[len(start) :]]
    assert all(row.ids[: len(start)] == start and row.labels == [-100, *row.ids[1:]] for row in rows)
    assert all(len(row.ids) == max_length for row in rows[:-1])
    # Without a beginning, a single token behind the last whole row has nothing to be predicted by.
    assert found == tokens or (not begins and found == tokens[:-1])


BEGINS = byte_level(begins=True)


def test_a_name_and_a_file_are_asked_for() -> None:
    assert parse("target = a=b.jsonl") == ("target", "a=b.jsonl")
    for argument in ("test.jsonl", "=test.jsonl", "target=", ""):
        with pytest.raises(
            ValueError, match=f"^--eval {argument}: write name=file, such as target=test.jsonl or general="
        ):
            parse(argument)


def test_evaluation_sets_that_cannot_be_are_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--eval target=… is given 2 times: names must differ"):
        read_evaluation_sets([f"target={path}", f"target={path}"], encoder())
    text = tmp_path / "general.txt"
    with pytest.raises(FileNotFoundError, match="there is no file .*general.txt"):
        read_evaluation_sets([f"general={text}"], encoder())
    text.write_text("")
    with pytest.raises(ValueError, match="general.txt is empty: there is no text in it"):
        read_evaluation_sets([f"general={text}"], encoder())
    text.write_bytes(b"how \xff")
    with pytest.raises(ValueError, match="general.txt is not UTF-8 text: byte 4 is 0xff"):
        read_evaluation_sets([f"general={text}"], encoder())
