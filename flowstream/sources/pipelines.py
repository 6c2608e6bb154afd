"""What a webdataset pipeline is made of: its stages, told by name, so that webdataset need not be imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

NAME = "webdataset.pipeline.DataPipeline"

_OPENERS = ("StreamingOpen", "FileCache", "tarfile_samples", "url_opener")
"""Stages that take shards."""

_GROUPERS = ("group_by_keys", "tarfile_samples")
"""Stages that give samples."""

_ONE_BY_ONE = {"check_empty", "_map", "_select", "_decode", "_rename", "_map_dict", "_to_tuple", "_map_tuple", "_info"}
_ONE_BY_ONE |= {"_extract_keys", "_rename_keys", "_xdecode", "_log_keys", "_batched"}
"""Stages behind the samples that hold nothing back when a batch has come out."""


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A pipeline, with the pipelines that its first stages are in their turn."""

    parts: list[Any]
    """`DataPipeline`s, the outermost first."""
    loader: DataLoader[Any] | None
    """The `DataLoader` in a `WebLoader`."""

    @property
    def steps(self) -> Iterator[Any]:
        """All stages, in the order in which samples pass them."""
        for part in reversed(self.parts):
            yield from (step for step in part.pipeline if not _is_inner(step))


def flat(pipeline: Any) -> Pipeline:
    """`pipeline`, and what is inside it."""
    parts, loader = [pipeline], None
    while True:
        first = next(iter(parts[-1].pipeline), None)
        if isinstance(first, DataLoader):
            loader, first = first, first.dataset
        if not _is_pipeline(first):
            return Pipeline(parts, loader)
        parts.append(first)


@dataclass(frozen=True, eq=False)
class Span:
    """Places in a pipeline: each a list of stages, and a number there."""

    opener: tuple[list[Any], int]
    """Where shards are opened."""
    samples: tuple[list[Any], int]
    """Where samples have been read."""
    batched: tuple[list[Any], int] | None
    """Where samples are put into batches."""


def span_of_samples(pipeline: Pipeline) -> Span | None:
    """Where shards can be counted and left out.

    `None` where that is not exact: with worker processes, an epoch of several passes, or stages that hold back samples
    (shuffles), or that are not known.
    """
    has_workers = pipeline.loader is not None and pipeline.loader.num_workers > 0
    if has_workers or any(getattr(part, "repetitions", 0) != 1 for part in pipeline.parts):
        return None
    steps: list[Any] = pipeline.parts[-1].pipeline
    names = list(map(_name_of, steps))
    openers = [i for i, name in enumerate(names) if name in _OPENERS]
    groupers = [i for i, name in enumerate(names) if name in _GROUPERS]
    if len(openers) != 1 or len(groupers) != 1 or openers[0] == 0:
        return None
    behind = groupers[0] + 1
    if names[behind : behind + 1] == ["check_empty"]:
        behind += 1  # it would take an epoch whose samples have all been passed for an empty one
    rest = [
        (part.pipeline, i) for part in pipeline.parts for i, step in enumerate(part.pipeline) if not _is_inner(step)
    ]
    rest = [(stages, i) for stages, i in rest if stages is not steps or i >= behind]
    batched = [(stages, i) for stages, i in rest if _name_of(stages[i]) == "_batched"]
    if not {_name_of(stages[i]) for stages, i in rest} <= _ONE_BY_ONE or len(batched) > 1:
        return None
    if batched and not _looks_ahead(batched[0][0][batched[0][1]].f):
        return None
    return Span((steps, openers[0]), (steps, behind), batched[0] if batched else None)


def _looks_ahead(batched: Callable[..., Iterator[Any]]) -> bool:
    """Whether a batch comes out when the sample behind it has come in, as in webdataset 1.0."""
    samples = iter((0, 1, 2))
    next(iter(batched(samples, batchsize=1, collation_fn=None)))
    return next(samples) == 2


def counters_of(pipeline: Pipeline) -> list[dict[str, int]]:
    """Of each stage, in order: its epoch and seed, from which a deterministic shuffle's order follows."""
    return [
        {name: kept[name] for name in ("epoch", "seed") if type(kept.get(name)) is int}
        for kept in map(_attributes, pipeline.steps)
    ]


def set_counters(pipeline: Pipeline, counters: list[dict[str, int]]) -> None:
    """Put epochs and seeds back."""
    for step, values in zip(pipeline.steps, counters, strict=True):
        _attributes(step).update(values)


def caveat_of(pipeline: Pipeline) -> str:
    """What of a pipeline's order is drawn anew each time, and what to take in its place."""
    for step in pipeline.steps:
        name, arguments = _name_of(step), getattr(step, "kw", {})
        size = (*getattr(step, "args", ()), arguments.get("bufsize", 1000))[0]
        if name == "_shuffle" and size > 1 and arguments.get("seed") is None:
            return (
                "webdataset's shuffle(…) draws another order in every process, and resuming replays it: samples would "
                f"be repeated and left out. Take .compose(wds.detshuffle({size}, seed=…)) in its place, or give it a "
                "seed: shuffle(…, seed=…)"
            )
        if name == "_rsample":
            return (
                "webdataset's rsample(…) draws anew each time, and resuming replays it: samples would be repeated and "
                "left out. Select by the sample's key in its place: .select(lambda sample: …)"
            )
        if name == "ResampledShards" and not step.deterministic:
            return (
                "webdataset's resampled shards are drawn anew in every process, and resuming replays them: samples "
                "would be repeated and left out. Take wds.DataPipeline(wds.ResampledShards(urls, deterministic=True), "
                "wds.tarfile_to_samples(), …) in place of resampled=True"
            )
    return ""


def _is_pipeline(stage: Any) -> bool:
    return any(
        kind.__module__.startswith("webdataset.") and kind.__name__ == "DataPipeline" for kind in type(stage).__mro__
    )


def _is_inner(stage: Any) -> bool:
    return isinstance(stage, DataLoader) or _is_pipeline(stage)


def _name_of(stage: Any) -> str:
    """`_map` for `.map(…)`; a function's own name; the class of other stages."""
    function = getattr(stage, "f", stage)
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) else type(stage).__name__


def _attributes(stage: Any) -> dict[str, Any]:
    """Where a stage has its epoch and seed: among its keyword arguments, or its attributes."""
    arguments = getattr(stage, "kw", None)
    return arguments if isinstance(arguments, dict) else getattr(stage, "__dict__", {})
