"""From a record to tokens and labels: which columns are read, what is labelled, and what becomes of long samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flowstream.finetune.chat import encode_chat

IGNORED = -100

Overlong: TypeAlias = Literal["error", "truncate", "drop"]

_PAIRS = (
    ("question", "answer"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("query", "response"),
    ("input", "output"),
    ("input", "target"),
)
_CHATS = ("messages", "conversations", "conversation", "chat")
"""How data sets name their columns, to suggest options by."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The names of the columns that are read."""

    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"
    """A list of {"role", "content"}; read in place of the two where a record has it."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One sample as tokens."""

    ids: list[int]
    labels: list[int]
    """The ids where they are trained on, else -100. The first is -100 always: nothing comes before it."""
    num_cut: int = 0
    """Tokens that did not fit."""

    def tensors(self) -> dict[str, Tensor]:
        """`input_ids` and `labels`, [T] int64."""
        return {"input_ids": torch.tensor(self.ids), "labels": torch.tensor(self.labels)}


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Records → tokens and labels, for one tokenizer.

    A prompt and a response become the tokens of the prompt, as it is tokenised alone when the model is asked, those of
    the response, and the end of text; the response and the end are labelled. Nothing is put between the two but
    `separator`. A chat goes through the chat template, and what the assistant says is labelled.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    """Tokens that a sample may have."""
    columns: Columns = field(default_factory=Columns)
    overlong: Overlong = "error"
    """What to do with a longer one. Of those cut, what has no label left is dropped."""
    train_on_prompt: bool = False
    """Label everything."""
    as_chat: bool = False
    """Write prompt and response as a user's and an assistant's turn of the chat template."""
    separator: str = ""
    """Text behind the prompt, as part of it, such as a line break."""

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"--max-length is {self.max_length}: a sample needs 2 tokens, one to predict the other by")
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token (eos_token): set one in its tokenizer_config.json")
        if self.as_chat and not self.tokenizer.chat_template:
            raise ValueError("--as-chat needs a chat template, and the tokenizer has none: leave it out")

    def __call__(self, record: Mapping[str, Any], place: str) -> Encoded | None:
        """The sample, or None where it is dropped; `place` is named in errors.

        Raises:
            ValueError: a column is missing or no text; nothing to train on; too long; what `encode_chat` says.
        """
        messages = record.get(self.columns.messages)
        if messages is None:
            prompt, response = self._texts(record, place)
            if self.as_chat:
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            else:
                ids, is_response = self._joined(prompt, response)
        if messages is not None:
            ids, is_response = encode_chat(self.tokenizer, messages, place)
        labels = [IGNORED] + [
            token if self.train_on_prompt or trained else IGNORED
            for token, trained in zip(ids[1:], is_response[1:], strict=True)
        ]
        return self._fitted(ids, labels, place)

    @cached_property
    def begin(self) -> list[int]:
        """The token that the tokenizer puts before a text, if it does."""
        first = self.tokenizer("a")["input_ids"][:1]
        return first if first == [self.tokenizer.bos_token_id] else []

    def tokens(self, text: str) -> list[int]:
        """Of the text alone, without a beginning or an end."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _texts(self, record: Mapping[str, Any], place: str) -> tuple[str, str]:
        names = (self.columns.prompt, self.columns.response)
        if missing := [name for name in names if name not in record]:
            raise ValueError(
                f"{place} has no column {' nor '.join(missing)}; it has {', '.join(sorted(record)) or 'none'}. "
                + _advice(self.columns, record)
            )
        for name in names:
            if not isinstance(record[name], str) and record[name] is not None:
                raise ValueError(
                    f"{place}: its column {name} is of type {type(record[name]).__name__}, where text was expected: "
                    "write it as a string, or name a list of messages by --messages-column"
                )
        prompt, response = (record[name] or "" for name in names)
        if not response.strip():
            raise ValueError(f"{place}: its column {names[1]} is empty, so there is nothing to train on: take it out")
        return prompt + self.separator, response

    def _joined(self, prompt: str, response: str) -> tuple[list[int], list[bool]]:
        before = self.tokens(prompt)
        # Tokenised with the prompt, the response gets no space of its own from tokenizers that put one before a text.
        # Where a token would reach over the boundary, each alone: the prompt's tokens stay those the model is asked by.
        both = self.tokens(prompt + response)
        response_ids = both[len(before) :] if both[: len(before)] == before else self.tokens(response)
        if before[:1] != self.begin:
            before = self.begin + before
        end = int(self.tokenizer.eos_token_id)
        if response_ids[-1:] != [end]:
            response_ids = [*response_ids, end]
        return before + response_ids, [False] * len(before) + [True] * len(response_ids)

    def _fitted(self, ids: list[int], labels: list[int], place: str) -> Encoded | None:
        num_cut = len(ids) - self.max_length
        if num_cut <= 0:
            return Encoded(ids=ids, labels=labels)
        if self.overlong == "error":
            raise ValueError(
                f"{place} has {len(ids)} tokens, and the limit is {self.max_length}: "
                "raise --max-length, or say --overlong truncate or --overlong drop"
            )
        labels = labels[: self.max_length]
        if self.overlong == "drop" or all(label == IGNORED for label in labels):
            return None
        return Encoded(ids=ids[: self.max_length], labels=labels, num_cut=num_cut)


def _advice(columns: Columns, record: Mapping[str, Any]) -> str:
    """The options that fit a record's columns, as far as their names tell."""
    if chat := next((name for name in _CHATS if isinstance(record.get(name), list)), None):
        return f"Set --messages-column {chat}"
    for prompt, response in _PAIRS:
        if prompt in record and response in record:
            options = [f"--prompt-column {prompt}"] * (prompt != columns.prompt)
            options += [f"--response-column {response}"] * (response != columns.response)
            return f"Set {' '.join(options)}"
    options = [
        f"--{kind}-column NAME"
        for kind, name in (("prompt", columns.prompt), ("response", columns.response))
        if name not in record
    ]
    return f"Set {' '.join(options)}, or --messages-column NAME for chats"
