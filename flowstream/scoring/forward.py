"""From documents to losses: the body of a causal language model over packs, and its head over labelled rows.

Both are shortcuts, and each is tried on a few tokens against the model's own forward, one sample at a time. Where one
does not hold, the way around it is taken, and told.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from flowstream.scoring.adapters import embeddings_of
from flowstream.scoring.device import Lane
from flowstream.scoring.head import Head, logits_of, losses_of_logits
from flowstream.scoring.language import Language, check_logits, without_cache
from flowstream.scoring.out_of_memory import enough_to_try
from flowstream.scoring.packing import Pack, Packing, asked, offsets_of, reason_against
from flowstream.scoring.reading import IGNORED, right_padded
from flowstream.scoring.reference import Reference
from flowstream.scoring.trial import Document, Trial, Untried, failure_of
from flowstream.window import Layout, Packed, Padded

_logger = logging.getLogger("flowstream")


@dataclass(frozen=True)
class _Way:
    """Which shortcuts are taken."""

    packs: bool = False
    head: bool = False
    trims: bool = False
    alone: bool = False
    """Not even padded: the model says something else of a sample beside others."""

    def __str__(self) -> str:
        body = "packed" if self.packs else "one at a time" if self.alone else "sorted by length and padded"
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
        self._head = Head.of(reference.model, max_head_bytes)
        self._compiled: Callable[..., Any] | None = None
        self._way = _Way()
        self._packing: Packing | None = None
        self._choose(compile)

    @property
    def layout(self) -> Layout:
        """How documents are brought together in a micro-batch."""
        return Packed(self._multiple) if self._way.packs else Padded()

    @property
    def head(self) -> Head | None:
        """The model's head, where it is known to be all that comes after the hidden states."""
        return self._head if self._way.head else None

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
        return self._run(documents, self._way)

    @property
    def _multiple(self) -> int:
        return 256 if self._compiled is not None or self._lane.device.type == "cuda" else 1

    # -- running -----------------------------------------------------------------------------------

    def _run(self, documents: Sequence[Document], way: _Way) -> Tensor:
        if way.alone:
            return torch.cat([self._run([document], replace(way, alone=False)) for document in documents])
        with self._reference.frozen() as model:
            run = self._run_packed if way.packs else self._run_padded
            return run(model, documents, way)

    def _run_packed(self, model: nn.Module, documents: Sequence[Document], way: _Way) -> Tensor:
        lengths = [len(document.ids) for document in documents]
        stops = np.cumsum(lengths)
        length = Packed(self._multiple).size(lengths)
        ids, positions = np.full((2, length), self._language.pad_id or 0)
        np.concatenate([document.ids for document in documents], out=ids[: stops[-1]])
        positions[: stops[-1]] = np.arange(stops[-1]) - np.repeat(stops - lengths, lengths)
        positions[stops[-1] :] = 0
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
    def _choose(self, compile: bool) -> None:
        """The shortest way that gives what the model says of each document alone."""
        name = type(self._reference.model).__name__
        with self._lane.entered(), enough_to_try():
            try:
                trial = Trial.of(self._reference, self._language)
            except Untried as why:
                # The model's own logits, padded on the right, where what is causal does not look.
                level = logging.INFO if why.__cause__ is None else logging.WARNING
                _logger.log(level, "%s is scored %s, untried: %s", name, self._way, why)
                if compile:
                    self._refuse_to_compile(f"it could not be tried: {why}")
                return
            if trial.reads_ahead:
                _logger.warning(
                    "%s reads ahead of the token that it predicts from: it is no causal language model, and its losses "
                    "say little (is `is_decoder` missing in its configuration?)",
                    name,
                )
            reason = self._reason_against()
            if reason is None:
                reason = failure_of(partial(self._ask_for_masks, trial.groups[0][0]))
                if reason is not None:
                    _logger.warning("%s is not scored packed: %s", name, reason)
            against_head = _why_headless(self._reference.model)
            for way in self._ways(packs=reason is None, trims=not compile):
                error = trial.error(partial(self._run, way=way))
                if error is None:
                    self._way = way
                    break
                _logger.warning("%s is not scored %s: %s", name, way, error)
                against_head = error if way.head else against_head
            else:
                self._way = _Way(alone=True)
            if self._way.packs:
                self._packing = Packing(self._reference.model, trims=self._way.trims)
            because = f" ({reason})" if reason is not None else ""
            _logger.info("%s is scored %s%s", name, self._way, because)
            if compile and not self._way.head:
                self._refuse_to_compile(f"its head is not taken in fp32: {against_head}")
            if compile:
                self._compile(trial)

    def _ways(self, *, packs: bool, trims: bool) -> list[_Way]:
        """What is tried, the shortest first."""
        heads = [True, False] if self._head is not None else [False]
        trimmed = [True, False] if trims else [False]
        packed = [_Way(packs=True, head=head, trims=trims) for head in heads for trims in trimmed]
        return (packed if packs else []) + [_Way(head=head) for head in heads]

    def _ask_for_masks(self, document: Document) -> None:
        length = len(document.ids)
        sent = self._lane.send(document.ids[None], np.arange(length), offsets_of([length], length))
        pack = Pack([length], length, labelled=sent[1], first_labelled=[0], offsets=sent[2].to(torch.int32))
        with self._reference.frozen() as model, asked(model, pack):
            model(input_ids=sent[0], **without_cache(self._reference))

    def _refuse_to_compile(self, because: str) -> NoReturn:
        raise ValueError(
            f"compile=True compiles the body of the reference, and {type(self._reference.model).__name__} is scored "
            f"{self._way} ({because}): leave it out"
        )

    def _compile(self, trial: Trial) -> None:
        """The body compiled, if it says the same. Compilation happens here, not in the first window."""
        name = type(self._reference.model).__name__
        _logger.info("%s is compiled, and tried: this may take minutes", name)
        # Dynamic shapes: one graph for packs of all lengths.
        self._compiled = torch.compile(self._reference.model.base_model, dynamic=True)  # type: ignore[arg-type]
        error = trial.error(partial(self._run, way=self._way))
        if error is not None:
            self._compiled = None
            _logger.warning("%s is not scored compiled: %s", name, error)
        else:
            _logger.info("%s is scored compiled", name)


def _why_headless(model: nn.Module) -> str:
    """Why `Head.of` knows none."""
    head = embeddings_of(model, "get_output_embeddings")
    if head is None:
        return "the model has none"
    dtype = getattr(getattr(head, "weight", None), "dtype", None)
    return f"it is a {type(head).__name__} in {dtype}, not a Linear in float32, bfloat16 or float16"
