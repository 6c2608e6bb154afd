"""Losses of a classifier of images, texts, or any other rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowstream.batch import fields, is_array
from flowstream.scoring.base import Job, Level
from flowstream.scoring.cache import LossCache, Namespace, content_key, row_key
from flowstream.scoring.head import logits_of
from flowstream.scoring.job import Reading, Sample
from flowstream.scoring.language import Language, without_cache
from flowstream.scoring.reading import (
    IGNORED,
    REMEDY,
    Place,
    as_tensor,
    check_ids,
    content,
    integers,
    mask_of,
    to_device,
)
from flowstream.scoring.reference import Copy, TrainedAdapters
from flowstream.scoring.runtime import Runtime, loaded

_VERSION = 1
"""Raised when a change here moves losses: it is part of every cache key."""

_LABEL_KEYS = ("labels", "label", "targets", "target")

_PATCH = 3 * 16 * 16
"""Numbers that take as much of the token budget as one token: an RGB patch of 16 x 16."""

_POSITIONAL = "*"
"""Stands for a lone input, which is passed without a name."""


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    inputs: dict[str, Tensor]
    """Argument → this row of it; tokens without their padding."""
    target: Tensor
    """A class, a distribution [C], or a set of labels [C]."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a classifier's forward takes of a batch, on its device and in its dtype."""

    positional: tuple[Tensor, ...]
    named: dict[str, Tensor]

    def run(self, model: nn.Module, **options: Any) -> Any:
        """The model's output."""
        return model(*self.positional, **self.named, **options)


