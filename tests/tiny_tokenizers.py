"""Tokenizers that take milliseconds to build: byte-level, word-level, and one that puts a space before a text."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BEGIN, END, PAD, TURN, OVER = "<s>", "</s>", "<pad>", "<|turn|>", "<|over|>"
SPECIAL = [BEGIN, END, PAD, TURN, OVER]
WORDS = ["user", "assistant", "system", "hello", "fine", "how", "are", "you", "thanks", "well", "be", "brief"]

PROBLEM = {
    "question": "Natalia sold clips to 48 of her friends in April, and then half as many in May. How many in all?",
    "answer": "In May she sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72 clips.\n#### 72",
}

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "fine thanks"},
    {"role": "user", "content": "how are you"},
    {"role": "assistant", "content": "well"},
]

_HEADER = "{{ '<|turn|>' + m['role'] + '\n' }}"
_ASKED = "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
TEMPLATE = "{% for m in messages %}" + _HEADER + "{{ m['content'] + '<|over|>\n' }}{% endfor %}" + _ASKED
MARKED_TEMPLATE = (
    "{% for m in messages %}" + _HEADER + "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|over|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|over|>\n' }}{% endif %}{% endfor %}" + _ASKED
)


def byte_level(template: str | None = None, *, begins: bool = False) -> PreTrainedTokenizerFast:
    """Any text can be written in it. `begins`: it puts <s> before a text."""
    tokenizer = _bytes()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[(BEGIN, 0)])
    return _dressed(tokenizer, template)


def word_level(template: str | None = None) -> PreTrainedTokenizerFast:
    """A token for each of `WORDS`, none for the spaces between."""
    entries = [*SPECIAL, "<unk>", *WORDS]
    level = Tokenizer(models.WordLevel({entry: number for number, entry in enumerate(entries)}, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _dressed(level, template)


def spacing() -> PreTrainedTokenizerFast:
    """As Llama 2's, it puts a space before a text. It can write a, b, c, '.', '?'."""
    entries = [*SPECIAL, "<unk>", "▁", *"abc.?", "▁a", "▁b", "ab"]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b")]
    bpe = Tokenizer(models.BPE({entry: number for number, entry in enumerate(entries)}, merges, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    bpe.decoder = decoders.Metaspace(prepend_scheme="always")
    return _dressed(bpe, None)


def write_lines(path: Path, rows: Iterable[Any]) -> str:
    """One JSON a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _dressed(tokenizer: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[TURN, OVER],
        chat_template=template,
    )


def _bytes() -> Tokenizer:
    return Tokenizer.from_str(_trained())


@functools.cache
def _trained() -> str:
    bpe = ByteLevelBPETokenizer()
    texts = [*PROBLEM.values(), " ".join(WORDS)] * 4
    bpe.train_from_iterator(texts, 360, special_tokens=SPECIAL, show_progress=False)
    return str(bpe._tokenizer.to_str())
