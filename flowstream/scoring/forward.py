"""From documents to losses: the body of a causal language model over packs, and its head over labelled rows.

Both are shortcuts, and each is tried on a few tokens against the model's own forward, one sample at a time. Where one
does not hold, the way around it is taken, and told.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowstream.scoring.device import Lane
from flowstream.scoring.head import Head, logits_of, losses_of_logits
from flowstream.scoring.language import Language, check_logits, without_cache
from flowstream.scoring.packing import Pack, Packing, Unpackable, offsets_of, reason_against
from flowstream.scoring.reading import IGNORED, Integers, right_padded
from flowstream.scoring.reference import Reference
from flowstream.window import Layout, Packed, Padded

_logger = logging.getLogger("flowstream")

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Nats by which a shortcut may differ, for a model whose largest logit is 4. The model's own logits, in half precision,
are what is off."""


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """What is left of a sample: the tokens up to the last one that predicts, and what they predict."""

    ids: Integers
    """[n]"""
    targets: Integers
    """[n] the label that each token predicts, -100 for none."""


@dataclass(frozen=True)
class _Way:
    """Which shortcuts are taken."""

    packs: bool
    head: bool
    trims: bool

    def __str__(self) -> str:
        body = "packed" if self.packs else "sorted by length and padded"
        rest = "" if not self.packs else ", the last layer on labelled rows" if self.trims else ""
        return f"{body}{rest}, {'fp32 head' if self.head else 'the logits of the model'}"


