"""The fine-tuning set on disk, and on its way to the model: webdataset tar shards in, padded batches out."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from flowstream.demo.problems import Problem

IGNORED = -100

_SEED_STRIDE = 1_000
"""detshuffle adds the epoch to its seed: without a stride, epoch 1 of seed 0 would be epoch 0 of seed 1."""


@dataclass(frozen=True)
class Encoded:
    """One problem as tokens: all of them, and how many belong to the question, which is not trained on."""

    ids: list[int]
    num_question: int

    @property
    def labels(self) -> list[int]:
        """The ids, -100 on the question."""
        return [IGNORED] * self.num_question + self.ids[self.num_question :]


class Encoder:
    """Problems → tokens → batches, for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._begin, self._end, self._pad = (
            int(tokenizer.bos_token_id),
            int(tokenizer.eos_token_id),
            int(tokenizer.pad_token_id),
        )

    def question(self, text: str) -> list[int]:
        """The tokens that stand before an answer."""
        return [self._begin, *self._tokens(text + "\n")]

    def encode(self, question: str, worked: str) -> Encoded:
        """Question and worked answer, with the token that ends a text."""
        head = self.question(question)
        return Encoded([*head, *self._tokens(worked), self._end], len(head))

    def collate(self, samples: Iterable[tuple[int, Encoded]]) -> dict[str, Tensor]:
        """(number, problem) pairs → `input_ids`, `attention_mask`, `labels` [B, T], padded right; `sample` [B]."""
        numbers, encoded = zip(*samples, strict=True)
        ids = [torch.tensor(problem.ids) for problem in encoded]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(
                [torch.tensor(problem.labels) for problem in encoded], batch_first=True, padding_value=IGNORED
            ),
            "sample": torch.tensor(numbers),
        }

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def write_shards(problems: Sequence[Problem], folder: Path, num_shards: int) -> list[Path]:
    """Write problems as tar shards of equal size, one JSON a sample; the same problems give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("problems-*.tar"):
        stale.unlink()
    per_shard = -(-len(problems) // num_shards)
    with wds.ShardWriter(str(folder / "problems-%04d.tar"), maxcount=per_shard, verbose=0, mtime=0) as writer:
        for number, problem in enumerate(problems):
            writer.write({"__key__": problem.key, "json": {"number": number, **asdict(problem)}})
    return sorted(folder.glob("problems-*.tar"))


def open_shards(
    shards: Sequence[Path], encoder: Encoder, *, batch: int, seed: int, only: Collection[int] | None = None
) -> Iterable[dict[str, Tensor]]:
    """A loader over the shards: shuffled by a seed that each epoch moves on, tokenised, padded, full batches only.

    `only`: the numbers of the problems to read, all by default.
    """

    def read(sample: dict[str, Any]) -> tuple[int, Encoded]:
        problem = sample["json"]
        return problem["number"], encoder.encode(problem["question"], problem["worked"])

    def keep(sample: dict[str, Any]) -> bool:
        return only is None or sample["json"]["number"] in only

    shuffle_seed = _SEED_STRIDE * (seed + 1)
    loader: Iterable[dict[str, Tensor]] = (
        wds.WebDataset([str(shard) for shard in shards], shardshuffle=len(shards), detshuffle=True, seed=shuffle_seed)
        .compose(wds.detshuffle(bufsize=100_000, initial=100_000, seed=shuffle_seed))
        .decode()
        .select(keep)
        .map(read)
        .batched(batch, collation_fn=encoder.collate, partial=False)
    )
    return loader
