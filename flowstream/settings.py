"""What a stream was asked to do, checked once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from flowstream.distributed.message import MAX_STEPS, Message, OnUneven
from flowstream.policies import Flow, Policy, describe, needs_scores
from flowstream.recollate import Recollate
from flowstream.rehearsal.spec import Rehearsal
from flowstream.samplers import Systematic, Thin
from flowstream.scoring.base import Level
from flowstream.temperature import RunningMedian, Temperature, WindowMedian

Mode = Literal["weight", "resample"]
Attach = Literal["key", "pair"]
Include = Literal["loss", "tau", "index", "denominator", "weight"]
Sampler = Thin | Systematic
Uneven = Literal["auto", "pad", "stop", "raise"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of `FlowStream`, as documented there. `ValueError` for what cannot be."""

    mode: Mode | Sampler = "weight"
    level: Level = "sample"
    temperature: Temperature = field(default_factory=RunningMedian)
    policy: Policy = field(default_factory=Flow)
    normalize: bool = False
    attach: Attach = "key"
    include: tuple[Include, ...] = ()
    window: int | Literal["auto"] = "auto"
    max_window_bytes: int = 2**30
    accumulate: int = 1
    recollate: Literal["pad"] | Recollate = "pad"
    cache_key: str | None = None
    seed: int = 0
    on_uneven: Uneven = "auto"
    max_bad_fraction: float = 0.05
    rehearsal: Rehearsal | None = None

    def __post_init__(self) -> None:
        _choose("mode", self.mode, get_args(Mode), Thin | Systematic, "Thin() or Systematic()")
        _choose("level", self.level, get_args(Level))
        _choose("attach", self.attach, get_args(Attach))
        _choose("on_uneven", self.on_uneven, get_args(Uneven))
        _choose("recollate", self.recollate, ("pad",), Callable, "a function from a list of samples to a batch")
        if isinstance(self.include, str):
            raise ValueError(f"include is {self.include!r}: give a tuple, ({self.include!r},)")
        for name in self.include:
            _choose("include", name, get_args(Include))
        if not callable(self.policy):
            raise ValueError(
                f"policy is {self.policy!r}: give a policy such as Flow(), or a function (loss, tau) → weight"
            )
        if isinstance(self.policy, type):
            raise ValueError(f"policy is the class {self.policy.__name__}: give an instance, {self.policy.__name__}()")
        if not isinstance(self.temperature, Temperature):
            raise ValueError(f"temperature is {self.temperature!r}: give RunningMedian(), FixedTemperature(1.5), …")
        _positive("accumulate", self.accumulate)
        _positive("max_window_bytes", self.max_window_bytes)
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {self.max_bad_fraction}: give a fraction from 0 to 1")
        if self.window != "auto":
            _positive("window", self.window, "or 'auto'")
            if self.window % self.accumulate:
                raise ValueError(
                    f"window is {self.window} batches, which is no multiple of accumulate={self.accumulate}: an "
                    f"optimizer step would meet two windows. Give window={_round_up(self.window, self.accumulate)}"
                )
        if self.rehearsal is not None and not isinstance(self.rehearsal, Rehearsal):
            raise ValueError(f"rehearsal is {self.rehearsal!r:.80}: give Rehearsal(prior, scorer, …), or None")
        if self.sampler is not None:
            self._check_resampling()

    def _check_resampling(self) -> None:
        if self.on_uneven == "pad":
            raise ValueError(
                'on_uneven="pad" pads with batches of weight 0, but resampled batches carry no weight: use "stop"'
            )
        if self.level == "token":
            raise ValueError("resampling takes whole samples, not tokens: use level='sample', or mode='weight'")
        if isinstance(self.sampler, Thin) and isinstance(self.temperature, WindowMedian):
            raise ValueError(
                "Thin() with WindowMedian() is circular: how many candidates a window needs depends on τ, which would "
                "depend on the candidates. Use RunningMedian(), or mode=Systematic()"
            )
        if self.normalize:
            raise ValueError("normalize=True has no effect on resampled batches, which carry no weight: leave it out")
        if self.attach == "pair":
            raise ValueError("resampled batches carry no weight: use attach='key' and `for batch in stream`")

    @property
    def sampler(self) -> Sampler | None:
        """What draws the samples; `None` in weight mode."""
        if isinstance(self.mode, str):
            return Thin() if self.mode == "resample" else None
        return self.mode

    @property
    def when_uneven(self) -> OnUneven:
        """What `on_uneven="auto"` stands for."""
        if self.on_uneven == "auto":
            return "pad" if self.sampler is None else "stop"
        return self.on_uneven

    @property
    def needs_loss(self) -> bool:
        """Whether anything that is asked for depends on losses."""
        return needs_scores(self.policy) or not {"loss", "tau"}.isdisjoint(self.include)

    def described(self) -> dict[str, str]:
        """What a state must agree with, field by field, in words that are equal in every process."""
        return {
            "mode": repr(self.sampler) if self.sampler else "weight",
            "level": self.level,
            "temperature": repr(self.temperature),
            "policy": describe(self.policy),
            "normalize": repr(self.normalize),
            "window": repr(self.window),
            "max_window_bytes": repr(self.max_window_bytes),
            "accumulate": repr(self.accumulate),
            "recollate": self.recollate if isinstance(self.recollate, str) else describe(self.recollate),
            "seed": repr(self.seed),
            **({} if self.rehearsal is None else {"rehearsal": str(self.rehearsal)}),
        }


def window_size(settings: Settings, num_samples: int, num_bytes: int) -> int:
    """Batches in a window, from the first batch: its samples and its bytes.

    "auto": at least 256 samples, 8 batches and two optimizer steps (trainers pull all micro-batches of one at once),
    unless the three windows that are held (pulled, scored, delivered) would then exceed `max_window_bytes`; a multiple
    of `accumulate`.
    """
    if settings.window != "auto":
        return settings.window
    wanted = max(8, -(-256 // max(num_samples, 1)), 2 * settings.accumulate)
    candidates = 1 if settings.sampler is None else 3  # about 2.5 candidates a delivered sample
    affordable = settings.max_window_bytes // max(3 * candidates * num_bytes, 1)
    if affordable >= wanted:
        return _round_up(wanted, settings.accumulate)
    return max(affordable // settings.accumulate, 1) * settings.accumulate


def first_size(settings: Settings, warmup_samples: int, size: int, opened: Sequence[Message]) -> int:
    """Batches of the first window of several ranks: together they reach `warmup_samples`, as far as can be told.

    From the ranks' first batches: all ranks come to the same number.
    """
    num, num_bytes = sum(message.num_first for message in opened), max(message.num_first_bytes for message in opened)
    wanted = -(-warmup_samples // max(num, 1)) if settings.needs_loss else 0
    affordable = settings.max_window_bytes // max(num_bytes, 1)
    limit = MAX_STEPS * settings.accumulate
    return _round_up(max(size, min(wanted, affordable, limit)), settings.accumulate)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _choose(name: str, value: Any, choices: tuple[Any, ...], kind: Any = None, or_kind: str = "") -> None:
    if isinstance(value, str):
        if value in choices:
            return
    elif kind is not None and isinstance(value, kind):
        return
    offered = ", ".join(map(repr, choices)) + (f" or {or_kind}" if or_kind else "")
    raise ValueError(f"{name} is {value!r}: choose {offered}")


def _positive(name: str, value: Any, alternative: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}: give a whole number of at least 1 {alternative}".rstrip())
