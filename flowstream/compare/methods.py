"""Every method that can be compared, by name: what is trained on, and the companions that change how."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from flowstream.compare.analysis import BASELINE
from flowstream.compare.feeds import FEEDS, SCORING
from flowstream.compare.learner import Learner
from flowstream.compare.settings import Settings

DATA = (*FEEDS, "dro")
"""What is trained on: a feed each, and `dro`, which is standard's with a loss of its own."""


class Companion(Protocol):
    """One change to how a learner learns."""

    def equip(self, learner: Learner) -> None:
        """Make it, before the first step."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters on all linear layers, scaled by 1 (α = r, as in FLOW's own experiments); the base is frozen."""

    rank: int

    def equip(self, learner: Learner) -> None:
        import peft

        config = peft.LoraConfig(
            r=self.rank, lora_alpha=self.rank, target_modules="all-linear", task_type=peft.TaskType.CAUSAL_LM
        )
        learner.model = peft.get_peft_model(learner.model, config)


@dataclass(frozen=True, kw_only=True)
class HalfFineTuning:
    """Half of each block's matrices are frozen, another half by each seed."""

    def equip(self, learner: Learner) -> None:
        from flowstream.companions.half_fine_tuning import half_fine_tuning

        half_fine_tuning(learner.model, seed=learner.seed)


@dataclass(frozen=True, kw_only=True)
class Pull:
    """strength / N · ‖θ-θ*‖² or ‖θ-θ*‖₁ is added to the loss, of the N parameters that train."""

    norm: Literal["l1", "l2"]
    strength: float

    def equip(self, learner: Learner) -> None:
        from flowstream.companions.reference_distance import DistanceToReference

        distance = DistanceToReference(learner.model, norm=self.norm, strength=self.strength)
        learner.penalties.append(distance.penalty)


@dataclass(frozen=True, kw_only=True)
class MomentumFiltered:
    """Of each parameter tensor only the share with the largest momentum moves in a step."""

    fraction: float

    def equip(self, learner: Learner) -> None:
        from flowstream.companions.mofo import MoFO

        learner.optimizer_wraps.append(lambda optimizer: MoFO(optimizer, fraction=self.fraction))


@dataclass(frozen=True, kw_only=True)
class Robust:
    """The loss is the worst case near the batch: hard samples, by their current losses, count more."""

    temperature: float

    def equip(self, learner: Learner) -> None:
        from flowstream.companions.dro import Dro

        dro = Dro(self.temperature)

        def objective(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
            return dro.lm_loss(logits, labels)

        learner.objective = objective


WISE = "wise"
"""Of a method's runs, the models between the reference and each point: nothing more is trained."""

_COMPANIONS: dict[str, Callable[[Settings, float | None], Companion] | None] = {
    "lora": lambda settings, strength: Lora(rank=settings.rank),
    "hft": lambda settings, strength: HalfFineTuning(),
    "l1": lambda settings, strength: Pull(norm="l1", strength=strength or 0.0),
    "l2": lambda settings, strength: Pull(norm="l2", strength=strength or 0.0),
    "mofo": lambda settings, strength: MomentumFiltered(fraction=settings.fraction),
    WISE: None,
}
"""In the order in which they are applied: first what trains, then what is added to its loss, then its optimizer."""

_EXCLUSIVE = (("l1", "l2"), ("lora", "hft"))


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to fine-tune: one of `DATA`, with companions in their order."""

    data: str = BASELINE
    companions: tuple[str, ...] = ()

    @staticmethod
    def parse(name: str) -> Method:
        """`data[+companion…]`; a companion alone goes with standard. ValueError for what there is not."""
        parts = name.split("+")
        known = f"a method is one of {', '.join(DATA)}, with any of {', '.join(_COMPANIONS)}, such as flow+l2"
        if unknown := [part for part in parts if part not in DATA and part not in _COMPANIONS]:
            raise ValueError(f"--methods {name}: there is no {unknown[0] or 'empty name'}; {known}")
        if twice := [part for part in dict.fromkeys(parts) if parts.count(part) > 1]:
            raise ValueError(f"--methods {name}: {twice[0]} is there twice; {known}")
        data = [part for part in parts if part in DATA]
        if len(data) > 1:
            raise ValueError(f"--methods {name}: {' and '.join(data)} both say what is trained on; {known}")
        for pair in _EXCLUSIVE:
            if set(pair) <= set(parts):
                raise ValueError(f"--methods {name}: {' and '.join(pair)} exclude each other; {known}")
        return Method(data=data[0] if data else BASELINE, companions=tuple(c for c in _COMPANIONS if c in parts))

    @property
    def name(self) -> str:
        """As it is typed, in one order."""
        data = () if self.data == BASELINE and self.companions else (self.data,)
        return "+".join((*data, *self.companions))

    @property
    def base(self) -> Method:
        """The method that is trained: this one, before models are interpolated."""
        return Method(data=self.data, companions=tuple(c for c in self.companions if c != WISE))

    @property
    def is_interpolated(self) -> bool:
        return WISE in self.companions

    @property
    def feed(self) -> str:
        return BASELINE if self.data == "dro" else self.data

    @property
    def scores(self) -> bool:
        return self.feed in SCORING

    @property
    def needs_losses(self) -> bool:
        """Of the reference, of all samples: to weigh them, or for how many of them resampling keeps."""
        return self.scores or self.feed == "subsample"

    @property
    def costs_otherwise(self) -> bool:
        """Whether a step costs another number of FLOPs than standard's, so that equal FLOPs are other steps."""
        return self.scores or "lora" in self.companions or "hft" in self.companions

    def strengths(self, settings: Settings) -> tuple[float | None, ...]:
        """Those to choose from; one `None` where it has no pull."""
        return settings.pulls if {"l1", "l2"} & set(self.companions) else (None,)

    def equip(self, learner: Learner, settings: Settings, strength: float | None) -> None:
        """Make a learner learn by this method."""
        for name in self.companions:
            if (make := _COMPANIONS[name]) is not None:
                make(settings, strength).equip(learner)
        if self.data == "dro":
            Robust(temperature=settings.dro_temperature).equip(learner)


def parse_methods(names: str) -> tuple[Method, ...]:
    """Of a list with commas. Standard is always among them, and first: it draws the curve.

    Raises:
        ValueError: an unknown method, a senseless one, or one given twice.
    """
    methods = [Method.parse(name.strip()) for name in names.split(",")]
    if twice := [method for method in dict.fromkeys(methods) if methods.count(method) > 1]:
        raise ValueError(f"--methods has {twice[0].name} twice: give each once")
    return tuple(dict.fromkeys((Method(), *methods)))


def trained(methods: Iterable[Method]) -> tuple[Method, ...]:
    """The methods that must be trained for these to be had, each once, in order."""
    return tuple(dict.fromkeys(method.base for method in methods))
