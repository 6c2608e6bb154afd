"""What every method starts from and is measured on: a checkpoint, samples to learn, and two splits, on disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowstream.compare.evaluation import EvaluationSplit
from flowstream.compare.feeds import Batches
from flowstream.compare.fingerprint import fingerprint_of
from flowstream.compare.settings import Settings
from flowstream.finetune.collate import Collate
from flowstream.finetune.encoding import Encoded, Encoder
from flowstream.finetune.evaluation_sets import read_evaluation_sets
from flowstream.finetune.pretrained import check_fits, load_config, load_tokenizer
from flowstream.finetune.tokens import TokenDataset, read_tokens

_PARTS = ("train", "validation", "test", "general_validation", "general_test")
_SHARE = 10
"""Validation and test each get a tenth of --data, where they are split off."""
_CHECKPOINT = "checkpoint"
"""Folder of the demo's model, beside the material."""
_BATCH = 32
_SEED_STRIDE = 1_000

_Sample = TypeVar("_Sample")


@dataclass(frozen=True, kw_only=True)
class Material:
    """All that the seeds share."""

    model: str
    """Name or path of the checkpoint."""
    pad_id: int
    train: TokenDataset
    validation: TokenDataset
    test: TokenDataset
    general_validation: TokenDataset
    general_test: TokenDataset

    def split(self, name: str) -> EvaluationSplit:
        """ "validation" or "test", batched by length."""
        collate = Collate(pad_id=self.pad_id, multiple=1)

        def batches(dataset: TokenDataset) -> list[dict[str, Tensor]]:
            order = dataset.lengths.argsort(stable=True).tolist()
            return [
                collate([dataset[index] for index in order[start : start + _BATCH]])
                for start in range(0, len(order), _BATCH)
            ]

        return EvaluationSplit(target=batches(getattr(self, name)), general=batches(getattr(self, f"general_{name}")))

    def loader(self, *, batch_size: int, seed: int | None, only: Collection[int] | None = None) -> Batches:
        """The samples, or those with these numbers: shuffled by a seed, in full batches, or in order."""
        numbers = range(len(self.train)) if only is None else sorted(only)
        return _Loader(self.train, tuple(numbers), Collate(pad_id=self.pad_id, multiple=1), batch_size, seed)

    @property
    def fingerprint(self) -> str:
        """Of all samples."""
        return fingerprint_of(self._tensors())

    def save(self, path: Path) -> None:
        """The file is there with all of its content, or not at all."""
        partial = path.with_name(path.name + ".partial")
        is_beside = Path(self.model) == path.parent / _CHECKPOINT  # and stays so, wherever the folder is moved
        told = {"model": "" if is_beside else self.model, "pad_id": str(self.pad_id)}
        save_file(self._tensors(), partial, told)
        partial.replace(path)

    @staticmethod
    def load(path: Path) -> Material:
        """As it was saved."""
        with safe_open(path, "pt") as file:
            told = file.metadata()
            parts = {
                part: TokenDataset(
                    **{name: file.get_tensor(f"{part}.{name}") for name in ("ids", "is_labelled", "offsets")}
                )
                for part in _PARTS
            }
        model = told["model"] or str(path.parent / _CHECKPOINT)
        return Material(model=model, pad_id=int(told["pad_id"]), **parts)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{part}.{name}": getattr(getattr(self, part), name)
            for part in _PARTS
            for name in ("ids", "is_labelled", "offsets")
        }


@dataclass(kw_only=False)
class _Loader:
    """Batches with `sample` [B]; each pass is another order, the same for all loaders of a seed."""

    samples: TokenDataset
    numbers: tuple[int, ...]
    collate: Collate
    batch_size: int
    seed: int | None
    epoch: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        numbers, size = self.numbers, self.batch_size
        if self.seed is not None:
            generator = torch.Generator().manual_seed(_SEED_STRIDE * (self.seed + 1) + self.epoch)
            numbers = tuple(numbers[place] for place in torch.randperm(len(numbers), generator=generator).tolist())
        self.epoch += 1
        end = len(numbers) if self.seed is None else len(numbers) // size * size
        for start in range(0, end, size):
            chosen = numbers[start : min(start + size, end)]
            yield {**self.collate([self.samples[number] for number in chosen]), "sample": torch.tensor(chosen)}


