"""What a Hugging Face language model can read, and batches that it must read as they are."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from flowstream.batch import is_array
from flowstream.scoring.adapters import bare_modules, embeddings_of
from flowstream.scoring.cache import Namespace, content_key, row_key
from flowstream.scoring.capture import head_inputs
from flowstream.scoring.head import Head, logits_of, losses_of_logits
from flowstream.scoring.job import Reading, Sample
from flowstream.scoring.reading import IGNORED, REMEDY, Integers, Place, as_tensor, content, to_device
from flowstream.scoring.reference import Reference

_POSITION_TABLES = frozenset({"wpe", "embed_positions", "position_embeddings"})

_NO_INPUTS = frozenset(
    {"return_dict", "use_cache", "output_attentions", "output_hidden_states", "logits_to_keep", "num_logits_to_keep"}
    | {"output_router_logits", "cache_position", "past_key_values", "cache_params", "num_items_in_batch"}
    # What flash attention wants to know of packed rows: position_ids say the same.
    | {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
)
"""Arguments of a forward that add nothing to what is predicted, or that scoring sets itself."""


@dataclass(frozen=True)
class Language:
    """What a language model accepts. `None` where nothing tells."""

    num_ids: int | None
    """Rows of the input embedding."""

    num_labels: int | None
    """Rows of the head."""

    max_positions: int | None
    """Where a table of learned positions ends; rotary and relative positions have no end."""

    pad_id: int | None
    """The configuration's padding id, where it lies in the vocabulary."""

    bos_id: int | None

    rope_limits: dict[str, int]
    """Lengths beyond which rotary frequencies are others, by the kind of rotary positions."""

    @classmethod
    def of(cls, reference: Reference) -> Language:
        model, config = reference.model, reference.config
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        named = getattr(config, "vocab_size", None)
        num_ids = _num_rows(model, "get_input_embeddings") or named
        pad = getattr(config, "pad_token_id", None)
        bos = getattr(config, "bos_token_id", None)
        return cls(
            num_ids=num_ids,
            num_labels=_num_rows(model, "get_output_embeddings") or named,
            max_positions=getattr(config, "max_position_embeddings", None) if _has_table(model) else None,
            pad_id=pad if isinstance(pad, int) and 0 <= pad < (num_ids or pad + 1) else None,
            bos_id=bos if isinstance(bos, int) else None,
            rope_limits=_rope_limits(getattr(config, "rope_parameters", None), config),
        )

    def check_length(self, length: int, row: int, place: Place) -> None:
        """`ValueError` for a sample that is longer than the table of positions."""
        if self.max_positions is not None and length > self.max_positions:
            raise ValueError(
                f"{place.row(row)} has {length} tokens, and the reference positions for {self.max_positions}: truncate "
                "the samples"
            )

    def rope_group(self, length: int) -> Hashable:
        """Only samples of one group may share a micro-batch, where rotary frequencies follow the longest in sight."""
        group = []
        for kind, limit in self.rope_limits.items():
            # "dynamic" ones are another for each length beyond the limit.
            group.append(length if kind == "dynamic" and length > limit else length > limit)
        return tuple(group)


def further_inputs(named: Mapping[str, Any], read: Iterable[str], reference: Reference, place: Place) -> set[str]:
    """Names of the fields that the model's forward takes beside those that are `read`; other fields are ignored."""
    further = {name for name in named if name in reference.accepted} - set(read) - _NO_INPUTS - {"labels"}
    for name in sorted(further):
        if isinstance(named[name], bool | int | float | str):
            further.remove(name)
        elif not is_array(named[name]):
            raise ValueError(
                f"{name} of {place} is a {type(named[name]).__name__}, and an input of the reference: scoring takes "
                f"tensors and arrays. Stack it, drop it from the batch, or {REMEDY}"
            )
    return further


# A batch with further inputs (images, token types, embeddings) is not taken apart: nothing tells what in them belongs
# to which row or position.


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """A batch with all its inputs, and which logits are scored: those of its samples, one after the other."""

    inputs: dict[str, Tensor]
    shape: tuple[int, int]
    """[B, T] of the logits."""
    rows: Integers
    """[n] indices into the flattened logits."""
    targets: Integers
    """[n]"""


