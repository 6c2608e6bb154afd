"""What a comparison is asked to do: the options of `flowstream compare`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from flowstream.finetune.settings import Texts

ALL_METHODS = (
    "standard,l1,l2,lora,wise,mofo,hft,dro,flow,flow-token,resample,permuted,subsample,flow+l2,flow+lora,flow+wise"
)

_MaybeName = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="")]
_MaybeCount = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]

_MAY_CHANGE = frozenset({"out", "seeds", "processes"})
"""Options that a comparison may be gone on with otherwise: finished cells stay what they are."""

_Part = TypeVar("_Part")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One comparison. `check()` says what cannot be. Lists are written with commas."""

    model: _MaybeName = None
    """Name or path of the pre-trained model and its tokenizer; by default a small Llama is pre-trained on the spot."""
    data: _MaybeName = None
    """Texts to learn: file.jsonl, tar shards as 'shards/{000..099}.tar', or hf:NAME; by default the demo's problems."""
    general: _MaybeName = None
    """Held-out texts of what must be retained, a .txt or as --data: half for validation, half for the test."""
    validation: _MaybeName = None
    """Texts to choose learning rate and step on; by default split off --data."""
    test: _MaybeName = None
    """Texts that the chosen points are reported on; by default split off --data."""
    out: Path = Path("compare")
    """Folder of results.json, report.html, table.md, and of finished cells."""
    texts: tyro.conf.OmitArgPrefixes[Texts] = field(default_factory=Texts)

    # The grid
    methods: str = ALL_METHODS
    """Each is data[+companion…]: standard, flow, flow-token, resample, permuted, subsample or dro, with any of lora,
    hft, l1, l2, mofo, wise. A companion alone goes with standard."""
    lrs: str = "2e-4,4e-4,8e-4"
    """Learning rates of every method. Standard runs at more of them, for its curve: a factor of at most √2 apart, and
    down to half of the lowest, for methods that learn slowly."""
    steps: int = 80
    """Optimizer steps of a run at equal steps."""
    measured_at: str = "0.25,0.5,1"
    """Shares of the steps after which a run is measured."""
    seeds: int = 3
    """Paired repetitions: order of the samples, draws, adapters and masks. More of them may be asked for later."""
    budgets: str = "equal-steps,equal-flops"
    """What all methods have alike."""

    # Training
    batch_size: int = 8
    """Samples a step."""
    max_grad_norm: float = 1.0
    """Longer gradients are cut to this norm."""
    window: int = 8
    """Batches in a window of the stream."""
    warmup_samples: int = 256
    """Samples of its first window."""

    # Companions
    strengths: str = "1e2,1e4"
    """Of l1 and l2, to choose from on validation: strength / N times ‖θ-θ*‖₁ or ‖θ-θ*‖² is added to the loss, with N
    parameters that train. The official code's 1e-3 changes next to nothing."""
    rank: int = 8
    """Of lora's adapters, on all linear layers."""
    alphas: str = "0.25,0.5,0.75"
    """Of wise, to choose from on validation: shares of the tuned model."""
    fraction: float = 0.1
    """Of mofo: the share of each tensor that moves in a step."""
    dro_temperature: float = 1.0
    """Of dro, in nats: lower is nearer to the worst sample."""

    # What it costs
    max_samples: _MaybeCount = None
    """Samples to learn, at most, drawn from --data; by default all of it, and all of it is scored before the first run
    that weighs samples."""
    max_evaluated: int = 256
    """Samples, and rows of general text, in each of validation and test, at most."""
    processes: _MaybeCount = None
    """Seeds run side by side; by default as many as there are cores, and one on a GPU."""
    quick: bool = False
    """Without --model: the smallest model and problems, for tests. The figures mean nothing."""

    @cached_property
    def learning_rates(self) -> tuple[float, ...]:
        return tuple(sorted(_listed("lrs", self.lrs, float)))

    @cached_property
    def dense_rates(self) -> tuple[float, ...]:
        """The further rates that the baseline runs at."""
        lowest = self.learning_rates[0] / 2
        found = [lowest]
        for low, high in pairwise((lowest, *self.learning_rates)):
            num_parts = math.ceil(2 * math.log2(high / low) - 1e-9)
            found += [low * (high / low) ** (k / num_parts) for k in range(1, num_parts)]
        return tuple(found)

    @cached_property
    def shares(self) -> tuple[float, ...]:
        return tuple(sorted(_listed("measured_at", self.measured_at, float)))

    @cached_property
    def pulls(self) -> tuple[float, ...]:
        return _listed("strengths", self.strengths, float)

    @cached_property
    def interpolations(self) -> tuple[float, ...]:
        return _listed("alphas", self.alphas, float)

    @cached_property
    def budget_names(self) -> tuple[str, ...]:
        """As in results."""
        return tuple(name.replace("-", "_") for name in _listed("budgets", self.budgets, str))

    def measured_steps(self, steps: int) -> frozenset[int]:
        """The steps after which a run of so many is measured; the last always."""
        return frozenset({steps, *(max(1, round(share * steps)) for share in self.shares)})

    def check(self) -> None:
        """`ValueError` for what cannot be."""
        for name in ("steps", "seeds", "batch_size", "window", "rank", "max_samples", "max_evaluated", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{_flag(name)} is {value}: give 1 or more")
        if self.warmup_samples < 8:
            raise ValueError(f"--warmup-samples is {self.warmup_samples}: give 8 or more")
        for name in ("max_grad_norm", "dro_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}: give a number above 0")
        for name, values in (("lrs", self.learning_rates), ("strengths", self.pulls)):
            if any(not 0 < value < math.inf for value in values):
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}: give numbers above 0")
        for name, values in (
            ("measured_at", self.shares),
            ("fraction", (self.fraction,)),
            ("alphas", self.interpolations),
        ):
            if any(not 0 < value <= 1 for value in values):
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}: give shares above 0, up to 1")
        if unknown := [name for name in self.budget_names if name not in ("equal_steps", "equal_flops")]:
            raise ValueError(f"--budgets has {unknown[0]}: there are equal-steps and equal-flops")
        if "equal_steps" not in self.budget_names:
            raise ValueError("--budgets needs equal-steps: its runs choose the learning rate of those at equal FLOPs")
        given = [name for name in ("model", "data", "general") if getattr(self, name) is not None]
        if given and len(given) < 3:
            missing = next(name for name in ("model", "data", "general") if name not in given)
            raise ValueError(
                f"--{given[0]} goes with --{missing}: give --model, --data and --general, a text of what must be "
                "retained; or none of them, for the demo's"
            )
        if not given and (self.validation is not None or self.test is not None):
            raise ValueError("--validation and --test go with --model, --data and --general: give them all")
        if given and self.quick:
            raise ValueError("--quick is a size of the demo's model: leave it out, or leave out --model")
        from flowstream.compare.methods import parse_methods

        parse_methods(self.methods)

    @property
    def packages(self) -> tuple[str, ...]:
        """Those that it needs, and others do not."""
        return ("peft",) * ("lora" in self.methods)

    def asked(self) -> dict[str, str]:
        """Name → value of each option, in one writing."""
        from flowstream.compare.methods import parse_methods

        values = asdict(self)
        values |= values.pop("texts")
        values |= {
            "methods": ",".join(method.name for method in parse_methods(self.methods)),
            "lrs": self.learning_rates,
            "measured_at": self.shares,
            "strengths": self.pulls,
            "alphas": self.interpolations,
            "budgets": self.budget_names,
        }
        return {
            name: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            for name, value in values.items()
            if value is not None
        }

    def check_goes_on(self, before: Mapping[str, str]) -> None:
        """`ValueError` that names what a comparison was begun with otherwise; `before` is what was asked then."""
        now = self.asked()
        if told := [
            f"{_flag(name)} was {before.get(name, 'not given')}, and now it is {now.get(name, 'not given')}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name) and name not in _MAY_CHANGE
        ]:
            raise ValueError(
                f"{self.out} is of another comparison: {'; '.join(told)}. Leave it as it was, or give another --out"
            )


def _listed(name: str, text: str, kind: Callable[[str], _Part]) -> tuple[_Part, ...]:
    try:
        found = tuple(kind(part.strip()) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{_flag(name)} is {text}: give numbers with commas between, such as 1e-4,2e-4") from None
    if len(set(found)) < len(found):
        raise ValueError(f"{_flag(name)} is {text}: give each once")
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
