"""Losses in fp32 from a language model's last hidden states, of the labelled rows only, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowstream.scoring.adapters import base_of

_CHUNK = 1024
"""Rows of logits in fp32 at a time: with a vocabulary of 128 k, half a gigabyte."""

_NUM_COPIES = 3
"""What a chunk of logits takes, in copies of it: the logits, their log-softmax or exponentials, a transform's."""

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Gemma, RecurrentGemma, xLSTM."""

_SCALES = ("logit_scale", "lm_head_multiplier")
"""Cohere, Falcon-H1."""

_CPU_ROWS, _CPU_COLUMNS = 256, 8192
"""A chunk that stays in a CPU's cache."""
_MIN_COLUMNS = 1024
_GPU_ROWS = 4096
"""Enough rows for a GPU's matrix units."""


@dataclass(frozen=True, eq=False)
class Head:
    """The output layer of a language model: rows of hidden states [n, D] → losses [n], never [n, V] as a whole.

    The logits are taken in fp32 whatever the model's dtype: bf16 logits put losses off by .05 to .1 nats. Over a large
    vocabulary the softmax is taken a part at a time, so that the memory it takes, beside its result, is within
    `max_bytes`.
    """

    linear: nn.Linear
    max_bytes: int
    softcap: float | None = None
    """Logits are `softcap · tanh(logits / softcap)` (Gemma 2's final_logit_softcapping) …"""
    scale: float = 1.0
    """… of the linear layer's output times this (Cohere's logit_scale, the inverse of Granite's logits_scaling)."""

    @classmethod
    def of(cls, model: nn.Module, max_bytes: int) -> Head | None:
        """The head of a Hugging Face language model as its configuration describes it; `None` where it has none.

        Whether it is the model's own is for a trial to show: there are transforms that no configuration names.
        """
        try:
            linear = base_of(model.get_output_embeddings())  # type: ignore[operator]
            config = model.config.get_text_config()  # type: ignore[operator,union-attr]
        except (AttributeError, NotImplementedError):
            return None
        if type(linear) is not nn.Linear or linear.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return None  # quantised, or of another kind
        caps = [cap for name in _SOFTCAPS if (cap := getattr(config, name, None))]
        scale = math.prod(getattr(config, name, None) or 1.0 for name in _SCALES)
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(linear, max_bytes, caps[0] if caps else None, float(scale))

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """[n] fp32 losses in nats of predicting `targets` [n] from `hidden` [n, D], all on the head's device."""
        vocabulary = self.linear.weight.shape[0]
        num_rows, num_columns = self._chunk(len(hidden))
        if num_columns >= vocabulary:
            weight = self._weight(slice(None))
            parts = [
                F.cross_entropy(self._logits(rows, slice(None), weight), wanted, reduction="none")
                for rows, wanted in zip(hidden.split(num_rows), targets.split(num_rows), strict=True)
            ]
            return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
        total = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
        own = torch.zeros_like(total)
        # The vocabulary outside: where weights are converted, that is done once for all rows.
        for start in range(0, vocabulary, num_columns):
            columns = slice(start, min(start + num_columns, vocabulary))
            weight = self._weight(columns)
            for first in range(0, len(hidden), num_rows):
                rows = slice(first, first + num_rows)
                logits = self._logits(hidden[rows], columns, weight)
                within = targets[rows] - start
                inside = (within >= 0) & (within < logits.shape[1])
                picked = logits.gather(1, within.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
                own[rows] = torch.where(inside, picked, own[rows])
                total[rows] = torch.logaddexp(total[rows], logits.logsumexp(1))
        return (total - own).clamp_min(0)  # rounding would take what is next to 0 below it

    def num_bytes(self, num_rows: int) -> int:
        """What `losses` takes beside its arguments and its result."""
        rows, columns = self._chunk(num_rows)
        return 4 * (_NUM_COPIES * rows * columns + self._converted * (rows + columns)) + 16 * num_rows

    @property
    def _converted(self) -> int:
        """Numbers a row, and a column of the vocabulary, that are converted to fp32 for the product."""
        weight = self.linear.weight
        return 0 if weight.dtype == torch.float32 or weight.is_cuda else weight.shape[1]

    def _chunk(self, num_rows: int) -> tuple[int, int]:
        """Rows and columns of logits at a time: a function of the shapes and the budget."""
        vocabulary = self.linear.weight.shape[0]
        if self.linear.weight.device.type == "cpu":
            rows, columns = _CPU_ROWS, min(vocabulary, _CPU_COLUMNS)
        else:
            rows, columns = _GPU_ROWS, vocabulary
        rows = max(min(rows, num_rows), 1)
        room = max(self.max_bytes - 16 * num_rows, 1) // 4
        width = self._converted
        # Narrower before lower: products of few rows leave the device idle.
        columns = min(columns, max((room - width * rows) // (_NUM_COPIES * rows + width), 1))
        if columns < min(vocabulary, _MIN_COLUMNS):
            columns = min(vocabulary, _MIN_COLUMNS)
            rows = max(min(rows, (room - width * columns) // (_NUM_COPIES * columns + width)), 1)
        return rows, columns

    def _weight(self, columns: slice) -> Tensor:
        weight = self.linear.weight[columns]
        return weight if weight.is_cuda else weight.float()

    def _logits(self, hidden: Tensor, columns: slice, weight: Tensor) -> Tensor:
        if weight.is_cuda and weight.dtype != torch.float32:
            logits = torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
        else:
            logits = hidden.to(weight.dtype) @ weight.T
        if self.linear.bias is not None:
            logits += self.linear.bias[columns].float()
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: `.logits`, a mapping's "logits", the first of a tuple, or the tensor itself."""
    if isinstance(output, Mapping):
        output = output.get("logits", output)
    found = getattr(output, "logits", output)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the reference gave a {type(output).__name__} without logits: it must return a tensor or `.logits`; for "
            "anything else write FunctionScorer(fn), fn(batch) -> [B] losses"
        )
    return found


def losses_of_logits(logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """[n] fp32 losses in nats of predicting `targets` [n] from the rows `rows` [n] of `logits` [..., V].

    The model's logits are taken as they come, so softcaps and scales are in them; the softmax is in fp32.
    """
    flat = logits.flatten(0, -2)
    losses = [
        F.cross_entropy(flat.index_select(0, row).float(), target, reduction="none")
        for row, target in zip(rows.split(_CHUNK), targets.split(_CHUNK), strict=True)
    ]
    return torch.cat(losses)
