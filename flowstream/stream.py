"""FlowStream: any loader's batches, weighted or resampled by the losses of a frozen reference, while they stream."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flowstream import state as states
from flowstream.distributed.meetings import Meetings
from flowstream.elastic_sampler import reshardable
from flowstream.epoch import Epoch
from flowstream.iterator import FlowIterator
from flowstream.loader import agreed_length, check_loader, epoch_listeners, length_of
from flowstream.policies import Flow, Policy
from flowstream.progress import Progress
from flowstream.read_ahead import ReadAhead
from flowstream.recollate import Recollate
from flowstream.rehearsal.rehearsing import Rehearsing
from flowstream.rehearsal.spec import Rehearsal
from flowstream.running import Running
from flowstream.scoring.base import Level, Scorer
from flowstream.scoring.caches import open_cache
from flowstream.settings import Attach, Include, Mode, Sampler, Settings, Uneven
from flowstream.sharding import world_of
from flowstream.sources import source_of
from flowstream.temperature import RunningMedian, Temperature

_logger = logging.getLogger("flowstream")


class FlowStream(IterableDataset[Any]):
    """Any loader's batches with FLOW's weights w = exp(-f(θ*)/τ), or drawn with these probabilities.

    f is each sample's loss under the frozen reference in `scorer`, in nats; τ the running median of those losses
    (Sanyal et al., ICML 2025, arXiv 2502.02797, eq. 4 and §3.2). Runs in the main process, a window of batches at a
    time: one window is delivered while the next is scored and the one after it pulled.

    >>> stream = FlowStream(loader, CausalLMScorer(model))  # doctest: +SKIP
    >>> for batch in stream:  # doctest: +SKIP
    ...     labels, weight = batch.pop("labels"), batch.pop("flow_weight")
    ...     loss = weighted_lm_loss(model(**batch).logits, labels, weight)

    Args:
        loader: any iterable of batches. A batch is a mapping, tuple, list, namedtuple or dataclass of tensors, arrays
            and lists.
        scorer: the frozen reference, such as `CausalLMScorer(model)`: a copy of the model as it is then, so build it
            before a fine-tuned checkpoint is loaded.
        mode: "weight"; "resample", which is `Thin()`; or a sampler, `Thin(scale=…)` or `Systematic(…)`.
        level: "sample": weights [B] float32 (packed rows: [B, T], each document its own weight). "token": weights of
            the labels' shape, aligned with them by index, 0 where ignored.
        temperature: τ: `RunningMedian()`, `WindowMedian()`, `BatchMedian()`, `FixedTemperature(value)` or
            `TargetESS(fraction)`.
        policy: (loss, τ) → weight: `Flow()`, `Uniform()`, `HardFirst(max_weight)`, `Threshold(max_loss)`,
            `Probability()`, `Permuted(policy)`, or any function of two tensors.
        normalize: divide by the running mean weight (of labelled tokens), so that the step keeps its scale.
        attach: "key": the batch gains `flow_weight`, as a key, an element, or a declared field. "pair":
            `for batch, weight in stream`, the batch untouched.
        include: any of "loss", "tau", "index", "denominator", "weight", each as `flow_…` beside the weight:
            `flow_loss` [B] (or of the weight's shape), `flow_tau` 0-d, `flow_index` [B] int64 (position in the rank's
            stream), `flow_denominator` 0-d. With "pair" they come as a third element, a dict.
        window: batches that are scored as a whole, or "auto": at least 256 samples, 8 batches and 2 · `accumulate`.
        max_window_bytes: what "auto" lets the three windows held take.
        accumulate: micro-batches a step, k. `flow_denominator` is then the number of labelled tokens (of a classifier
            labelled samples, of a function all) in the k batches that share a step on all ranks, divided by the number
            of ranks: dividing each loss by it, the mean over ranks gives the gradient of one large batch. An epoch's
            last step may have fewer batches.
        recollate: how rows of different batches meet in resample mode: "pad", or a collate function over samples.
        cache: "memory": losses are kept, up to 256 MB, and a second epoch scores nothing; a path on a local disk: a
            folder that keeps them for later runs and for other processes of the node; or `None`. An entry belongs to
            the reference, its dtype and the level, and to the sample's content.
        cache_key: a field of the batch with an entry a row that names the sample for the cache, in place of its content
            (augmented images: "__key__"). Names must then be unique over all data that share a path.
        seed: of the draws in resample mode, and of `Permuted`.
        on_uneven: what happens when a rank has no more batches and others have. "pad": it delivers batches of weight 0,
            whose labels are ignored, until the others are through; "stop": the epoch ends on all ranks; "raise".
            "auto" is "pad" in weight mode and "stop" in resample mode, where "pad" is refused.
        process_group: the data-parallel ranks, which share τ and keep in step: a group, or the `DeviceMesh` of the
            data-parallel dimensions of a larger mesh (then tensor- and pipeline-parallel peers, which read the same
            batches, get the same weights); by default all ranks. Every rank builds its streams in the same order.
        timeout: seconds that a rank waits for the others at a window's boundary before it is an error. At the first
            `next()` it is 45 s, if that is less.
        max_bad_fraction: of a window's losses, how many may be NaN or infinite before it is an error.
        rehearsal: prior samples that are mixed in, `Rehearsal(prior, scorer, …)`. Batches gain `flow_rehearsed`, and
            the loop calls `feedback`.
        progress: show one line in the terminal, and a bar while the first window is scored.

    Raises:
        ValueError: arguments that cannot be, at once; bad batches and losses, from `next()`; ranks that are configured
            differently, at the first `next()`.
        RankError: from `next()`, a rank that has died, stalled, failed, or never came.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        scorer: Scorer,
        *,
        mode: Mode | Sampler = "weight",
        level: Level = "sample",
        temperature: Temperature = RunningMedian(),
        policy: Policy = Flow(),
        normalize: bool = False,
        attach: Attach = "key",
        include: tuple[Include, ...] = (),
        window: int | Literal["auto"] = "auto",
        max_window_bytes: int = 2**30,
        accumulate: int = 1,
        recollate: Literal["pad"] | Recollate = "pad",
        cache: Literal["memory"] | str | os.PathLike[str] | None = "memory",
        cache_key: str | None = None,
        seed: int = 0,
        on_uneven: Uneven = "auto",
        process_group: ProcessGroup | DeviceMesh | None = None,
        timeout: float = 1800.0,
        max_bad_fraction: float = 0.05,
        rehearsal: Rehearsal | None = None,
        progress: bool = False,
    ) -> None:
        self._settings = Settings(
            mode=mode,
            level=level,
            temperature=temperature,
            policy=policy,
            normalize=normalize,
            attach=attach,
            include=tuple(include) if not isinstance(include, str) else include,
            window=window,
            max_window_bytes=max_window_bytes,
            accumulate=accumulate,
            recollate=recollate,
            cache_key=cache_key,
            seed=seed,
            on_uneven=on_uneven,
            max_bad_fraction=max_bad_fraction,
            rehearsal=rehearsal,
        )
        check_loader(loader)
        if isinstance(loader, FlowStream):
            raise ValueError("loader is itself a FlowStream: wrap the loader once")
        if level not in getattr(scorer, "levels", ()):
            raise ValueError(
                f"{type(scorer).__name__} has no losses at level {level!r}: it must be a scorer such as "
                "CausalLMScorer(model), and have that level"
            )
        self._loader = loader
        self._scorer = scorer
        self._cache = open_cache(cache)
        self._progress = Progress() if progress else None
        self._reader = ReadAhead(source_of(loader))
        self._epoch = 0
        self._forwarded_epoch = 0
        self._active: Epoch | None = None
        self._owner: FlowIterator | None = None
        self._loaded: dict[str, Any] | None = None
        self._closed = False
        self._has_told = False
        self._reference: str | None = None
        self._meetings = Meetings(world_of(process_group), self._settings, timeout=timeout)
        self._running = self._new_running()
        self._length = agreed_length(loader, self._settings, self._meetings) if self._meetings.are_several else None
        self._elastic = reshardable(loader) if self._settings.sampler is None else None

    # -- iteration ---------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        """An iterator over one epoch, started at its first `next()`; there, an older one ends.

        After a delivered batch the next epoch begins; after `load_state_dict`, the state's position is taken up.
        """
        if get_worker_info() is not None:
            raise RuntimeError(
                "FlowStream is iterated over in a worker process, but it scores on the main process' device: give the "
                "workers to the inner loader, and iterate over this stream itself (or "
                "DataLoader(stream, batch_size=None) with num_workers=0)"
            )
        return FlowIterator(self)

    def __len__(self) -> int:
        """Batches an epoch, in weight mode over a sized loader without rehearsal; `TypeError` elsewhere.

        On several ranks what all have: agreed upon when the stream was built.
        """
        if self._settings.sampler is not None:
            raise TypeError("resampling decides while streaming how many batches an epoch has: count steps (max_steps)")
        if self._settings.rehearsal is not None:
            raise TypeError("how many batches are rehearsed is decided while streaming: count steps (max_steps)")
        if not self._meetings.are_several:
            return length_of(self._loader)
        if self._length is None:
            raise TypeError("the loader has no length on every rank, so the stream has none")
        return self._length

    def __bool__(self) -> bool:
        return True  # else `if stream:` would ask for its length

    @property
    def epoch(self) -> int:
        """The epoch that the last batch came from, or that the next one begins."""
        return self._epoch

    @property
    def settings(self) -> Settings:
        """What the stream was asked to do."""
        return self._settings

    @property
    def end_of_epoch(self) -> bool:
        """Whether the batch that `next()` returned last is its epoch's last one."""
        return self._active is not None and self._active.finished

    def set_epoch(self, epoch: int) -> None:
        """Let the next `iter()` begin this epoch. Forwarded to the loader, its sampler and its data set.

        `ValueError` while a loaded state waits to be resumed in another epoch.
        """
        if self._loaded is not None:
            if epoch != self._loaded["epoch"]:
                raise ValueError(
                    f"set_epoch({epoch}) would drop the loaded state, which resumes in epoch {self._loaded['epoch']}: "
                    "call it before load_state_dict, or not at all"
                )
        elif epoch != self._epoch or self._active is not None:
            if self._is_one_pass and self._active is not None and not self._active.finished:
                raise ValueError(
                    f"set_epoch({epoch}) would drop what was read ahead of an iterator, which cannot be read again: "
                    "give the stream a loader that can be iterated over again"
                )
            self._end_active()
            self._epoch = epoch
        self._forward_epoch()

    def close(self) -> None:
        """Let go of the loader's iterator and all that is queued. The stream cannot be iterated over afterwards.

        Its state can still be taken.
        """
        if not self._closed:
            self._loaded = self._state()
        self._end_active()
        self._reader.close()
        self._meetings.close()
        self._owner = None  # it refers to the stream, and so to the loader, whose workers shall end
        if self._cache is not None:
            self._cache.close()
        if self._progress is not None:
            self._progress.close()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, iterator: FlowIterator) -> Epoch:
        """The epoch that a new iterator walks through; the one before ends."""
        self._owner = iterator
        if self._closed:
            raise RuntimeError("the stream is closed: build a new one")
        self._meetings.shake_hands(self._configuration)
        if self._running.rehearsing is not None:
            self._running.rehearsing.prepare(self._meetings)
        active, position = self._active, None
        if active is not None and self._is_one_pass and not active.finished:
            return active  # a loader that is an iterator has no other epoch
        # Ctrl-C may come between any two of these lines: after each the state is what it was before.
        if active is not None:
            if active.pending is not None:
                active.rewind()
                self._loaded = self._state()
            elif active.num_delivered or active.finished:
                self._epoch, self._active = self._epoch + 1, None
            else:
                active.rewind()
            self._active = None
            active.close()
        if self._loaded is not None:
            (position,), (legacy,) = self._loaded["position"], self._loaded["loader"]
            if position is None:
                self._reader.inherit(legacy)
        if self._epoch != self._forwarded_epoch:
            self._forward_epoch()
        begun = Epoch(
            self._settings,
            self._scorer,
            self._cache,
            self._running,
            self._reader,
            self._epoch,
            self._meetings,
            self._progress,
            position,
            is_elastic=self._elastic is not None,
        )
        self._active, self._loaded = begun, None
        return begun

    def _configuration(self) -> dict[str, str]:
        """What all ranks must have alike."""
        settings = self._settings
        return {
            **settings.described(),
            "on_uneven": settings.on_uneven,
            "include": repr(settings.include),
            "scorer": type(self._scorer).__name__,
            "reference": self._fingerprint(),
        }

    def _end_active(self) -> None:
        active, self._active = self._active, None
        if active is not None:
            active.close()

    def _forward_epoch(self) -> None:
        """Tell whatever shuffles by epoch which one it is."""
        self._forwarded_epoch = self._epoch
        for listener in epoch_listeners(self._loader):
            listener(self._epoch)

    def _new_running(self) -> Running:
        settings, world = self._settings, self._meetings.world
        spec = settings.rehearsal
        rehearsing = None if spec is None else Rehearsing(spec, world, accumulate=settings.accumulate)
        return Running(settings, speaks=world.speaks, rehearsing=rehearsing)

    # -- rehearsal ---------------------------------------------------------------------------------

    def feedback(
        self, batch: Any, correct: Any = None, *, logits: Tensor | None = None, labels: Tensor | None = None
    ) -> None:
        """Tell whether the tuned model was right on the rehearsed samples of a batch, once after its forward pass.

        For a batch of the loader's own nothing is done, so that it may be called at each step. What was told before
        the next window's meeting moves the rates that the window is drawn by. It may come late: about 8 windows are
        remembered, and feedback on older ones is refused.

        Args:
            batch: the batch; or its `flow_rehearsed`, where that was popped.
            correct: [B] bool (or 0 and 1), an entry a row (packed rows: a document); or, in its place,
            logits: those of the batch, judged by the rehearsal's criterion, with
            labels: as in the batch, which they are read from if it still has them.

        Raises:
            ValueError: shapes that do not go together; samples that the stream did not deliver, or feedback given
                twice; a stream without rehearsal.
        """
        if self._running.rehearsing is None:
            raise ValueError("this stream rehearses nothing: build it with rehearsal=Rehearsal(prior, scorer, …)")
        self._running.rehearsing.feedback(batch, correct, logits=logits, labels=labels)

    @property
    def rehearsal(self) -> Rehearsing | None:
        """What was learned of damage: `rates()`, `counts()`, `names` and `sizes`, an entry a bin; or `None`."""
        return self._running.rehearsing

    # -- metrics and state -------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """What the stream has done so far, flat, for any logger. Sums run over all windows that went into delivery.

        `flow/tau`: τ of the window in delivery, nats; `flow/tau_error`: its standard error; `flow/mean_weight`,
        `flow/ess` (effective sample size over n, Kish); `flow/samples_seen`: scored; `flow/samples_emitted`: delivered
        of the loader's; `flow/acceptance`: drawn over seen; `flow/nonfinite`, `flow/empty`: left out, for a loss that
        is not finite, or no label; `flow/cache_hit_rate`; `flow/score_seconds`: spent in scoring; `flow/wait_seconds`:
        `next()` waited for the loader and at windows' boundaries; `flow/padding_fraction`: of the tokens that the
        reference read; `flow/padded_batches`: delivered with weight 0 to keep ranks in step; `flow/window_seconds`:
        between the last two boundaries. τ, weights, and counts of samples and of padded batches are over all ranks;
        `flow/samples_emitted`, the cache, times and tokens this rank's. With rehearsal: `flow/rehearsed_fraction`, of
        the compute of what this rank delivered (see `Rehearsal`); `flow/damage_rate`: the estimated share of the prior
        data that is damaged.
        """
        return self._running.metrics()

    def state_dict(self) -> dict[str, Any]:
        """The position of the consumer: the batches that `next()` has returned, however far the stream has read.

        Plain values and tensors (`torch.load(weights_only=True)`). May be taken between any two batches. A stream is a
        `torch.distributed.checkpoint.stateful.Stateful`: `dcp.save({f"stream of rank {rank}": stream, …})`, a key a
        rank, since each has its own position.
        """
        self._tell_caveat()
        return self._state()

    def _state(self) -> dict[str, Any]:
        if self._loaded is not None:
            return copy.deepcopy(self._loaded)
        active = self._active
        finished = active is not None and active.finished
        position, running = (None, self._running.state_dict()) if active is None or finished else active.state_dict()
        header = states.pack(
            settings=self._settings.described(),
            reference=self._fingerprint(),
            scorer=self._scorer.state_dict(),
            epoch=self._epoch + 1 if finished else self._epoch,
        )
        sealed = states.sealed(
            position=position,
            running=running,
            loader=self._reader.legacy(),
            num_emitted=self._running.num_emitted,
            num_delivered=self._running.num_delivered,
            rank=self._meetings.world.rank,
            world_size=self._meetings.world.world_size,
            offset=0 if self._elastic is None or finished else self._elastic.offset,
            elastic=self._elastic_terms(),
        )
        rehearsing = self._running.rehearsing
        return header | sealed | ({} if rehearsing is None else {"rehearsal": (rehearsing.ledger_state(),)})

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Let the next `iter()` go on where `state` was taken.

        Raises:
            ValueError: a state of another version, or of another number of ranks (see `fs.merge_states`); or, unless
                `strict=False`, of another configuration or reference; the message names the field, and the stream
                stays what it was.
        """
        world = self._meetings.world
        states.check(
            state, self._settings.described(), self._fingerprint(), world.rank, world.world_size, strict=strict
        )
        if self._is_one_pass and self._active is not None:
            raise ValueError(
                "the loader is an iterator that has been read from: a state can be resumed only from its beginning"
            )
        loaded = states.on_cpu(state)
        running = self._new_running()
        running.load_state_dict(*loaded["running"], strict=strict)
        running.num_delivered = loaded["num_delivered"]
        running.tau = running.temperature.settled_tau or math.nan
        is_merged = loaded["world_size"] == states.ANY_WORLD_SIZE
        running.num_emitted = world.part_of(loaded["num_emitted"]) if is_merged else loaded["num_emitted"]
        if loaded["parts"][0]:
            running.absorb_parts(loaded["parts"][0])
        if running.rehearsing is not None and "rehearsal" in loaded:
            running.rehearsing.load_ledger(loaded["rehearsal"][0])
            if is_merged:
                running.rehearsing.take_part()
                loaded |= {"rehearsal": (running.rehearsing.ledger_state(),)}
        if self._elastic is None and loaded["offset"]:
            raise ValueError(
                f"the state's epoch was entered at sample {loaded['offset']} of all ranks', which takes a DataLoader "
                "over an ElasticDistributedSampler: build the loader as it was"
            )
        # Nothing has changed so far: a state that is refused leaves the stream as it was.
        self._tell_caveat()
        self._scorer.load_state_dict(loaded["scorer"])
        self._end_active()
        self._running = running
        self._epoch = loaded["epoch"]
        if self._elastic is not None:
            self._elastic.start_at(self._epoch, loaded["offset"])
        if is_merged:  # from here on it is a state of this many ranks
            loaded |= {"running": (running.state_dict(),), "parts": ([],)}
            loaded |= {"num_emitted": running.num_emitted, "rank": world.rank, "world_size": world.world_size}
        self._loaded = loaded

    def _elastic_terms(self) -> dict[str, int] | None:
        """What tells, beside the position, where another number of ranks goes on; `None` where none can."""
        if self._elastic is None or not isinstance(self._loader, DataLoader) or self._loader.batch_size is None:
            return None
        return {"batch_size": self._loader.batch_size, "num_samples": self._elastic.num_samples}

    def _tell_caveat(self) -> None:
        """Say once what of this loader a resume does not give back."""
        if self._reader.caveat and not self._has_told:
            self._has_told = True
            _logger.warning("%s", self._reader.caveat)

    @property
    def _is_one_pass(self) -> bool:
        return isinstance(self._loader, Iterator)

    def _fingerprint(self) -> str:
        if self._reference is None:
            self._reference = self._scorer.fingerprint()
        return self._reference
