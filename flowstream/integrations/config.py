"""FlowConfig: what a trainer is told about FLOW, and the stream that it makes of its loader."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from flowstream.policies import Flow, Policy
from flowstream.recollate import Recollate
from flowstream.rehearsal import Rehearsal
from flowstream.scoring.base import Level, Scorer
from flowstream.scoring.reference import TrainedAdapters
from flowstream.settings import Include, Mode, Sampler, Uneven
from flowstream.stream import FlowStream
from flowstream.temperature import RunningMedian, Temperature


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """How a trainer weights or resamples its training data. Evaluation is left alone.

    What is not described here is as in `FlowStream`.
    """

    reference: str | os.PathLike[str] = "initial"
    """Which frozen model scores: "initial", the model as it is when the trainer is made (a copy; under PEFT its base,
    shared, whose adapters still do nothing then); "base", the base of a PEFT model, shared, adapters off while it
    scores; or a name or path for `from_pretrained`."""
    scorer: Scorer | None = None
    """A scorer of one's own, in the place of `reference`."""
    trained_adapters: TrainedAdapters = "refuse"
    """Whether the bare base may be the reference of a model whose adapters were already trained: "ignore" says so."""
    mode: Mode | Sampler = "weight"
    level: Level = "sample"
    temperature: Temperature = field(default_factory=RunningMedian)
    policy: Policy = field(default_factory=Flow)
    normalize: bool = False
    include: tuple[Include, ...] = ()
    """What else the batches carry, as far as the trainer's `training_step`; the model never sees it."""
    window: int | Literal["auto"] = "auto"
    max_window_bytes: int = 2**30
    recollate: Literal["pad"] | Recollate = "pad"
    cache: Literal["memory"] | str | os.PathLike[str] | None = "memory"
    cache_key: str | None = None
    seed: int = 0
    on_uneven: Uneven = "auto"
    process_group: ProcessGroup | DeviceMesh | None = None
    timeout: float = 1800.0
    max_bad_fraction: float = 0.05
    progress: bool = False
    rehearsal: Rehearsal | None = None
    """Prior data to rehearse; the trainer tells what each step's logits had right. An epoch then has no length: give
    `max_steps`."""
    check_weights: bool = True
    """Whether the first step proves that the loss changes with the weights (`fs.check_weights_used`)."""

    @property
    def is_weighted(self) -> bool:
        """Whether batches carry weights, rather than being drawn by them."""
        return self.mode == "weight"

    def stream(self, loader: Iterable[Any], scorer: Scorer, *, accumulate: int) -> FlowStream:
        """The stream over a trainer's loader; `accumulate` micro-batches share an optimizer step."""
        return FlowStream(
            loader,
            scorer,
            mode=self.mode,
            level=self.level,
            temperature=self.temperature,
            policy=self.policy,
            normalize=self.normalize,
            include=self.include,
            window=self.window,
            max_window_bytes=self.max_window_bytes,
            accumulate=accumulate,
            recollate=self.recollate,
            cache=self.cache,
            cache_key=self.cache_key,
            seed=self.seed,
            on_uneven=self.on_uneven,
            process_group=self.process_group,
            timeout=self.timeout,
            max_bad_fraction=self.max_bad_fraction,
            progress=self.progress,
            rehearsal=self.rehearsal,
        )
