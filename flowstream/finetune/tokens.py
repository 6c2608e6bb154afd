"""A data set of tokens in memory: five bytes a token, read once, any sample at once."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from flowstream.finetune.encoding import IGNORED, Encoded, Encoder
from flowstream.finetune.records import records


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenDataset(Dataset[dict[str, Tensor]]):
    """Samples laid end to end; an item is `{"input_ids", "labels"}`, [T] int64 both, labels -100 on the prompt."""

    ids: Tensor
    """[num_tokens] int32."""
    is_labelled: Tensor
    """[num_tokens] bool."""
    offsets: Tensor
    """[samples + 1] int64: where each begins, and where the last ends."""
    num_dropped: int = 0
    """Samples left out: too long, or without a label left once cut."""
    num_truncated: int = 0
    """Samples that are here, but cut."""

    @staticmethod
    def of(samples: Iterable[Encoded | None]) -> TokenDataset:
        """`None` is a sample that was dropped."""
        ids, is_labelled, offsets = array("i"), bytearray(), array("q", [0])
        num_dropped = num_truncated = 0
        for sample in samples:
            if sample is None:
                num_dropped += 1
                continue
            num_truncated += sample.num_cut > 0
            ids.extend(sample.ids)
            is_labelled.extend(label != IGNORED for label in sample.labels)
            offsets.append(len(ids))
        return TokenDataset(
            ids=torch.tensor(ids, dtype=torch.int32),
            is_labelled=torch.tensor(is_labelled, dtype=torch.bool),
            offsets=torch.tensor(offsets, dtype=torch.int64),
            num_dropped=num_dropped,
            num_truncated=num_truncated,
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        where = self._where(index)
        ids = self.ids[where].long()
        return {"input_ids": ids, "labels": ids.masked_fill(~self.is_labelled[where], IGNORED)}

    @property
    def lengths(self) -> Tensor:
        """[samples] int64, tokens of each."""
        return self.offsets.diff()

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_labelled(self) -> int:
        """Tokens that have a loss."""
        return int(self.is_labelled.sum())

    def text(self, index: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
        """What stands before the first label, and the rest, decoded without special tokens."""
        where = self._where(index)
        return text_of(self.ids[where], self.is_labelled[where], tokenizer)

    def _where(self, index: int) -> slice:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start, end = self.offsets[index % len(self) :][:2].tolist()
        return slice(start, end)


def text_of(ids: Tensor, is_labelled: Tensor, tokenizer: Any) -> tuple[str, str]:
    """What stands before the first label, and the rest, decoded without special tokens; [T] both."""
    first = int(is_labelled.byte().argmax())
    prompt, response = (
        str(tokenizer.decode(part.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for part in (ids[:first], ids[first:])
    )
    return prompt, response


def read_tokens(spec: str, encoder: Encoder, *, split: str = "train", limit: int | None = None) -> TokenDataset:
    """Everything that `spec` names, encoded; of `limit` records the first ones.

    Raises:
        ValueError, OSError: what `records` and `Encoder` say; nothing there, or nothing left.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"the limit is {limit} samples: it counts from 1")
    found = islice(records(spec, split=split), limit)
    dataset = TokenDataset.of(encoder(record, place) for place, record in found)
    if len(dataset) == 0 and dataset.num_dropped:
        raise ValueError(
            f"{spec}: all {dataset.num_dropped} samples were dropped, for none fits into {encoder.max_length} tokens: "
            "raise --max-length"
        )
    if len(dataset) == 0:
        raise ValueError(f"{spec} is empty: there is no sample in it")
    return dataset