def read_whole(
    inputs: Mapping[str, Any],
    labels: Integers,
    sources: Sequence[tuple[Integers, Integers]],
    place: Place,
    *,
    namespace: Namespace,
    row_keys: Sequence[object] | None,
    lengths: Sequence[int],
) -> Reading:
    """A batch that is scored as it is. `sources[b]`: columns of the logits, and of the labels that they predict."""
    width = labels.shape[1]
    tensors = {name: as_tensor(value) for name, value in inputs.items()}
    rows = [row * width + columns for row, (columns, _) in enumerate(sources)]
    positions = [row * width + columns for row, (_, columns) in enumerate(sources)]
    flat = labels.reshape(-1)
    whole = Whole(
        tensors,
        (len(labels), width),
        np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64),
        np.concatenate([flat[where] for where in positions]) if rows else np.zeros(0, dtype=np.int64),
    )
    counts = [len(where) for where in positions]
    if row_keys is None:
        # Per row the whole batch: what is not laid out by rows may concern any of them.
        parts = [part for name, tensor in sorted(tensors.items()) for part in content(name, tensor)]
        bits = content_key(namespace, *parts, labels)
        keys = [content_key(namespace, bits, f"row {row}".encode()) for row in range(len(labels))]
    else:
        wanted = [flat[where] for where in positions]
        keys = [row_key(namespace, key, count=len(y), labels=y) for key, y in zip(row_keys, wanted, strict=True)]
    samples = [
        Sample(key, length, length, count, whole, group=("whole", place.batch), whole=True)
        for key, length, count in zip(keys, lengths, counts, strict=True)
    ]
    return Reading(samples, (len(labels), width), None, positions)


def run_whole(reference: Reference, whole: Whole, head: Head | None) -> Tensor:
    """[n] losses of a batch that is scored as it is, through `head` where there is one and the model makes no loss."""
    with reference.frozen() as model:
        device, dtype = reference.device, reference.dtype
        inputs = {name: to_device(value, device) for name, value in whole.inputs.items()}
        inputs = {name: v.to(dtype) if v.is_floating_point() else v for name, v in inputs.items()}
        rows, targets = to_device(whole.rows, device), to_device(whole.targets, device)
        if head is not None and "labels" not in inputs:
            with head_inputs(head.linear) as kept:
                model(**inputs, **without_cache(reference))
            (hidden,) = kept
            if tuple(hidden.shape[:-1]) == whole.shape:
                return head.losses(hidden.flatten(0, 1).index_select(0, rows), targets)
        logits = logits_of(model(**inputs, **without_cache(reference)))
        check_logits(logits, whole.shape)
        return losses_of_logits(logits, rows, targets)


def without_cache(reference: Reference) -> dict[str, Any]:
    """The arguments that turn the key-value cache off, where the model has one."""
    return {"use_cache": False} if "use_cache" in reference.accepted else {}


def check_logits(logits: Tensor, shape: tuple[int, int]) -> None:
    """`ValueError` unless there is one row of logits a token."""
    if tuple(logits.shape[:-1]) != shape:
        raise ValueError(
            f"the reference gave logits of shape {list(logits.shape)} for tokens of shape {list(shape)}: this scorer "
            f"needs one row of logits a token; for anything else {REMEDY}"
        )


def labelled(labels: Integers) -> Integers:
    """Where a sample's labels say something."""
    return np.flatnonzero(labels != IGNORED)


def _num_rows(model: nn.Module, getter: str) -> int | None:
    module = embeddings_of(model, getter)
    weight = getattr(module, "weight", None)
    rows = getattr(module, "num_embeddings", None) or getattr(module, "out_features", None)
    if rows is None and isinstance(weight, Tensor) and weight.ndim == 2:
        rows = weight.shape[0]
    return rows if isinstance(rows, int) else None


def _rope_limits(parameters: Any, config: Any) -> dict[str, int]:
    """Of a configuration with one kind of rotary positions, or one for each kind of layer."""
    if not isinstance(parameters, dict):
        return {}
    limits: dict[str, int] = {}
    for value in parameters.values():
        limits |= _rope_limits(value, config)
    kind, limit = parameters.get("rope_type"), getattr(config, "max_position_embeddings", None)
    if kind == "longrope":
        limit = parameters.get("original_max_position_embeddings") or limit
    return limits | {kind: limit} if kind in ("dynamic", "longrope") and limit else limits


def _has_table(model: nn.Module) -> bool:
    return any(
        isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES
        for name, module in bare_modules(model)
    )
