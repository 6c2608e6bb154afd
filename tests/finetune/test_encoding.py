"""Records as tokens and labels: what is read, what is labelled, what is cut, and what is refused how."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import BEGIN, CHAT, END, MARKED_TEMPLATE, PROBLEM, TEMPLATE, byte_level, spacing
from transformers import PreTrainedTokenizerFast

from flowstream.finetune.chat import encode_chat
from flowstream.finetune.encoding import Columns, Encoded, Encoder

PLAIN, BEGINNING = byte_level(), byte_level(begins=True)
GSM8K = Columns(prompt="question", response="answer")


def encoder(tokenizer: PreTrainedTokenizerFast = PLAIN, **options: Any) -> Encoder:
    return Encoder(**{"tokenizer": tokenizer, "max_length": 512} | options)


def kept(encoded: Encoded | None) -> Encoded:
    assert encoded is not None
    return encoded


def texts(encoded: Encoded, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """What is decoded of the tokens without a label, and of those with one."""
    ignored = [token for token, label in zip(encoded.ids, encoded.labels, strict=True) if label == -100]
    labelled = [label for label in encoded.labels if label != -100]
    return tokenizer.decode(ignored), tokenizer.decode(labelled)


def check_labels(encoded: Encoded) -> None:
    assert len(encoded.ids) == len(encoded.labels)
    assert encoded.labels[0] == -100
    assert all(label in (-100, token) for token, label in zip(encoded.ids, encoded.labels, strict=True))


@pytest.mark.parametrize("tokenizer", [PLAIN, BEGINNING], ids=["plain", "beginning"])
def test_of_a_problem_with_worked_lines_the_answer_and_the_end_are_labelled(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = kept(encoder(tokenizer, columns=GSM8K)(PROBLEM, "here"))
    check_labels(encoded)
    begin = BEGIN if tokenizer is BEGINNING else ""
    assert texts(encoded, tokenizer) == (begin + PROBLEM["question"], PROBLEM["answer"] + END)


@given(prompt=st.text(min_size=1, max_size=30), response=st.text(min_size=1, max_size=30).filter(str.strip))
@settings(max_examples=100)
def test_any_text_is_decoded_to_itself_and_the_prompts_tokens_are_those_it_has_alone(
    prompt: str, response: str
) -> None:
    encoded = kept(encoder(BEGINNING)({"prompt": prompt, "response": response}, "here"))
    check_labels(encoded)
    assert BEGINNING.decode(encoded.ids) == BEGIN + prompt + response + END
    alone = BEGINNING(prompt)["input_ids"]
    assert encoded.ids[: len(alone)] == alone
    assert encoded.labels == [-100] * len(alone) + encoded.ids[len(alone) :]


def test_the_prompts_tokens_do_not_reach_into_the_response() -> None:
    record = {"prompt": "Natalia so", "response": "ld clips"}
    joint = PLAIN("Natalia sold clips")["input_ids"]
    alone = PLAIN("Natalia so")["input_ids"]
    assert joint[: len(alone)] != alone
    assert texts(kept(encoder()(record, "here")), PLAIN) == ("Natalia so", "ld clips" + END)


def test_a_response_gets_no_space_from_a_tokenizer_that_puts_one_before_a_text() -> None:
    tokenizer = spacing()
    assert tokenizer.convert_ids_to_tokens(encoder(tokenizer).tokens("c")) == ["▁", "c"]
    encoded = kept(encoder(tokenizer)({"prompt": "ab?", "response": "ca."}, "here"))
    assert tokenizer.convert_ids_to_tokens(encoded.ids) == ["▁a", "b", "?", "c", "a", ".", END]
    assert [label != -100 for label in encoded.labels] == [False] * 3 + [True] * 4


@pytest.mark.parametrize("tokenizer", [PLAIN, BEGINNING], ids=["plain", "beginning"])
def test_beginning_and_end_come_once_where_the_texts_have_them(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = kept(encoder(tokenizer)({"prompt": BEGIN + "how", "response": "well" + END}, "here"))
    assert tokenizer.decode(encoded.ids) == BEGIN + "how" + "well" + END


def test_a_separator_is_part_of_the_prompt() -> None:
    encoded = kept(encoder(separator="\n")({"prompt": "how?", "response": "well"}, "here"))
    assert texts(encoded, PLAIN) == ("how?\n", "well" + END)


def test_without_a_prompt_the_first_token_has_nothing_to_be_predicted_by() -> None:
    encoded = kept(encoder()({"prompt": "", "response": "hello you"}, "here"))
    check_labels(encoded)
    assert encoded.labels[1:] == encoded.ids[1:]


def test_trained_on_the_prompt_all_but_the_first_token_is_labelled() -> None:
    for record in (PROBLEM, {"messages": CHAT}):
        encoded = kept(encoder(byte_level(TEMPLATE), train_on_prompt=True, columns=GSM8K)(record, "here"))
        assert encoded.labels == [-100, *encoded.ids[1:]]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED_TEMPLATE], ids=["prefixes", "marks"])
def test_a_chat_goes_through_the_template_and_so_do_two_columns_if_asked(template: str) -> None:
    tokenizer = byte_level(template)
    ids, is_written = encode_chat(tokenizer, CHAT, "here")
    chat = kept(encoder(tokenizer)({"messages": CHAT, "prompt": None, "response": None}, "here"))
    assert chat.ids == ids
    assert chat.labels == [token if mine else -100 for token, mine in zip(ids, is_written, strict=True)]

    record = {"prompt": "hello", "response": "fine thanks", "messages": None}
    plain, asked = encoder(tokenizer), encoder(tokenizer, as_chat=True)
    assert tokenizer.decode(kept(plain(record, "here")).ids) == "hellofine thanks</s>"
    assert kept(asked(record, "here")) == kept(plain({"messages": CHAT[1:3]}, "here"))


def test_a_sample_of_the_limit_is_kept_and_one_more_token_is_told() -> None:
    full = kept(encoder(columns=GSM8K)(PROBLEM, "here"))
    length = len(full.ids)
    assert encoder(columns=GSM8K, max_length=length)(PROBLEM, "here") == full
    message = f"train.jsonl line 12 has {length} tokens, and the limit is {length - 1}: "
    message += "raise --max-length, or say --overlong truncate or --overlong drop"
    with pytest.raises(ValueError, match=f"^{message}$"):
        encoder(columns=GSM8K, max_length=length - 1)(PROBLEM, "train.jsonl line 12")


def test_a_long_sample_is_cut_at_the_end_or_dropped() -> None:
    full = kept(encoder(columns=GSM8K)(PROBLEM, "here"))
    num_prompt = full.labels.count(-100)
    for length in range(num_prompt - 1, len(full.ids) + 2):
        cut = encoder(columns=GSM8K, overlong="truncate", max_length=length)(PROBLEM, "here")
        if length <= num_prompt:
            assert cut is None  # nothing of the answer is left
        else:
            num_cut = max(len(full.ids) - length, 0)
            assert cut == Encoded(ids=full.ids[:length], labels=full.labels[:length], num_cut=num_cut)
        dropped = encoder(columns=GSM8K, overlong="drop", max_length=length)(PROBLEM, "here")
        assert dropped == (full if length >= len(full.ids) else None)


NO_COLUMN = "here has no column prompt nor response; it has "


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (PROBLEM, NO_COLUMN + "answer, question. Set --prompt-column question --response-column answer"),
        (
            {"instruction": "", "input": "", "output": ""},
            NO_COLUMN + "input, instruction, output. Set --prompt-column instruction --response-column output",
        ),
        ({"conversations": [], "id": 1}, NO_COLUMN + "conversations, id. Set --messages-column conversations"),
        (
            {"text": "hello"},
            NO_COLUMN + "text. Set --prompt-column NAME --response-column NAME, or --messages-column NAME for chats",
        ),
        ({}, NO_COLUMN + "none. Set --prompt-column NAME --response-column NAME, or --messages-column NAME for chats"),
        (
            {"prompt": "", "completion": ""},
            "here has no column response; it has completion, prompt. Set --response-column completion",
        ),
        (
            {"response": "", "task": ""},
            "here has no column prompt; it has response, task. Set --prompt-column NAME, or --messages-column NAME for "
            "chats",
        ),
        (
            {"prompt": "how", "response": ""},
            "here: its column response is empty, so there is nothing to train on: take",
        ),
        ({"prompt": "how", "response": " \n"}, "here: its column response is empty, so there is nothing to train on"),
        ({"prompt": "how", "response": None}, "here: its column response is empty, so there is nothing to train on"),
        (
            {"prompt": "6 * 7", "response": 42},
            "here: its column response is of type int, where text was expected: write it as",
        ),
        (
            {"prompt": [], "response": ""},
            "here: its column prompt is of type list, where text was expected: write it as a",
        ),
    ],
)
def test_a_record_that_cannot_be_read_is_refused_with_the_option_to_set(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)) as refused:
        encoder()(record, "here")
    assert "\n" not in str(refused.value)


def test_only_options_that_are_set_otherwise_are_suggested() -> None:
    with pytest.raises(ValueError, match="Set --response-column answer$"):
        encoder(columns=Columns(prompt="question"))(PROBLEM, "here")


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="--max-length is 1: a sample needs 2 tokens"):
        encoder(max_length=1)
    with pytest.raises(ValueError, match="--as-chat needs a chat template, and the tokenizer has none"):
        encoder(as_chat=True)
    endless = byte_level()
    endless.eos_token = None
    with pytest.raises(ValueError, match=r"no end-of-text token \(eos_token\): set one in its tokenizer_config.json"):
        encoder(endless)


def test_an_encoder_travels_to_worker_processes() -> None:
    here = encoder(BEGINNING, columns=GSM8K)
    assert pickle.loads(pickle.dumps(here))(PROBLEM, "there") == here(PROBLEM, "here")
