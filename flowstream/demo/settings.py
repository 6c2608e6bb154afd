"""How large the experiment is: what can be set, and the two sizes that it comes in."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product

from flowstream.compare.analysis import BASELINE
from flowstream.demo.feeds import METHODS
from flowstream.demo.pretraining import ModelSize


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the experiment is, apart from its seeds."""

    model: ModelSize = field(default_factory=ModelSize)
    max_train_chars: int | None = None
    """Bound on the pre-training text."""
    num_problems: int = 2048
    num_shards: int = 8
    num_validation: int = 64
    num_test: int = 256
    num_text_chunks: int = 40
    """Chunks of held-out text on the validation split; twice as many on the test split."""
    learning_rates: tuple[float, ...] = (2e-4, 4e-4, 8e-4)
    """Every method runs at each of them; standard fine-tuning also half-way between, so that its curve is dense."""
    batch: int = 8
    steps: int = 80
    measured_at: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Shares of the steps after which a run is measured."""
    window: int = 8
    """Batches in a window of the stream."""
    warmup_samples: int = 256
    num_decoded: int = 32
    """Test problems whose answers are decoded for the answer accuracy."""
    max_processes: int = 8
    """Seeds run side by side, one process each, as far as cores reach."""

    def grid(self) -> Iterator[tuple[float, str]]:
        """Learning rate and method of a seed's runs at equal steps, in order."""
        rates = sorted(self.learning_rates)
        yield from product(rates, METHODS)
        yield from ((math.sqrt(low * high), BASELINE) for low, high in pairwise(rates))

    @property
    def measured_steps(self) -> frozenset[int]:
        """The steps after which a run is measured."""
        return frozenset(max(1, round(share * self.steps)) for share in self.measured_at)


FULL = Settings()

QUICK = Settings(
    model=ModelSize(vocabulary=512, width=32, layers=1, heads=2, context=64, steps=40, max_threads=1),
    max_train_chars=300_000,
    num_problems=160,
    num_shards=4,
    num_validation=12,
    num_test=16,
    num_text_chunks=8,
    learning_rates=(1e-3, 4e-3),
    batch=4,
    steps=20,
    window=4,
    warmup_samples=48,
    num_decoded=4,
    max_processes=1,
)


def adapted(settings: Settings, steps: int | None, learning_rates: Sequence[float]) -> Settings:
    """A preset with the user's own steps and learning rates, where given."""
    return replace(
        settings,
        steps=steps or settings.steps,
        learning_rates=tuple(learning_rates) or settings.learning_rates,
    )
