"""A few documents, and what a model's own forward says of each alone: what every shortcut is held against."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flowstream.scoring.head import logits_of
from flowstream.scoring.language import Language, without_cache
from flowstream.scoring.out_of_memory import is_out_of_memory
from flowstream.scoring.reading import IGNORED, Integers
from flowstream.scoring.reference import Reference
from flowstream.scoring.turn import InUse

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2}
"""Nats by which a shortcut may differ, for a model whose largest logit is 4. The model's own logits, in half precision,
are what is off: by 1e-1 in bf16."""

_LENGTHS_AND_PROMPTS = ((12, 5), (7, 0), (1, 0), (9, 3))
_PART = 8
"""Of the first of them, what is read by itself too."""


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """What is left of a sample: the tokens up to the last one that predicts, and what they predict."""

    ids: Integers
    """[n]"""
    targets: Integers
    """[n] the label that each token predicts, -100 for none."""


class Untried(Exception):
    """Why a model cannot be tried; the cause is what it raised."""


@dataclass(frozen=True, eq=False)
class Trial:
    """Documents in groups that may share a micro-batch, and the losses of all their labelled tokens."""

    groups: list[list[Document]]
    expected: Tensor
    tolerance: float
    reads_ahead: bool
    """What comes after a token changes what is predicted from it: this is no causal language model."""

    @classmethod
    def of(cls, reference: Reference, language: Language) -> Trial:
        """`Untried` for a model without room for these documents, or that fails on plain tokens."""
        vocabulary = min(language.num_labels or 0, language.num_ids or 0)
        if vocabulary < 4:
            raise Untried("nothing tells its vocabulary" if vocabulary == 0 else f"it has {vocabulary} tokens only")
        if (language.max_positions or 12) < 12:
            raise Untried(f"it has {language.max_positions} positions only")
        generator = np.random.Generator(np.random.Philox(key=0))
        groups: dict[Hashable, list[Document]] = {}
        for length, prompt in _LENGTHS_AND_PROMPTS:
            ids = generator.integers(vocabulary // 4, vocabulary // 2 + 1, length + 1)
            targets = np.where(np.arange(length) < prompt, IGNORED, ids[1:])
            groups.setdefault(language.rope_group(length), []).append(Document(ids[:-1], targets))
        try:
            said = [_alone(reference, document) for group in groups.values() for document in group]
            whole = next(iter(groups.values()))[0]
            part = Document(whole.ids[:_PART], whole.targets[:_PART])
            partly, _ = _alone(reference, part)
        except Exception as error:  # whatever it is or needs besides, it cannot be tried
            if _is_passing(error):
                raise
            raise Untried(f"it fails on plain tokens ({_first_line(error)})") from error
        largest = max(4.0, *(largest for _, largest in said))
        tolerance = _TOLERANCE.get(reference.dtype, 1e-1) * largest / 4
        expected = torch.cat([losses for losses, _ in said])
        off = (expected[: len(partly)] - partly).abs() > tolerance
        same_rope = language.rope_group(_PART) == language.rope_group(len(whole.ids))
        return cls(list(groups.values()), expected, tolerance, bool(off.any()) and same_rope)

    def error(self, run: Callable[[list[Document]], Tensor]) -> str | None:
        """What keeps `run` from giving the same losses."""
        found: list[Tensor] = []
        if (failure := failure_of(lambda: found.extend(run(group).cpu() for group in self.groups))) is not None:
            return failure
        losses = torch.cat(found)
        both = losses.isfinite() & self.expected.isfinite()
        off = (losses - self.expected).abs()[both]
        if (losses.isfinite() != self.expected.isfinite()).any() or (off > self.tolerance).any():
            return f"a trial is off by {float(off.max()) if len(off) else float('nan'):.2g} nats"
        return None


def failure_of(run: Callable[[], None]) -> str | None:
    """What a model says that cannot be run in some way; `None` where it can.

    What says nothing of the model is raised: memory that ran out, another thread in its way.
    """
    try:
        run()
    except (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as failure:
        if _is_passing(failure):
            raise
        return _first_line(failure)
    return None


def _is_passing(error: Exception) -> bool:
    """Whether the same may go well another time."""
    return is_out_of_memory(error) or isinstance(error, InUse)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _alone(reference: Reference, document: Document) -> tuple[Tensor, float]:
    """Losses of the labelled tokens, and the largest logit, on the CPU."""
    ids = torch.from_numpy(document.ids[None]).to(reference.device)
    with reference.frozen() as model:  # each time anew: some models keep what they have read
        logits = logits_of(model(input_ids=ids, **without_cache(reference)))[0].float().cpu()
    losses = F.cross_entropy(logits, torch.from_numpy(document.targets), reduction="none")
    return losses[torch.from_numpy(document.targets != IGNORED)], float(logits.abs().max())
