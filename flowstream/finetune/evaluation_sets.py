"""What a model is evaluated on while it is trained: named sets of samples, or plain text cut into rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flowstream.finetune.encoding import IGNORED, Encoded, Encoder
from flowstream.finetune.paths import expand
from flowstream.finetune.tokens import TokenDataset, read_tokens


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Samples, and the name they are reported by."""

    name: str
    dataset: TokenDataset


def read_evaluation_sets(
    arguments: Sequence[str], encoder: Encoder, *, split: str = "test", limit: int | None = None
) -> tuple[EvaluationSet, ...]:
    """Of `name=file` each: any kind that `records` reads, or a `.txt`, of which every token is labelled.

    Args:
        split: that of `hf:NAME` where `hf:NAME@SPLIT` does not say.
        limit: samples, or rows of text, the first ones of each set.

    Raises:
        ValueError, OSError: a name is missing or given twice; nothing there; what `read_tokens` says.
    """
    named = [parse(argument) for argument in arguments]
    names = [name for name, _ in named]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"--eval {twice}=… is given {names.count(twice)} times: names must differ")
    return tuple(
        EvaluationSet(name=name, dataset=_read(spec, encoder, split=split, limit=limit)) for name, spec in named
    )


def parse(argument: str) -> tuple[str, str]:
    """`name=file` → (name, file)."""
    name, equals, spec = (part.strip() for part in argument.partition("="))
    if not (name and equals and spec):
        raise ValueError(f"--eval {argument}: write name=file, such as target=test.jsonl or general=text.txt")
    return name, spec


def rows_of_text(text: str, encoder: Encoder) -> Iterator[Encoded]:
    """Rows of `max_length` tokens, each with the tokenizer's beginning; the last is as long as it is."""
    tokens = encoder.tokens(text)
    length = encoder.max_length - len(encoder.begin)
    for start in range(0, len(tokens), length):
        ids = encoder.begin + tokens[start : start + length]
        if len(ids) > 1:
            yield Encoded(ids=ids, labels=[IGNORED, *ids[1:]])


def _read(spec: str, encoder: Encoder, *, split: str, limit: int | None) -> TokenDataset:
    if not spec.lower().endswith(".txt"):
        return read_tokens(spec, encoder, split=split, limit=limit)
    rows: list[Encoded] = []
    for path in expand(spec):
        with open(path, "rb") as file:
            content = file.read()
        try:
            rows.extend(rows_of_text(content.decode(), encoder))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}") from error
    if not rows:
        raise ValueError(f"{spec} is empty: there is no text in it")
    return TokenDataset.of(rows[:limit])
