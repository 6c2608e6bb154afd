"""A conversation as tokens, through the tokenizer's chat template, and which of them the assistant wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

Message: TypeAlias = dict[str, Any]
Span: TypeAlias = tuple[int, int]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], place: str
) -> tuple[list[int], list[bool]]:
    """Token ids, and which the assistant wrote: its words and the token that ends its turn, not the turn's header.

    By the template's `{% generation %}` marks where it has them. Else by prefixes: a turn is what the template adds to
    the messages before it and the header that asks for it.

    Raises:
        ValueError: no chat template, or a tokenizer without offsets; messages of another form; what the template says
            of them; no turn of the assistant; or turns that cannot be told apart.
    """
    chat = _checked(messages, place)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{place} is a chat, but the tokenizer has no chat template: take that of an instruct model, "
            "or give the texts as a prompt and a response column"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{place} is a chat, and the tokenizer does not tell which characters a token holds: "
            "take one that has a tokenizer.json"
        )
    try:
        template = tokenizer.get_chat_template()
        is_marked = "endgeneration" in template
        text, spans = _by_marks(tokenizer, template, chat) if is_marked else _by_prefixes(tokenizer, chat, place)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"{place}: the tokenizer's chat template refuses these messages: {error}") from error
    encoding: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    is_written = written(encoding["offset_mapping"], spans)
    if not any(is_written):
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in chat))
        raise ValueError(f"{place} has nothing that the role assistant says, only {roles}: take it out")
    return list(encoding["input_ids"]), is_written


def written(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens hold a character of one of the spans.

    A tokenizer that trims spaces gives a token of nothing else the empty offset behind it.
    """
    # Not transformers' `return_assistant_tokens_mask`: where a mark stands at a space that no token's offsets hold, it
    # labels all the turns behind, or none (5.23).
    return [
        any(start < last and first < end if start < end else first < end <= last for first, last in spans)
        for start, end in offsets
    ]


def _by_marks(tokenizer: PreTrainedTokenizerBase, template: str, messages: list[Message]) -> tuple[str, list[Span]]:
    names: dict[str, Any] = tokenizer.special_tokens_map
    rendered: Any = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **names
    )
    (text,), (spans,) = rendered
    return text, spans


def _by_prefixes(tokenizer: PreTrainedTokenizerBase, messages: list[Message], place: str) -> tuple[str, list[Span]]:
    whole = _rendered(tokenizer, messages)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Nothing can be rendered of no message: the header of a first turn is not known.
        before = _rendered(tokenizer, messages[:number], asks=True) if number else whole
        upto = _rendered(tokenizer, messages[: number + 1])
        if len(upto) <= len(before) or not upto.startswith(before) or not whole.startswith(upto):
            raise ValueError(
                f"{place}: where the assistant's turn in message {number + 1} begins and ends cannot be told by what "
                "the chat template writes without it; put {% generation %} and {% endgeneration %} around the "
                "assistant's content in the tokenizer's chat template"
            )
        spans.append((len(before), _end_of_turn(tokenizer, upto)))
    return whole, spans


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Behind the special token that ends the turn, where only a line break follows it, which nobody generates."""
    stripped = text.rstrip()
    return len(stripped) if stripped.endswith(tuple(tokenizer.all_special_tokens)) else len(text)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, asks: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False))


def _checked(messages: Any, place: str) -> list[Message]:
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f'{place}: its messages are no list of {{"role": …, "content": …}}')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or "role" not in message:
            found = f"has {', '.join(map(str, message))}" if isinstance(message, Mapping) else f"is {message!r:.40}"
            raise ValueError(f'{place}: message {number} {found}, where {{"role": …, "content": …}} was expected')
        if message.get("content") is None and message.get("tool_calls") is None:
            raise ValueError(f"{place}: message {number} of role {message['role']} has no content")
    # Tables fill what a message lacks with None, which templates would write out.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]