def read_material(settings: Settings) -> Material:
    """Of one's own model and texts.

    What --data has in common with --validation or --test is left out of it.

    Raises:
        ValueError, OSError: what the user can mend, in one line.
    """
    assert settings.model is not None
    assert settings.data is not None
    assert settings.general is not None
    tokenizer = load_tokenizer(settings.model)
    encoder = settings.texts.encoder(tokenizer)

    def read(spec: str) -> TokenDataset:
        return read_tokens(spec, encoder, split=settings.texts.split)

    train = _rows(read(settings.data))
    limit = settings.max_evaluated
    general = _general(settings.general, encoder)[: 2 * limit]
    if num_shared := _num_shared(general, train):
        raise ValueError(
            f"--general {settings.general} has {num_shared} texts that are in --data {settings.data}, too: what is "
            "retained would be what is learnt. Leave them out of one of the two"
        )
    held_out = {name: _rows(read(spec)) for name, spec in _given(settings)}
    if len(held_out) == 2 and (num_shared := _num_shared(held_out["test"], held_out["validation"])):
        raise ValueError(
            f"--test {settings.test} has {num_shared} samples that are in --validation {settings.validation}, too: "
            "what is chosen on them has seen the test. Leave them out of one of the two"
        )
    train = _without(train, [row for rows in held_out.values() for row in rows])
    for name in ("validation", "test"):
        if name not in held_out:
            held_out[name], train = _split_off(train, settings, name)
    material = Material(
        model=settings.model,
        pad_id=int(tokenizer.pad_token_id),
        train=TokenDataset.of(_drawn(train, settings.max_samples)),
        validation=TokenDataset.of(held_out["validation"][:limit]),
        test=TokenDataset.of(held_out["test"][:limit]),
        general_validation=TokenDataset.of(general[::2]),
        general_test=TokenDataset.of(general[1::2]),
    )
    config = load_config(settings.model)
    for part in _PARTS:
        spec = settings.general if part.startswith("general") else getattr(settings, part, None) or settings.data
        check_fits(settings.model, config, tokenizer, getattr(material, part), spec)
    return material


def demo_material(settings: Settings, folder: Path, on_step: Callable[[int, int], None]) -> Material:
    """The demo's model, pre-trained into `folder`, and its problems. `on_step(done, all)` is told."""
    from flowstream.demo.preparation import prepare
    from flowstream.demo.settings import FULL, QUICK

    size = QUICK if settings.quick else FULL
    task = prepare(size, folder, lambda step: on_step(step + 1, size.model.steps)).task
    encoder = task.encoder()

    def of_problems(problems: Sequence[object]) -> TokenDataset:
        encoded = (encoder.encode(problem.question, problem.worked) for problem in problems)  # type: ignore[attr-defined]
        return TokenDataset.of(Encoded(ids=one.ids, labels=one.labels) for one in encoded)

    def of_text(rows: list[list[int]]) -> TokenDataset:
        return TokenDataset.of(Encoded(ids=row, labels=[-100, *row[1:]]) for row in rows)

    return Material(
        model=str(task.checkpoint),
        pad_id=int(encoder.tokenizer.pad_token_id),
        train=of_problems(_drawn(task.problems, settings.max_samples)),
        validation=of_problems(task.validation),
        test=of_problems(task.test),
        general_validation=of_text(task.validation_text),
        general_test=of_text(task.test_text),
    )


def _given(settings: Settings) -> list[tuple[str, str]]:
    pairs = (("validation", settings.validation), ("test", settings.test))
    return [(name, spec) for name, spec in pairs if spec is not None]


def _general(spec: str, encoder: Encoder) -> list[Encoded]:
    (found,) = read_evaluation_sets((f"general={spec}",), encoder)
    rows = list({tuple(row.ids): row for row in _rows(found.dataset)}.values())  # each once, or both halves have it
    if len(rows) < 2:
        raise ValueError(
            f"--general {spec} has {len(rows)} row of at most {encoder.max_length} tokens, and validation and test "
            "need one each: give more text, or a smaller --max-length"
        )
    return rows


def _rows(dataset: TokenDataset) -> list[Encoded]:
    items = (dataset[index] for index in range(len(dataset)))
    return [Encoded(ids=item["input_ids"].tolist(), labels=item["labels"].tolist()) for item in items]


def _split_off(rows: list[Encoded], settings: Settings, name: str) -> tuple[list[Encoded], list[Encoded]]:
    """A part of --data, the same every time, and the rest without what is in the part."""
    num = min(settings.max_evaluated, len(rows) // _SHARE)
    if num < 1:
        raise ValueError(
            f"--data {settings.data} has {len(rows)} samples, too few to split a {name} set off: give --{name}"
        )
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(rows), generator=generator).tolist()
    part = [rows[index] for index in order[:num]]
    return part, _without([rows[index] for index in sorted(order[num:])], part)


def _drawn(samples: Sequence[_Sample], num: int | None) -> Sequence[_Sample]:
    """So many of them at most, each as likely as any other, the same every time, in their order."""
    if num is None or num >= len(samples):
        return samples
    generator = torch.Generator().manual_seed(0)
    return [samples[index] for index in sorted(torch.randperm(len(samples), generator=generator)[:num].tolist())]


def _num_shared(rows: list[Encoded], others: list[Encoded]) -> int:
    return len(rows) - len(_without(rows, others))


def _without(rows: list[Encoded], others: list[Encoded]) -> list[Encoded]:
    known = {tuple(row.ids) for row in others}
    return [row for row in rows if tuple(row.ids) not in known]
