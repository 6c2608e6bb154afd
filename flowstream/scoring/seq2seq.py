"""Losses of an encoder-decoder language model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowstream.scoring.base import Job, Level
from flowstream.scoring.cache import LossCache, Namespace, content_key, row_key
from flowstream.scoring.capture import head_inputs
from flowstream.scoring.head import Head, logits_of, losses_of_logits
from flowstream.scoring.job import Reading, Sample
from flowstream.scoring.language import (
    Language,
    Whole,
    check_logits,
    further_inputs,
    labelled,
    read_whole,
    run_whole,
    without_cache,
)
from flowstream.scoring.out_of_memory import enough_to_try, is_out_of_memory
from flowstream.scoring.reading import (
    IGNORED,
    Integers,
    Place,
    check_ids,
    check_labels,
    integers,
    mask_of,
    named_fields,
    right_padded,
    same_shape,
)
from flowstream.scoring.reference import Copy, TrainedAdapters
from flowstream.scoring.runtime import Runtime, check_budget, loaded
from flowstream.scoring.turn import InUse

_VERSION = 2
"""Raised when a change here moves losses: it is part of every cache key."""

_logger = logging.getLogger("flowstream")

_READ = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    ids: Integers
    """[n] what the encoder reads."""
    targets: Integers
    """[u] what the decoder is to say, -100 where it does not matter."""
    decoder_ids: Integers | None
    """[u] what the decoder reads, where the batch says so."""


class Seq2SeqLMScorer:
    """Losses of any Hugging Face encoder-decoder language model (T5, BART …), frozen. A `Scorer`.

    Batches as for `CausalLMScorer`, with `labels` [B, U] (required; -100 ignored). A token's loss stands at its label:
    there is no shift. The decoder reads `decoder_input_ids` [B, U] if the batch has them, otherwise what the model
    makes of the labels, shifted right. Each sample is scored alone and unpadded on both sides: -100 at the ends of the
    labels, and tokens where `attention_mask` or `decoder_attention_mask` is 0, are no part of it. A batch with further
    inputs of the model (sound, images) is scored as it is, with all of them.

    `copy`, `trained_adapters`, `max_head_bytes` and `token_budget` (of encoder and decoder together) are those of
    `CausalLMScorer`.
    """

    levels: frozenset[Level] = frozenset({"sample", "token"})

    def __init__(
        self,
        model: nn.Module,
        *,
        copy: Copy = "auto",
        token_budget: int | None = None,
        max_head_bytes: int = 2**28,
        device: torch.device | str | None = None,
        trained_adapters: TrainedAdapters = "refuse",
    ) -> None:
        check_budget("max_head_bytes", max_head_bytes)
        self._runtime = Runtime(
            model, copy=copy, token_budget=token_budget, device=device, trained_adapters=trained_adapters
        )
        self._reference = self._runtime.reference
        if "decoder_input_ids" not in self._reference.accepted:
            raise ValueError(
                f"{type(model).__name__}.forward takes no decoder_input_ids: it is no encoder-decoder model; for a "
                "causal one use CausalLMScorer"
            )
        self._language = Language.of(self._reference)
        self._head = self._tried_head(max_head_bytes)
        self._runtime.identify(self, _VERSION, self._head is not None)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        token_budget: int | None = None,
        max_head_bytes: int = 2**28,
        device: torch.device | str | None = None,
        trained_adapters: TrainedAdapters = "refuse",
        **kwargs: Any,
    ) -> Seq2SeqLMScorer:
        """A scorer with a model of its own. `kwargs` go to `AutoModelForSeq2SeqLM.from_pretrained`."""
        from transformers import AutoModelForSeq2SeqLM

        model = loaded(AutoModelForSeq2SeqLM, name_or_path, device, **kwargs)
        return cls(
            model,
            copy=False,
            token_budget=token_budget,
            max_head_bytes=max_head_bytes,
            trained_adapters=trained_adapters,
        )

    def begin(
        self,
        batches: Sequence[Any],
        *,
        level: Level,
        cache: LossCache | None = None,
        row_keys: Sequence[Sequence[object]] | None = None,
        needs_loss: bool = True,
    ) -> Job:
        return self._runtime.begin(
            batches, self._read, self._run, level=level, cache=cache, row_keys=row_keys, needs_loss=needs_loss
        )

    def check(self) -> None:
        self._reference.check()

    def fingerprint(self) -> str:
        return self._runtime.fingerprint

    def state_dict(self) -> dict[str, Any]:
        return self._runtime.budget.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._runtime.budget.load_state_dict(state)

    # Reading

    def _read(self, batch: Any, place: Place, namespace: Namespace, row_keys: Sequence[object] | None) -> Reading:
        named = named_fields(batch, place, "input_ids")
        if "labels" not in named:
            raise ValueError(f"{place} has no labels, only {sorted(named)}: an encoder-decoder model needs [B, U]")
        labels = integers(named["labels"], "labels", place)
        check_labels(labels, self._language.num_labels, place)
        if row_keys is not None and len(row_keys) != len(labels):
            raise ValueError(f"{place} has {len(row_keys)} cache keys for {len(labels)} rows")
        decoder_ids, decoder_mask = self._decoder(named, labels, place)
        further = further_inputs(named, _READ, self._reference, place)
        if "input_ids" in named:
            ids = integers(named["input_ids"], "input_ids", place)
            mask = mask_of(named.get("attention_mask"), ids.shape, place)
            check_ids(ids, mask, self._language.num_ids, "input_ids", place)
            if len(ids) != len(labels):
                raise ValueError(f"{place} has {len(ids)} rows of input_ids and {len(labels)} of labels")
            if not further:
                sides = (ids, mask), (decoder_ids, decoder_mask)
                return self._read_pairs(labels, sides, place, namespace, row_keys)
        elif not further:
            raise ValueError(f"{place} has no input_ids, only {sorted(named)}: name the encoder's ids so")
        return self._read_whole(named, further, labels, decoder_mask, place, namespace, row_keys)

    def _decoder(
        self, named: Mapping[str, Any], labels: Integers, place: Place
    ) -> tuple[Integers | None, NDArray[np.bool_]]:
        mask = mask_of(named.get("decoder_attention_mask"), labels.shape, place, "decoder_attention_mask")
        if "decoder_input_ids" not in named:
            return None, mask
        ids = integers(named["decoder_input_ids"], "decoder_input_ids", place)
        same_shape(ids, "decoder_input_ids", labels.shape, place)
        check_ids(ids, mask, self._language.num_ids, "decoder_input_ids", place)
        return ids, mask

    def _read_pairs(
        self,
        labels: Integers,
        sides: tuple[tuple[Integers, NDArray[np.bool_]], tuple[Integers | None, NDArray[np.bool_]]],
        place: Place,
        namespace: Namespace,
        row_keys: Sequence[object] | None,
    ) -> Reading:
        """Each row as a sample of its own, without padding on either side."""
        (ids, mask), (decoder_ids, decoder_mask) = sides
        samples: list[Sample] = []
        where: list[Integers] = []
        for row in range(len(labels)):
            columns = np.flatnonzero(decoder_mask[row])
            predicted = labelled(labels[row, columns])
            if len(predicted):
                # Without its inputs given, the decoder would read padding for the -100 before the first label.
                columns = columns[(0 if decoder_ids is not None else predicted[0]) : predicted[-1] + 1]
            else:
                columns = columns[:0]
            pair = _Pair(
                ids[row, mask[row]],
                labels[row, columns],
                None if decoder_ids is None else decoder_ids[row, columns],
            )
            if len(predicted) and not len(pair.ids):
                raise ValueError(f"{place.row(row)} has labels and no token to read: attention_mask is 0 all along")
            self._language.check_length(max(len(pair.ids), len(columns)), row, place)
            if row_keys is None:
                parts = (
                    (pair.ids, pair.targets) if pair.decoder_ids is None else (pair.ids, pair.targets, pair.decoder_ids)
                )
                key = content_key(namespace, f"{len(pair.ids)} {len(parts)} ".encode(), *parts)
            else:
                key = row_key(namespace, row_keys[row], count=len(predicted), labels=pair.targets)
            length = len(pair.ids) + len(columns)
            samples.append(Sample(key, length, length, len(predicted), pair, group=decoder_ids is None))
            where.append(row * labels.shape[1] + columns[labels[row, columns] != IGNORED])
        return Reading(samples, (labels.shape[0], labels.shape[1]), None, where)

    def _read_whole(
        self,
        named: Mapping[str, Any],
        further: set[str],
        labels: Integers,
        decoder_mask: NDArray[np.bool_],
        place: Place,
        namespace: Namespace,
        row_keys: Sequence[object] | None,
    ) -> Reading:
        """All rows as they are, with all inputs."""
        inputs = {name: named[name] for name in further | (set(_READ) & set(named)) if name in self._reference.accepted}
        if "decoder_input_ids" not in inputs:
            inputs["labels"] = labels  # the model makes its decoder's inputs of them
        sources = []
        for row in range(len(labels)):
            columns = np.flatnonzero(decoder_mask[row] & (labels[row] != IGNORED))
            sources.append((columns, columns))
        return read_whole(
            inputs,
            labels,
            sources,
            place,
            namespace=namespace,
            row_keys=row_keys,
            lengths=[labels.shape[1]] * len(labels),
        )

    # Running

    def _run(self, samples: list[Sample]) -> Tensor:
        if isinstance(samples[0].content, Whole):
            return run_whole(self._reference, samples[0].content, self._head)
        return self._losses([sample.content for sample in samples], self._head)

    def _losses(self, pairs: list[_Pair], head: Head | None) -> Tensor:
        """[n] fp32 losses of all labels of the pairs, one after the other, on the reference's device."""
        pad = self._language.pad_id or 0
        ids = right_padded([pair.ids for pair in pairs], pad)
        targets = right_padded([pair.targets for pair in pairs], IGNORED)
        lengths = np.array([len(pair.ids) for pair in pairs])
        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
        rows = np.flatnonzero(targets != IGNORED)
        given = [pair.decoder_ids for pair in pairs if pair.decoder_ids is not None]
        read = right_padded(given, pad) if given else targets
        sent = self._runtime.lane.send(ids, mask, read, rows, targets.reshape(-1)[rows])
        with self._reference.frozen() as model:
            inputs = {"input_ids": sent[0], "attention_mask": sent[1], **without_cache(self._reference)}
            if given:
                inputs["decoder_input_ids"] = sent[2]
            elif (prepare := getattr(model, "prepare_decoder_input_ids_from_labels", None)) is not None:
                inputs["decoder_input_ids"] = cast("Callable[..., Tensor]", prepare)(labels=sent[2])
            else:
                inputs["labels"], head = sent[2], None  # its own loss wants all logits
            if head is None:
                logits = logits_of(model(**inputs))
                check_logits(logits, targets.shape)
                return losses_of_logits(logits, sent[3], sent[4])
            with head_inputs(head.linear) as kept:
                model(**inputs)
            (hidden,) = kept
            return head.losses(hidden.flatten(0, 1).index_select(0, sent[3]), sent[4])

    def _tried_head(self, max_bytes: int) -> Head | None:
        """The head that bounds memory, if on a few tokens it gives what the model's own logits give."""
        head, vocabulary = Head.of(self._reference.model, max_bytes), self._language.num_labels
        if head is None or vocabulary is None or vocabulary < 4:
            return None
        generator = np.random.Generator(np.random.Philox(key=0))
        ids, targets = generator.integers(vocabulary // 4, vocabulary // 2 + 1, (2, 6))
        pairs = [_Pair(ids, targets, None)]
        try:
            with self._runtime.lane.entered():
                off = (self._losses(pairs, head) - self._losses(pairs, None)).abs().max().item()
        except InUse:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                with enough_to_try():
                    raise
            failure: object = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            if off <= (1e-4 if self._reference.dtype == torch.float32 else 0.2):
                return head
            failure = f"a trial is off by {off:.2g} nats"
        _logger.warning(
            "%s is scored by its own logits, all of them at a time: %s", type(self._reference.model).__name__, failure
        )
        return None
