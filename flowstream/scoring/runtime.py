"""What the scorers of models share: the reference, where it computes, and how the scoring of a window begins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowstream.scoring.base import Level
from flowstream.scoring.cache import LossCache, Namespace
from flowstream.scoring.device import Lane, on_host
from flowstream.scoring.job import Budget, Reading, Sample, WindowJob
from flowstream.scoring.reading import Place
from flowstream.scoring.reference import Copy, Reference, TrainedAdapters
from flowstream.window import Layout, Padded

_logger = logging.getLogger("flowstream")

Read = Callable[[Any, Place, Namespace, Sequence[object] | None], Reading]
"""A batch, where it stands, and the names of its rows for the cache → what is to be scored of it."""


class Runtime:
    """Owns the frozen reference of a scorer, its lane on the device, and its token budget."""

    def __init__(
        self,
        model: nn.Module,
        *,
        copy: Copy,
        token_budget: int | None,
        device: torch.device | str | None,
        trained_adapters: TrainedAdapters = "refuse",
    ) -> None:
        if token_budget is not None:
            check_budget("token_budget", token_budget)
        self.reference = Reference(model, copy=copy, device=device, trained_adapters=trained_adapters)
        self.lane = Lane(self.reference.device)
        self.budget = Budget.of(token_budget, self.reference.device)
        self.fingerprint = ""
        self._told_repeats = False
        self._label = ""

    def identify(self, scorer: object, *parts: object) -> None:
        """Settle the fingerprint, once the reference was tried.

        `parts`: all that changes a score beside the reference and the scorer's class.
        """
        self.reference.settle()
        self.fingerprint = self.reference.fingerprint(type(scorer).__name__, *parts)
        dtype = str(self.reference.dtype).removeprefix("torch.")
        self._label = f"{type(scorer).__name__} {type(self.reference.model).__name__} {dtype}"

    @torch.inference_mode(False)
    def begin(
        self,
        batches: Sequence[Any],
        read: Read,
        run: Callable[[list[Sample]], Tensor],
        *,
        level: Level,
        cache: LossCache | None,
        row_keys: Sequence[Sequence[object]] | None,
        needs_loss: bool,
        layout: Layout | None = None,
    ) -> WindowJob:
        """Read and plan a window. See `Scorer.begin`."""
        self.lane.move(self.reference.device)
        namespace = Namespace(self.fingerprint, level, self._label)
        if cache is not None:
            cache.register(namespace)
        if row_keys is not None and cache is not None:
            self._look_for_repeats(row_keys)
        keys = row_keys if row_keys is not None and cache is not None else [None] * len(batches)
        readings = [
            read(batch, Place(number), namespace, keys_of_rows)
            for number, (batch, keys_of_rows) in enumerate(zip(on_host(batches), keys, strict=True))
        ]
        return WindowJob(
            readings,
            run,
            level=level,
            budget=self.budget,
            lane=self.lane,
            layout=layout or Padded(),
            on_last=lambda: self.reference.watch(self.lane),
            cache=cache,
            needs_loss=needs_loss,
        )

    def _look_for_repeats(self, row_keys: Sequence[Sequence[object]]) -> None:
        names = [str(name) for of_batch in row_keys for name in of_batch]
        num_names = len(set(names))
        if num_names < len(names) and not self._told_repeats:
            self._told_repeats = True
            _logger.warning(
                "cache_key gives %d samples of a window %d names: samples of one name (and label) share one loss. "
                "Where they are different ones (keys that begin anew in each shard), give names that are unique over "
                "all shards, such as __url__ + __key__ (told once)",
                len(names),
                num_names,
            )


def check_budget(name: str, value: object) -> None:
    """`ValueError` unless `value` is a whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}: give a whole number of at least 1")


def loaded(auto: Any, name_or_path: str, device: torch.device | str | None, **kwargs: Any) -> nn.Module:
    """A frozen model from one of transformers' auto classes, in eval mode."""
    model = auto.from_pretrained(name_or_path, **kwargs).requires_grad_(False).eval()
    return model if device is None else model.to(device)  # type: ignore[no-any-return]
