"""Which tokens of a conversation the assistant wrote, against masks put together by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tiny_tokenizers import CHAT, MARKED_TEMPLATE, TEMPLATE, byte_level, word_level
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from flowstream.finetune.chat import encode_chat, written

# What the templates write of CHAT, in pieces that no token reaches over, and whether the assistant wrote them.
PIECES = [
    ("<|turn|>system\n", False),
    ("be brief", False),
    ("<|over|>\n", False),
    ("<|turn|>user\n", False),
    ("hello", False),
    ("<|over|>\n", False),
    ("<|turn|>assistant\n", False),
    ("fine thanks<|over|>", True),
    ("\n", False),
    ("<|turn|>user\n", False),
    ("how are you", False),
    ("<|over|>\n", False),
    ("<|turn|>assistant\n", False),
    ("well<|over|>", True),
    ("\n", False),
]


def by_hand(
    tokenizer: PreTrainedTokenizerFast, pieces: list[tuple[str, bool]] = PIECES
) -> tuple[list[int], list[bool]]:
    ids, is_written = [], []
    for text, mine in pieces:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        is_written += [mine] * len(tokens)
    return ids, is_written


@pytest.mark.parametrize("build", [byte_level, word_level])
@pytest.mark.parametrize("template", [TEMPLATE, MARKED_TEMPLATE], ids=["prefixes", "marks"])
def test_of_all_turns_the_assistants_words_and_the_token_behind_them_are_labelled(build: Any, template: str) -> None:
    tokenizer = build(template)
    ids, is_written = encode_chat(tokenizer, CHAT, "here")
    assert (ids, is_written) == by_hand(tokenizer)
    assert ids == tokenizer.apply_chat_template(CHAT)["input_ids"]


def test_where_every_mark_has_a_token_the_mask_is_that_of_transformers() -> None:
    tokenizer = byte_level(MARKED_TEMPLATE)
    theirs = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True)
    ids, is_written = encode_chat(tokenizer, CHAT, "here")
    assert ids == theirs["input_ids"]
    assert is_written == list(map(bool, theirs["assistant_masks"]))


def test_a_mark_at_a_space_that_has_no_token_does_not_label_the_users_turns() -> None:
    template = MARKED_TEMPLATE.replace(
        "'<|over|>' }}{% endgeneration %}{{ '\n' }}", "'<|over|>\n' }}{% endgeneration %}"
    )
    tokenizer = word_level(template)
    assert encode_chat(tokenizer, CHAT, "here") == by_hand(tokenizer)
    # Theirs does: if this fails, transformers' own mask may be taken in place of ours.
    theirs = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True)["assistant_masks"]
    assert sum(theirs) > sum(by_hand(tokenizer)[1])


def test_tokens_that_hold_a_character_of_a_span_are_written() -> None:
    offsets = [(0, 2), (2, 5), (5, 5), (5, 8), (8, 9), (12, 12), (12, 14)]
    #           before  over start   spaces that are trimmed have the empty offset behind them
    assert written(offsets, [(3, 8), (11, 13)]) == [False, True, True, True, False, True, True]
    assert written(offsets, []) == [False] * 7
    assert written([], [(0, 3)]) == []


def test_without_marks_a_turn_keeps_a_line_break_that_no_special_token_precedes() -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    tokenizer = byte_level(template)
    pieces = [("user:", False), (" hello", False), ("\n", False), ("assistant:", False), (" well", True), ("\n", True)]
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "well"}]
    assert encode_chat(tokenizer, chat, "here") == by_hand(tokenizer, pieces)


@pytest.mark.parametrize(("content", "labelled"), [("well", " well"), (" well", " well"), ("\nwell", "\nwell")])
def test_a_token_that_reaches_over_from_the_header_is_the_assistants(content: str, labelled: str) -> None:
    tokenizer = byte_level(TEMPLATE.replace("'\n' }}", "': ' }}").replace("assistant\n", "assistant: "))
    ids, is_written = encode_chat(tokenizer, [CHAT[1], {"role": "assistant", "content": content}], "here")
    assert tokenizer.decode(ids) == f"<|turn|>user: hello<|over|>\n<|turn|>assistant: {content}<|over|>\n"
    words = tokenizer.decode([token for token, mine in zip(ids, is_written, strict=True) if mine])
    assert words == f"{labelled}<|over|>"


FORGETFUL = TEMPLATE.replace("m['content']", "(m['content'] if loop.last else 'well')")
"""It writes a turn otherwise once another follows, as templates do that leave out earlier reasoning."""


@pytest.mark.parametrize(("template", "chat", "number"), [(FORGETFUL, CHAT, 3), (TEMPLATE, CHAT[2:], 1)])
def test_turns_that_cannot_be_told_apart_are_refused_with_the_marks_to_add(
    template: str, chat: list[dict[str, str]], number: int
) -> None:
    with pytest.raises(ValueError, match="put {% generation %} and {% endgeneration %} around") as refused:
        encode_chat(byte_level(template), chat, "chats.jsonl line 4")
    assert str(refused.value).startswith(f"chats.jsonl line 4: where the assistant's turn in message {number} begins")


def test_a_first_turn_of_the_assistant_is_told_by_marks() -> None:
    tokenizer = byte_level(MARKED_TEMPLATE)
    assert encode_chat(tokenizer, CHAT[2:], "here") == by_hand(tokenizer, PIECES[6:])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", 'here: its messages are no list of {"role": …, "content": …}'),
        ([], 'here: its messages are no list of {"role": …, "content": …}'),
        (["hello"], 'here: message 1 is \'hello\', where {"role": …, "content": …} was expected'),
        (
            [{"from": "human", "value": "hello"}],
            'here: message 1 has from, value, where {"role": …, "content": …} was expected',
        ),
        ([CHAT[1], {"role": "assistant", "content": None}], "here: message 2 of role assistant has no content"),
        (CHAT[:2], "here has nothing that the role assistant says, only system, user: take it out"),
        (
            [CHAT[1], {"role": "assistant", "content": 5}],
            "here: the tokenizer's chat template refuses these messages: unsupported operand",
        ),
    ],
)
@pytest.mark.parametrize("template", [TEMPLATE, MARKED_TEMPLATE], ids=["prefixes", "marks"])
def test_messages_of_another_form_are_refused_in_words(template: str, messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)) as refused:
        encode_chat(byte_level(template), messages, "here")
    assert "\n" not in str(refused.value)


def test_what_a_template_raises_is_told_with_the_place() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"^here: the tokenizer's chat template refuses .*: roles must alternate$"):
        encode_chat(byte_level(template), CHAT, "here")


def test_without_a_chat_template_the_remedy_is_told() -> None:
    with pytest.raises(ValueError, match="here is a chat, but the tokenizer has no chat template: take that of an"):
        encode_chat(byte_level(), CHAT, "here")


def test_a_tokenizer_without_offsets_is_refused() -> None:
    tokenizer = ByT5Tokenizer(chat_template=TEMPLATE)
    with pytest.raises(
        ValueError, match="does not tell which characters a token holds: take one that has a tokenizer.js"
    ):
        encode_chat(tokenizer, CHAT, "here")


def test_what_a_table_fills_with_none_is_not_written_out() -> None:
    tokenizer = byte_level(TEMPLATE.replace("m['content']", "m.get('name', '') + m['content']"))
    filled = [message | {"name": None} for message in CHAT]
    assert encode_chat(tokenizer, filled, "here") == by_hand(tokenizer)