class ClassifierScorer:
    """Cross-entropy of any classifier, frozen. A `Scorer`, of samples only.

    The model: a Hugging Face `…ForSequenceClassification` or image classifier, or any `nn.Module` that returns logits
    [B, C] or an output with `.logits`. It is scored in eval mode, without label smoothing.

    Batches: `(x, y)`, `(mapping, y)`, or a mapping, namedtuple or dataclass with `labels`, `label`, `targets` or
    `target`. Fields named after arguments of the forward are passed; where none is, the only other array is. Labels are
    never passed. Text (`input_ids` with a forward that takes `attention_mask`) is scored without its padding.

    Labels: classes [B] (-100: no label), or distributions [B, C] (soft targets, rows that sum to 1). With
    `config.problem_type == "multi_label_classification"`, [B, C] of 0 to 1: binary cross-entropy, mean over labels.
    Regression is refused: `FunctionScorer` takes any loss.

    `copy` and `trained_adapters` are those of `CausalLMScorer`; of `token_budget`, an image takes a token for each
    16 x 16 patch.
    """

    levels: frozenset[Level] = frozenset({"sample"})

    def __init__(
        self,
        model: nn.Module,
        *,
        copy: Copy = "auto",
        token_budget: int | None = None,
        device: torch.device | str | None = None,
        trained_adapters: TrainedAdapters = "refuse",
    ) -> None:
        self._runtime = Runtime(
            model, copy=copy, token_budget=token_budget, device=device, trained_adapters=trained_adapters
        )
        self._reference = self._runtime.reference
        config = self._reference.config
        kind = getattr(config, "problem_type", None)
        if kind == "regression":
            raise ValueError(f"{type(model).__name__} is a regression (config.problem_type): {REMEDY}")
        if getattr(config, "num_labels", None) == 1:
            raise ValueError(f"{type(model).__name__} has a single output (config.num_labels), a regression: {REMEDY}")
        self._lone = "input_ids" if self._reference.first == "input_ids" else _POSITIONAL
        self._multi_label = kind == "multi_label_classification"
        self._num_classes = getattr(config, "num_labels", None)
        self._language = Language.of(self._reference)
        # Classifiers on a causal model read the last token that is not padding, and refuse to guess which that is.
        self._pads = config is None or self._language.pad_id is not None
        self._runtime.identify(self, _VERSION, kind)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        token_budget: int | None = None,
        device: torch.device | str | None = None,
        trained_adapters: TrainedAdapters = "refuse",
        images: bool = False,
        **kwargs: Any,
    ) -> ClassifierScorer:
        """A scorer with a model of its own: `AutoModelForSequenceClassification`, or of images, with `kwargs`."""
        from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

        auto: Any = AutoModelForImageClassification if images else AutoModelForSequenceClassification
        model = loaded(auto, name_or_path, device, **kwargs)
        return cls(model, copy=False, token_budget=token_budget, trained_adapters=trained_adapters)

    def begin(
        self,
        batches: Sequence[Any],
        *,
        level: Level,
        cache: LossCache | None = None,
        row_keys: Sequence[Sequence[object]] | None = None,
        needs_loss: bool = True,
    ) -> Job:
        if level != "sample":
            raise ValueError("a classifier has one loss a sample: for level='token' use a language-model scorer")
        # Without a cache no key is needed: hashing images costs.
        read = self._read if cache is not None else self._read_without_key
        return self._runtime.begin(
            batches, read, self._run, level=level, cache=cache, row_keys=row_keys, needs_loss=needs_loss
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

    def read(self, batch: Any, number: int) -> tuple[Inputs, Tensor]:
        """Of the loader's batch of this number: what the forward takes, and the targets, on the CPU.

        `ValueError` for what is no batch of a classifier.
        """
        place = Place(number)
        inputs, labels = self._split(batch, place)
        return self._inputs(inputs), self._targets(labels, place)[0]

    def _read(
        self, batch: Any, place: Place, namespace: Namespace | None, row_keys: Sequence[object] | None
    ) -> Reading:
        inputs, labels = self._split(batch, place)
        targets, labelled = self._targets(labels, place)
        for name, value in inputs.items():
            if len(value) != len(targets):
                shown = "x" if name == _POSITIONAL else name
                raise ValueError(
                    f"{shown} of {place} has shape {list(value.shape)} beside {len(targets)} labels: a classifier's "
                    f"inputs have one row a label; for anything else {REMEDY}"
                )
        if row_keys is not None and len(row_keys) != len(targets):
            raise ValueError(f"{place} has {len(row_keys)} cache keys for {len(targets)} rows")
        rows = self._rows(inputs, len(targets), place)
        samples: list[Sample] = []
        for row, values in enumerate(rows):
            target = targets[row]
            if namespace is None:  # nothing is cached: no need to read every pixel
                key = f"{place.batch} {row}".encode()
            elif row_keys is None:
                parts = [part for name, value in values.items() for part in content(name, value)]
                key = content_key(namespace, *parts, *content("", target))
            else:
                # Soft targets may be mixed, as augmentation does.
                classes = None if target.is_floating_point() else target.numpy()
                key = row_key(namespace, row_keys[row], labels=classes)
            num_tokens = len(values["input_ids"]) if "input_ids" in values else 1
            length = num_tokens if "input_ids" in values else -(-sum(v.numel() for v in values.values()) // _PATCH)
            count = int(labelled[row])
            samples.append(Sample(key, length, num_tokens, count, _Row(values, target), self._group(values, target)))
        return Reading(samples)

    def _read_without_key(
        self, batch: Any, place: Place, namespace: Namespace, row_keys: Sequence[object] | None
    ) -> Reading:
        return self._read(batch, place, None, row_keys)

    def _split(self, batch: Any, place: Place) -> tuple[dict[str, Tensor], Any]:
        """The inputs of the forward by argument, and the labels."""
        found = fields(batch)
        labels: Any = None
        if 0 in found:
            if len(found) != 2:
                raise ValueError(
                    f"{place} is a {type(batch).__name__} of {len(found)}: a classifier takes (x, labels). Let the "
                    f"loader deliver a mapping with named keys, or {REMEDY}"
                )
            labels, x = found[1], found[0]
            found = dict(x) if isinstance(x, Mapping) else {self._lone: x}
            named = isinstance(x, Mapping)
        else:
            named = True
            key = next((key for key in _LABEL_KEYS if found.get(key) is not None), None)
            if key is None:
                raise ValueError(f"{place} has no labels ({', '.join(_LABEL_KEYS)}), only {sorted(map(str, found))}")
            labels = found.pop(key)
        arrays = {str(key): as_tensor(value) for key, value in found.items() if is_array(value)}
        if not named:
            if not arrays:
                raise ValueError(f"the inputs of {place} are a {type(x).__name__}: stack them to a tensor or an array")
            return arrays, labels
        arrays = {key: value for key, value in arrays.items() if key not in _LABEL_KEYS}
        known = {key: value for key, value in arrays.items() if key in self._reference.accepted}
        if not known and len(arrays) == 1:
            known = {self._lone: next(iter(arrays.values()))}
        if not known:
            raise ValueError(
                f"{place} has the fields {sorted(arrays)}, and the forward of the reference takes "
                f"{sorted(self._reference.accepted)}: name them alike, or deliver (x, labels)"
            )
        return known, labels

    def _targets(self, labels: Any, place: Place) -> tuple[Tensor, Tensor]:
        """The targets on the CPU, classes [B] or floats [B, C], and [B] which rows have one."""
        if not is_array(labels):
            raise ValueError(
                f"labels of {place} are a {type(labels).__name__}: a classifier needs a tensor or an array"
            )
        if labels.ndim == 1 and not _is_floating(labels) and not self._multi_label:
            classes = integers(labels, "labels", place, ndim=1)
            self._check_classes(classes, self._num_classes, place)
            targets = torch.from_numpy(classes)
            return targets, targets != IGNORED
        if labels.ndim != 2 or not _is_floating(labels):
            raise ValueError(
                f"labels of {place} have shape {list(labels.shape)} and {labels.dtype}: a classifier takes classes [B] "
                f"of integers, or [B, C] of floats; for a regression {REMEDY}"
            )
        targets = as_tensor(labels).float().cpu()
        if self._num_classes is not None and targets.shape[1] != self._num_classes:
            raise ValueError(
                f"labels of {place} have shape {list(labels.shape)}, and the reference {self._num_classes} classes"
            )
        wrong = ~((targets >= 0) & (targets <= 1.01)).all(1)
        if not self._multi_label:
            wrong |= ~((targets.sum(1) - 1).abs() < 0.02)
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"labels of {place.row(row)} lie between {targets[row].min():.4g} and {targets[row].max():.4g} and sum "
                f"to {targets[row].sum():.4g}: soft targets are distributions over the classes. For several labels a "
                'sample set config.problem_type = "multi_label_classification" (0 to 1 each); otherwise ' + REMEDY
            )
        return targets, torch.ones(len(targets), dtype=torch.bool)

    def _check_classes(self, classes: np.ndarray[Any, Any], num_classes: int | None, place: Place | None) -> None:
        wrong = (classes != IGNORED) & ((classes < 0) | (classes >= (num_classes or np.iinfo(np.int64).max)))
        if wrong.any():
            row = int(wrong.nonzero()[0][0])
            where = place.row(row) if place else "a sample of the window"
            raise ValueError(
                f"the label of {where} is {classes[row]}, and the reference has {num_classes or 'no negative'} "
                "classes: labels count from 0, and -100 means none"
            )

    def _rows(self, inputs: dict[str, Tensor], num_rows: int, place: Place) -> list[dict[str, Tensor]]:
        """Each row's inputs; of text, the tokens that the mask keeps."""
        if "input_ids" not in inputs:
            return [{name: value[row] for name, value in inputs.items()} for row in range(num_rows)]
        ids = integers(inputs["input_ids"], "input_ids", place)
        mask = mask_of(inputs.get("attention_mask"), ids.shape, place)
        check_ids(ids, mask, self._language.num_ids, "input_ids", place)
        if "attention_mask" not in self._reference.accepted:
            return [{name: value[row] for name, value in inputs.items()} for row in range(num_rows)]
        # Positions count from the first token; the model numbers them so itself once there is no padding before it.
        inputs = {name: value.cpu() for name, value in inputs.items() if name not in ("attention_mask", "position_ids")}
        by_token = {name for name, value in inputs.items() if value.shape[:2] == ids.shape}
        rows = []
        for row in range(num_rows):
            columns = torch.from_numpy(np.flatnonzero(mask[row]))
            if not len(columns):
                raise ValueError(f"{place.row(row)} has no token: its attention_mask is 0 all along")
            self._language.check_length(len(columns), row, place)
            rows.append({name: v[row][columns] if name in by_token else v[row] for name, v in inputs.items()})
        return rows

    def _group(self, values: dict[str, Tensor], target: Tensor) -> tuple[object, ...]:
        """What can be stacked: the same inputs, shapes and kind of target; texts of any length where they can pad."""
        ragged = "input_ids" in values and self._pads and "attention_mask" in self._reference.accepted
        length = len(values["input_ids"]) if "input_ids" in values else -1
        shapes = tuple(
            (name, value.dtype, tuple(value.shape[1:]) if ragged and _by_token(value, length) else tuple(value.shape))
            for name, value in values.items()
        )
        alone = id(values) if "input_ids" in values and not self._pads else None
        return ("rows", shapes, target.dtype, tuple(target.shape), alone)

    # Running

    def _run(self, samples: list[Sample]) -> Tensor:
        rows: list[_Row] = [sample.content for sample in samples]
        with self._reference.frozen() as model:
            inputs = self._inputs(self._stack([row.inputs for row in rows]))
            targets = torch.stack([row.target for row in rows])
            logits = logits_of(inputs.run(model, **without_cache(self._reference)))
            self._check_logits(logits, targets)
            logits, wanted = logits.float(), to_device(targets, self._reference.device)
            if self._multi_label:
                return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
            return F.cross_entropy(logits, wanted, reduction="none")

    def _inputs(self, values: dict[str, Tensor]) -> Inputs:
        device, dtype = self._reference.device, self._reference.dtype
        moved = {name: to_device(value, device) for name, value in values.items()}
        moved = {name: value.to(dtype) if value.is_floating_point() else value for name, value in moved.items()}
        positional = (moved.pop(_POSITIONAL),) if _POSITIONAL in moved else ()
        return Inputs(positional, moved)

    def _stack(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Rows as a batch, texts padded on the right and masked."""
        if "input_ids" not in rows[0] or "attention_mask" not in self._reference.accepted:
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        lengths = np.array([len(row["input_ids"]) for row in rows])
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        stacked = {"attention_mask": torch.from_numpy(mask)}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if len(set(map(_shape, values))) == 1:
                stacked[name] = torch.stack(values)
            else:
                fill = self._language.pad_id or 0 if name == "input_ids" else 0
                stacked[name] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
        return stacked

    def _check_logits(self, logits: Tensor, targets: Tensor) -> None:
        shape = (len(targets), logits.shape[-1] if targets.ndim == 1 else targets.shape[1])
        if tuple(logits.shape) != shape:
            raise ValueError(
                f"the reference gave logits of shape {list(logits.shape)} for {len(targets)} samples with targets of "
                f"shape {list(targets.shape[1:])}: a classifier gives [B, C]; for anything else {REMEDY}"
            )
        if targets.ndim == 1:
            if shape[1] == 1:
                raise ValueError(f"the reference has a single output, a regression or a binary one: {REMEDY}")
            self._check_classes(targets.numpy(), shape[1], None)


def _is_floating(value: Any) -> bool:
    return value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind == "f"


def _by_token(value: Tensor, length: int) -> bool:
    return value.ndim > 0 and len(value) == length


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)