class Forward:
    """Owns how the reference is run over documents: with which of the shortcuts, and, if asked for, compiled."""

    def __init__(
        self, reference: Reference, language: Language, lane: Lane, *, max_head_bytes: int, compile: bool = False
    ) -> None:
        self._reference = reference
        self._language = language
        self._lane = lane
        self._max_head_bytes = max_head_bytes
        self._head = Head.of(reference.model, max_head_bytes)
        self._compiled: Callable[..., Any] | None = None
        self._way = _Way(packs=False, head=False, trims=False)
        self._packing: Packing | None = None
        self._choose(self._reason_against(), trims=not compile)
        if compile:
            self._compile()

    @property
    def layout(self) -> Layout:
        """How documents are brought together in a micro-batch."""
        return Packed(self._multiple) if self._way.packs else Padded()

    @property
    def described(self) -> str:
        """What of it may move a loss: part of a cache's namespace."""
        return f"{self._way}{', compiled' if self._compiled is not None else ''}"

    def head_bytes(self, num_tokens: int) -> int:
        """What the losses of so many labelled tokens take at a time."""
        if self._way.head:
            assert self._head is not None
            return self._head.num_bytes(num_tokens)
        return num_tokens * (self._language.num_labels or 0) * (4 + self._reference.dtype.itemsize)

    def losses(self, documents: Sequence[Document]) -> Tensor:
        """[n] fp32 losses of all labelled tokens, document by document, on the reference's device."""
        with self._reference.frozen() as model:
            return self._run(model, documents, self._way)

    @property
    def _multiple(self) -> int:
        return 256 if self._compiled is not None or self._lane.device.type == "cuda" else 1

    # -- running -----------------------------------------------------------------------------------

    def _run(self, model: nn.Module, documents: Sequence[Document], way: _Way) -> Tensor:
        return self._run_packed(model, documents, way) if way.packs else self._run_padded(model, documents, way)

    def _run_packed(self, model: nn.Module, documents: Sequence[Document], way: _Way) -> Tensor:
        lengths = [len(document.ids) for document in documents]
        stops = np.cumsum(lengths)
        length = Packed(self._multiple).size(lengths)
        ids, positions = np.full((2, length), self._language.pad_id or 0)
        np.concatenate([document.ids for document in documents], out=ids[: stops[-1]])
        positions[:] = np.arange(length) - np.repeat([0, *stops], [*lengths, length - stops[-1]])
        targets = np.concatenate([document.targets for document in documents])
        labelled = np.flatnonzero(targets != IGNORED)
        sent = self._lane.send(
            ids[None], positions[None], labelled, targets[labelled], offsets_of(stops.tolist(), length)
        )
        pack = Pack(
            stops.tolist(),
            length,
            labelled=sent[2],
            first_labelled=labelled[np.searchsorted(labelled, stops - lengths)].tolist(),
            offsets=sent[4].to(torch.int32),
        )
        inputs = {"input_ids": sent[0], "position_ids": sent[1], **without_cache(self._reference)}
        packing = self._packing if way == self._way else None
        with (packing or Packing(model, trims=way.trims)).of(pack):
            if way.head:
                hidden = self._hidden(model, inputs)
                return self._take(hidden[0], pack.labelled, sent[3])
            if "logits_to_keep" in self._reference.accepted:
                logits = logits_of(model(**inputs, logits_to_keep=pack.labelled))
                return losses_of_logits(logits, torch.arange(len(labelled), device=logits.device), sent[3])
            logits = logits_of(model(**inputs))
            check_logits(logits, (1, length))
            return losses_of_logits(logits, pack.labelled, sent[3])

    def _run_padded(self, model: nn.Module, documents: Sequence[Document], way: _Way) -> Tensor:
        ids = right_padded([document.ids for document in documents], self._language.pad_id or 0)
        targets = right_padded([document.targets for document in documents], IGNORED).reshape(-1)
        lengths = np.array([len(document.ids) for document in documents])
        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
        rows = np.flatnonzero(targets != IGNORED)
        sent = self._lane.send(ids, mask, rows, targets[rows])
        inputs: dict[str, Any] = {"input_ids": sent[0], **without_cache(self._reference)}
        if "attention_mask" in self._reference.accepted:
            inputs["attention_mask"] = sent[1]
        if way.head:
            return self._take(self._hidden(model, inputs).flatten(0, 1), sent[2], sent[3])
        logits = logits_of(model(**inputs))
        check_logits(logits, (len(documents), ids.shape[1]))
        return losses_of_logits(logits, sent[2], sent[3])

    def _hidden(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        body: Any = model.base_model if self._compiled is None else self._compiled
        hidden: Tensor = body(**inputs).last_hidden_state
        return hidden

    def _take(self, hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        assert self._head is not None
        return self._head.losses(hidden.index_select(0, rows), targets)

    # -- choosing ----------------------------------------------------------------------------------

    def _reason_against(self) -> str | None:
        if not hasattr(self._reference.model, "base_model") or self._reference.config is None:
            return "it is no model of transformers"
        return reason_against(self._reference.model, self._reference.accepted)

    @torch.inference_mode(False)
    def _choose(self, reason: str | None, trims: bool) -> None:
        """The shortest way that gives what the model says of each document alone."""
        has_head = self._head is not None
        ways = [_Way(True, True, trims), _Way(True, True, False)] if has_head else []
        ways += [_Way(True, False, trims), _Way(True, False, False)]
        if reason is not None:
            ways = []
        ways += [_Way(False, True, False)] if has_head else []
        name = type(self._reference.model).__name__
        with self._lane.entered(), self._reference.frozen() as model:
            trial = _Trial.of(model, self._reference, self._language) if ways else None
            for number, way in enumerate(ways if trial is not None else []):
                assert trial is not None
                error = trial.error(lambda documents, way=way: self._run(model, documents, way))  # type: ignore[misc]
                if error is None:
                    self._way = way
                    break
                _logger.warning("%s is not scored %s: %s", name, ways[number], error)
            if self._way.packs:
                self._packing = Packing(model, trims=self._way.trims)
        because = f" ({reason})" if reason is not None else ""
        _logger.info("%s is scored %s%s", name, self._way, because)

    def _compile(self) -> None:
        if not self._way.head:
            raise ValueError(
                f"compile=True compiles the body of the reference, and {type(self._reference.model).__name__} is "
                f"scored {self._way}: leave it out"
            )
        # Dynamic shapes: one graph for packs of all lengths.
        self._compiled = torch.compile(self._reference.model.base_model, dynamic=True)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class _Trial:
    """A few documents, and what the model's own forward says of each alone."""

    documents: list[Document]
    expected: Tensor
    tolerance: float

    @classmethod
    def of(cls, model: nn.Module, reference: Reference, language: Language) -> _Trial | None:
        """`None` for a model that fails on plain tokens: it is asked in the plainest way only."""
        vocabulary = language.num_labels
        longest = min(12, language.max_positions or 12)
        if vocabulary is None or vocabulary < 4 or longest < 12:
            return None
        generator = np.random.Generator(np.random.Philox(key=0))
        documents, losses, largest = [], [], 4.0
        for length, prompt in ((12, 5), (7, 0), (1, 0), (9, 3)):
            ids = generator.integers(vocabulary // 4, vocabulary // 2 + 1, length + 1)
            targets = np.where(np.arange(length) < prompt, IGNORED, ids[1:])
            documents.append(Document(ids[:-1], targets))
            inputs = {"input_ids": torch.from_numpy(ids[None, :-1]).to(reference.device), **without_cache(reference)}
            try:
                logits = logits_of(model(**inputs))[0].float()
            except Exception:
                return None
            if logits.shape[0] != length:
                return None
            losses.append(F.cross_entropy(logits, torch.from_numpy(targets).to(logits.device), reduction="none"))
            largest = max(largest, float(logits.abs().max()))
            losses[-1] = losses[-1][prompt:]
        return cls(documents, torch.cat(losses).cpu(), _TOLERANCE.get(reference.dtype, 1e-1) * largest / 4)

    def error(self, run: Callable[[list[Document]], Tensor]) -> str | None:
        """What keeps `run` from giving the same losses."""
        try:
            found = run(self.documents).cpu()
        except (Unpackable, AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as failure:
            return f"{type(failure).__name__}: {failure}".splitlines()[0]
        both = found.isfinite() & self.expected.isfinite()
        off = (found - self.expected).abs()[both]
        if (found.isfinite() != self.expected.isfinite()).any() or (off > self.tolerance).any():
            return f"a trial is off by {float(off.max()) if len(off) else float('nan'):.2g} nats"
        return None
