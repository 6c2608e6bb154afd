"""Losses of a causal language model: of samples alone, whatever batch, padding or pack they came in."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowstream.batch import is_array
from flowstream.scoring.base import Job, Level
from flowstream.scoring.cache import LossCache, Namespace, content_key, row_key
from flowstream.scoring.estimate import Estimate, estimate
from flowstream.scoring.forward import Forward
from flowstream.scoring.job import Reading, Sample
from flowstream.scoring.language import Language, Whole, further_inputs, labelled, read_whole, run_whole
from flowstream.scoring.reading import (
    IGNORED,
    Integers,
    Place,
    check_ids,
    check_labels,
    integers,
    mask_of,
    named_fields,
    same_shape,
)
from flowstream.scoring.reference import Copy, TrainedAdapters
from flowstream.scoring.runtime import Runtime, check_budget, loaded
from flowstream.scoring.trial import Document

_VERSION = 2
"""Raised when a change here moves losses: it is part of every cache key."""

_logger = logging.getLogger("flowstream")


class CausalLMScorer:
    """Losses of any Hugging Face causal language model, frozen. A `Scorer`.

    A sample's loss is the mean over its labelled tokens, in nats, as if it were alone and unpadded: it does not depend
    on left or right padding, on packing, or on its neighbours. Labels are predicted from the token before (shifted
    here, not by the loader), so the first token of a sample has no loss; -100 is ignored; without labels, all tokens
    count. Tokens where `attention_mask` is 0 are no part of the sample.

    Batches: mappings, dataclasses or namedtuples with `input_ids` [B, T] and optionally `attention_mask`, `labels`,
    `position_ids`; tuples `(input_ids,)`, `(input_ids, labels)`, `(mapping, labels)`. Rows whose `position_ids` restart
    are packed: each document is a sample (`Scores.segment`), and a lone unlabelled token is none. A batch with further
    inputs of the model (images, `token_type_ids`) is scored as it is, with all of them. Other fields are ignored.

    `copy="auto"` copies the model if a parameter requires a gradient, `False` shares it as it is (its modes are put
    back after each step; training it raises at the next window), `True` always copies. `token_budget`: tokens a
    micro-batch, padding included (2048 on a CPU, else 16384); halved for good when memory runs out.

    A PEFT model is shared, never copied: its base is the reference, scored with the adapters off while they train.
    Adapters that were already trained are refused, unless `trained_adapters="ignore"` says that the base is meant.

    >>> scorer = CausalLMScorer.from_pretrained("meta-llama/Llama-3.2-1B", dtype="bfloat16")  # doctest: +SKIP
    """

    levels: frozenset[Level] = frozenset({"sample", "token"})

    def __init__(
        self,
        model: nn.Module,
        *,
        copy: Copy = "auto",
        token_budget: int | None = None,
        max_head_bytes: int = 2**28,
        compile: bool = False,
        device: torch.device | str | None = None,
        trained_adapters: TrainedAdapters = "refuse",
    ) -> None:
        check_budget("max_head_bytes", max_head_bytes)
        self._runtime = Runtime(
            model, copy=copy, token_budget=token_budget, device=device, trained_adapters=trained_adapters
        )
        self._reference = self._runtime.reference
        if "input_ids" not in self._reference.accepted:
            raise ValueError(f"{type(model).__name__}.forward takes no input_ids: it is no causal language model")
        if "decoder_input_ids" in self._reference.accepted:
            raise ValueError(f"{type(model).__name__} is an encoder-decoder model: use Seq2SeqLMScorer")
        self._language = Language.of(self._reference)
        self._forward = Forward(
            self._reference, self._language, self._runtime.lane, max_head_bytes=max_head_bytes, compile=compile
        )
        self._runtime.identify(self, _VERSION, self._forward.described)
        self._told_padding = False
        _logger.info("scoring with %s: %s", type(model).__name__, self.estimate())

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        token_budget: int | None = None,
        max_head_bytes: int = 2**28,
        compile: bool = False,
        device: torch.device | str | None = None,
        trained_adapters: TrainedAdapters = "refuse",
        **kwargs: Any,
    ) -> CausalLMScorer:
        """A scorer with a model of its own. `kwargs` go to `AutoModelForCausalLM.from_pretrained`: `dtype`,
        `quantization_config`, `revision` …"""
        from transformers import AutoModelForCausalLM

        model = loaded(AutoModelForCausalLM, name_or_path, device, **kwargs)
        return cls(
            model,
            copy=False,
            token_budget=token_budget,
            max_head_bytes=max_head_bytes,
            compile=compile,
            trained_adapters=trained_adapters,
        )

    def estimate(self) -> Estimate:
        """The memory and the operations that scoring takes, at the present token budget. Told in the log at the start.

        Logged by the logger "flowstream" at level INFO, with the way that the reference is scored.
        """
        num_tokens = self._runtime.budget.tokens
        return estimate(self._reference, num_tokens, self._forward.head_bytes(num_tokens))

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
            batches,
            self._read,
            self._run,
            level=level,
            cache=cache,
            row_keys=row_keys,
            needs_loss=needs_loss,
            layout=self._forward.layout,
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
        further = further_inputs(named, ("input_ids", "attention_mask", "position_ids"), self._reference, place)
        if "input_ids" not in named and "inputs_embeds" not in further:
            raise ValueError(
                f"{place} has no input_ids, only {sorted(named)}: name the ids so, or write (input_ids, labels)"
            )
        ids = self._ids(named, place)
        mask = mask_of(named.get("attention_mask"), ids.shape, place)
        if "input_ids" in named:
            check_ids(ids, mask, self._language.num_ids, "input_ids", place)
            if "attention_mask" not in named:
                self._look_for_padding(ids)
        if "labels" in named:
            labels = integers(named["labels"], "labels", place)
            same_shape(labels, "labels", ids.shape, place)
            check_labels(labels, self._language.num_labels, place)
        elif "input_ids" in named:
            labels = ids
        else:
            raise ValueError(f"{place} has inputs_embeds and no labels: nothing says what is to be predicted")
        if row_keys is not None and len(row_keys) != len(ids):
            raise ValueError(f"{place} has {len(row_keys)} cache keys for {len(ids)} rows")
        if further:
            return self._read_whole(named, further, mask, labels, place, namespace, row_keys)
        positions = self._positions(named, ids, place)
        reading = self._read_documents(ids, labels, mask, positions, place, namespace, row_keys)
        if "labels" not in named:
            return reading
        return replace(reading, row_targets=torch.from_numpy((labels[:, 1:] != IGNORED).sum(axis=1)))

    def _ids(self, named: Mapping[str, Any], place: Place) -> Integers:
        if "input_ids" in named:
            return integers(named["input_ids"], "input_ids", place)
        return np.zeros(tuple(named["inputs_embeds"].shape[:2]), dtype=np.int64)

    def _positions(self, named: Mapping[str, Any], ids: Integers, place: Place) -> Integers | None:
        if "position_ids" not in named:
            if any(name in named for name in ("cu_seq_lens_q", "seq_idx")):
                raise ValueError(
                    f"{place} is packed (it has cu_seq_lens_q or seq_idx) but has no position_ids: let the collator "
                    "return position_ids, which restart at each document"
                )
            return None
        positions = integers(named["position_ids"], "position_ids", place)
        if positions.shape == (1, ids.shape[1]):
            positions = np.broadcast_to(positions, ids.shape)
        same_shape(positions, "position_ids", ids.shape, place)
        return positions

    def _read_documents(
        self,
        ids: Integers,
        labels: Integers,
        mask: NDArray[np.bool_],
        positions: Integers | None,
        place: Place,
        namespace: Namespace,
        row_keys: Sequence[object] | None,
    ) -> Reading:
        """Each row, or each document of a packed row, as a sample of its own."""
        layout = _layout(mask, positions)
        # Without what is between documents, each is a slice.
        flat_ids, flat_labels = ids.reshape(-1)[layout.columns], labels.reshape(-1)[layout.columns]
        flat_labels[layout.starts[layout.starts < layout.stops]] = IGNORED  # nothing comes before a first token
        predicted = labelled(flat_labels)
        ends = np.searchsorted(predicted, layout.stops)
        begins = np.searchsorted(predicted, layout.starts)
        where = layout.columns[predicted]
        samples: list[Sample] = []
        flat_labels = np.append(flat_labels, IGNORED)  # what a last token would predict
        arrays = (layout.rows, layout.starts, layout.stops, begins, ends)
        for number, (row, start, stop, begin, end) in enumerate(zip(*(a.tolist() for a in arrays), strict=True)):
            # Causal: what comes after the last label changes nothing …
            last = int(predicted[end - 1]) if end > begin else start
            if end > begin and self._language.rope_group(stop - start) != self._language.rope_group(last - start):
                last = stop  # … but rotary frequencies that follow the length
            self._language.check_length(last - start, row, place)
            document = Document(flat_ids[start:last], flat_labels[start + 1 : last + 1])
            if row_keys is None:
                key = content_key(namespace, document.ids, document.targets)
            else:
                within = number - int(np.searchsorted(layout.rows, row))
                key = row_key(namespace, row_keys[row], within, end - begin, labels=document.targets)
            length = last - start
            samples.append(Sample(key, length, length, end - begin, document, self._language.rope_group(length)))
        return Reading(
            samples,
            (ids.shape[0], ids.shape[1]),
            torch.from_numpy(layout.segment(ids.shape)) if layout.packed else None,
            [where[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)],
        )

    def _read_whole(
        self,
        named: Mapping[str, Any],
        further: set[str],
        mask: NDArray[np.bool_],
        labels: Integers,
        place: Place,
        namespace: Namespace,
        row_keys: Sequence[object] | None,
    ) -> Reading:
        """All rows as they are, with all inputs."""
        inputs = {
            name: named[name] for name in further | ({"input_ids", "attention_mask", "position_ids"} & set(named))
        }
        inputs = {name: value for name, value in inputs.items() if name in self._reference.accepted}
        positions = inputs.get("position_ids")
        if is_array(positions) and positions.ndim == 2:
            given = self._positions(named, labels, place)
            if _layout(mask, given).packed:
                raise ValueError(
                    f"{place} is packed (its position_ids restart) and has further inputs "
                    f"({', '.join(sorted(further))}), which nothing assigns to its documents: pack text only, or drop "
                    "those keys"
                )
        elif positions is None and not mask[:, 0].all() and self._takes_plain_positions():
            # Most models number positions from the left edge, padding or not.
            inputs["position_ids"] = np.where(mask, np.cumsum(mask, axis=1) - 1, 0)
        sources: list[tuple[Integers, Integers]] = []
        for row in range(len(labels)):
            columns = np.flatnonzero(mask[row])
            predicted = labelled(labels[row, columns[1:]])
            sources.append((columns[:-1][predicted], columns[1:][predicted]))
        return read_whole(
            inputs,
            labels,
            sources,
            place,
            namespace=namespace,
            row_keys=row_keys,
            lengths=mask.sum(axis=1).tolist(),
        )

    def _takes_plain_positions(self) -> bool:
        """Multimodal rotary positions are three a token, and the model works them out from the mask itself."""
        config = self._reference.config
        return "position_ids" in self._reference.accepted and "mrope" not in str(config)

    def _look_for_padding(self, ids: Integers) -> None:
        pad = self._language.pad_id
        if self._told_padding or pad is None or pad == self._language.bos_id or ids.shape[1] < 2:
            return
        if (ids[:, :2] == pad).all(axis=1).any():
            self._told_padding = True
            _logger.warning(
                "a batch without attention_mask has rows that begin with the padding id %d: if that is left padding, "
                "it is read as text, and the losses are wrong. Let the loader deliver attention_mask (told once)",
                pad,
            )

    # Running

    def _run(self, samples: list[Sample]) -> Tensor:
        if isinstance(samples[0].content, Whole):
            return run_whole(self._reference, samples[0].content, self._forward.head)
        return self._forward.losses([sample.content for sample in samples])


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the documents of a batch are: document i is `columns[starts[i]:stops[i]]`, in row `rows[i]`."""

    columns: Integers
    """Indices into the flattened ids, ascending: the tokens of all documents."""
    starts: Integers
    stops: Integers
    rows: Integers
    packed: bool
    """Some row has several documents. If not, document i is row i, and may be empty."""

    def segment(self, shape: tuple[int, ...]) -> Integers:
        """[B, T]: the document of each token, -1 for none."""
        flat = np.full(math.prod(shape), -1, dtype=np.int64)
        flat[self.columns] = np.repeat(np.arange(len(self.rows)), self.stops - self.starts)
        return flat.reshape(shape)


