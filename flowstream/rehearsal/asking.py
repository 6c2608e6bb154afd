"""Asking the frozen model about prior samples: losses through its scorer, and answers as the training loop asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowstream.batch import fields
from flowstream.distributed.meetings import Meetings
from flowstream.numerics import own_numerics
from flowstream.padding_batches import LABEL_NAMES
from flowstream.recollate import width_of
from flowstream.rehearsal.kept import Columns
from flowstream.rehearsal.spec import Question, Rehearsal
from flowstream.scoring.base import Scores
from flowstream.scoring.head import logits_of
from flowstream.scoring.language import without_cache
from flowstream.scoring.reading import as_tensor, to_device

_NUM_BATCHES = 32
"""Batches that the losses are taken of together."""


@own_numerics()
def ask(rehearsal: Rehearsal, which: Sequence[int], meetings: Meetings) -> Columns:
    """Widths, losses, answers and labels of these samples, in this order."""
    width = np.ones(len(which), dtype=np.int32)
    loss: NDArray[np.float32] = np.full(len(which), np.nan, dtype=np.float32)
    right = np.zeros(len(which), dtype=np.bool_)
    labels: list[str] = [""] * len(which)
    is_scored = rehearsal.strategy == "mix-cd"
    is_sequence = width_of(rehearsal.collate_fn([rehearsal.prior[0]])) > 0
    if not is_scored and not is_sequence:  # nothing is to be known of them
        which = ()
    for at, batches in _in_windows(rehearsal, which):
        scores = _scores(rehearsal, [batch for _, batch in batches]) if is_scored else [None] * len(batches)
        for (samples, batch), score in zip(batches, scores, strict=True):
            for i, sample in enumerate(samples if is_sequence else ()):
                width[at + i] = width_of(rehearsal.collate_fn([sample]))
            end = at + len(samples)
            if score is not None:
                if len(score.loss) != len(samples):
                    raise ValueError(
                        f"collate_fn made {len(score.loss)} samples of prior samples {which[at]} to {which[end - 1]}, "
                        f"which are {len(samples)}: rehearsal needs a row, or a packed document, for each"
                    )
                loss[at:end] = score.loss.numpy()
                right[at:end] = _right(rehearsal, which[at:end], samples, batch, score)
                labels[at:end] = [
                    _label(rehearsal, i, sample) for i, sample in zip(which[at:end], samples, strict=True)
                ]
            at = end
    if meetings.world.has_peers:  # their arithmetic may differ in the last bit
        loss = meetings.peers.agree(torch.from_numpy(loss)).numpy()
        right = meetings.peers.agree(torch.from_numpy(right).float()).numpy() > 0
    return {"width": width, "loss": loss, "was_correct": right, "label": np.array(labels)}


def _in_windows(rehearsal: Rehearsal, which: Sequence[int]) -> Iterator[tuple[int, list[tuple[list[Any], Any]]]]:
    """Windows of batches, each with the samples that it holds; and where the window begins."""
    size = rehearsal.batch_size
    for begin in range(0, len(which), size * _NUM_BATCHES):
        batches = []
        for at in range(begin, min(begin + size * _NUM_BATCHES, len(which)), size):
            samples = [rehearsal.prior[i] for i in which[at : at + size]]
            batches.append((samples, rehearsal.collate_fn(samples)))
        yield begin, batches


def _scores(rehearsal: Rehearsal, batches: list[Any]) -> list[Scores]:
    try:
        return rehearsal.scorer.begin(batches, level="sample").finish()
    except ValueError as error:
        raise ValueError(f"{error} (of the prior data: collate_fn= must make of them what the loader gives)") from error


def _right(rehearsal: Rehearsal, which: Sequence[int], samples: list[Any], batch: Any, score: Scores) -> list[bool]:
    if rehearsal.was_correct is not None:
        return [
            bool(_asked(rehearsal.was_correct, sample, "was_correct", i))
            for i, sample in zip(which, samples, strict=True)
        ]
    logits, labels = _answer(rehearsal.reference, batch)
    right: list[bool] = rehearsal.judge.right(logits, labels, score.segment, len(samples)).tolist()
    return right


def _label(rehearsal: Rehearsal, index: int, sample: Any) -> str:
    if rehearsal.label is None:
        return ""
    found = _asked(rehearsal.label, sample, "label", index)
    return str(found.item() if isinstance(found, Tensor | np.ndarray | np.generic) and found.size else found)


def _asked(question: Question, sample: Any, name: str, index: int) -> Any:
    if callable(question):
        return question(sample)
    if not isinstance(question, str):
        return question[index]
    try:
        found = fields(sample)
    except ValueError:
        found = {}
    if question not in found:
        has = f"only {', '.join(map(repr, found))}" if found else f"being a {type(sample).__name__}"
        raise ValueError(
            f"{name} is {question!r}, but a prior sample has no such field, {has}: name a field that it has, or give a "
            "function of a sample"
        )
    return found[question]


def _answer(reference: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """The frozen model's logits of a batch as the training loop reads it, and the labels."""
    found = fields(batch)
    lone: Any = None
    if 0 in found:
        lone, labels = found[0], found.get(1)
        found = fields(lone) if not isinstance(lone, Tensor | np.ndarray) else {}
    else:
        labels = next((found[name] for name in LABEL_NAMES if found.get(name) is not None), None)
    named = {name: value for name, value in found.items() if name in reference.accepted and name not in LABEL_NAMES}
    arrays = {name: as_tensor(value) for name, value in named.items() if isinstance(value, Tensor | np.ndarray)}
    if not arrays:
        others = [value for name, value in found.items() if name not in LABEL_NAMES]
        lone = lone if lone is not None else next((v for v in others if isinstance(v, Tensor | np.ndarray)), None)
        if lone is None:
            raise ValueError(f"a prior batch has the fields {list(found)}: none is an input of the prior model")
    labels = as_tensor(labels if labels is not None else arrays["input_ids"])
    if "decoder_input_ids" in reference.accepted and "decoder_input_ids" not in arrays:
        arrays["labels"] = labels  # the decoder's inputs are made of them
    device, dtype = reference.device, reference.dtype
    placed = {
        name: to_device(value.to(dtype) if value.is_floating_point() else value, device)
        for name, value in arrays.items()
    }
    with reference.frozen() as model:
        if placed:
            output = model(**placed, **without_cache(reference))
        else:
            x = as_tensor(lone)
            output = model(to_device(x.to(dtype) if x.is_floating_point() else x, device))
        return logits_of(output), labels
