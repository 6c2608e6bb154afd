"""Everything before the first fine-tuning run: text, tokenizer, checkpoint, problems, shards."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from flowstream.demo.corpus import build_corpus, read_modules
from flowstream.demo.pretraining import chunk, pretrain, train_tokenizer
from flowstream.demo.problems import make_problems
from flowstream.demo.settings import Settings
from flowstream.demo.shards import write_shards
from flowstream.demo.task import Task

_SPLITS = ("train", "validation", "test")
_TEST_SEED, _VALIDATION_SEED, _TRAIN_SEED = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A task, and how it came about."""

    task: Task
    num_train_chars: int
    num_train_tokens: int
    """Tokens of pre-training text at hand; pre-training reads some of them, or all, or some twice."""
    losses: tuple[float, ...]
    """Pre-training loss by step, nats a token."""


def prepare(settings: Settings, folder: Path, on_step: Callable[[int], None]) -> Prepared:
    """Build the text, train tokenizer and model, write checkpoint and shards to `folder`."""
    corpus = build_corpus(read_modules(), settings.max_train_chars)
    tokenizer = train_tokenizer(corpus.train, settings.model.vocabulary)
    chunks = {name: chunk(getattr(corpus, name), tokenizer, settings.model.context) for name in _SPLITS}
    losses: list[float] = []

    def after_step(step: int, loss: float) -> None:
        losses.append(loss)
        on_step(step)

    checkpoint = pretrain(chunks["train"], tokenizer, settings.model, folder / "checkpoint", after_step)
    test = make_problems(settings.num_test, _TEST_SEED)
    validation = make_problems(settings.num_validation, _VALIDATION_SEED, exclude=test)
    problems = make_problems(settings.num_problems, _TRAIN_SEED, exclude=[*test, *validation])
    task = Task(
        settings=settings,
        checkpoint=checkpoint,
        shards=tuple(write_shards(problems, folder / "shards", settings.num_shards)),
        problems=tuple(problems),
        validation=tuple(validation),
        test=tuple(test),
        validation_text=_spread(chunks["validation"], settings.num_text_chunks),
        test_text=_spread(chunks["test"], 2 * settings.num_text_chunks),
    )
    return Prepared(
        task=task,
        num_train_chars=sum(map(len, corpus.train)),
        num_train_tokens=chunks["train"].numel(),
        losses=tuple(losses),
    )


def _spread(chunks: Tensor, num_chunks: int) -> list[list[int]]:
    """Chunks from all over a split: every k-th."""
    rows: list[list[int]] = chunks[:: max(1, len(chunks) // num_chunks)][:num_chunks].tolist()
    return rows
