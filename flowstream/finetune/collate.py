"""From samples of tokens to a batch, padded on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flowstream.finetune.encoding import IGNORED


@dataclass(frozen=True)
class Collate:
    """Samples → `input_ids`, `attention_mask`, `labels`, [B, T] int64. T is a multiple; other keys are left out."""

    pad_id: int
    multiple: int = 8
    """Tensor cores are fastest on widths that divide so."""

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> Collate:
        """With the tokenizer's padding token, or else its end of text: the mask tells which is which."""
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        return Collate(pad_id=next((int(token) for token in ids if token is not None), 0))

    def __call__(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        longest = max(len(sample["input_ids"]) for sample in samples)
        shape = (len(samples), -(-longest // self.multiple) * self.multiple)
        batch = {
            "input_ids": torch.full(shape, self.pad_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED),
        }
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            batch["input_ids"][row, :length] = sample["input_ids"]
            batch["attention_mask"][row, :length] = 1
            batch["labels"][row, :length] = sample["labels"]
        return batch