def _layout(mask: NDArray[np.bool_], positions: Integers | None) -> _Layout:
    """The documents of a batch: rows, or several in a row where positions restart among the tokens of the mask.

    A lone token beside others is padding, which packing collators number 0: it predicts nothing and is no document.
    """
    num_rows, width = mask.shape
    columns = np.flatnonzero(mask)
    rows = columns // max(width, 1)
    if positions is not None and len(columns):
        numbers = positions.reshape(-1)[columns]
        # Positions that count on over a masked gap belong together; those that jump without one do not.
        restarts = (np.diff(numbers) <= 0) | ((np.diff(columns) == 1) & (np.diff(numbers) != 1))
        starts = np.flatnonzero(np.concatenate([[True], restarts | (np.diff(rows) != 0)]))
        lengths = np.diff(starts, append=len(columns))
        alone = np.bincount(rows[starts], minlength=num_rows)[rows[starts]] == 1
        kept = alone | (lengths > 1)
        columns, rows = columns[np.repeat(kept, lengths)], rows[starts[kept]]
        stops = np.cumsum(lengths[kept])
        starts = stops - lengths[kept]
        if (np.diff(rows) == 0).any():
            return _Layout(columns, starts, stops, rows, packed=True)
        rows = columns // width
    lengths = np.bincount(rows, minlength=num_rows)
    stops = np.cumsum(lengths)
    return _Layout(columns, stops - lengths, stops, np.arange(num_rows), packed=False)
