"""The two sizes that the demo comes in."""

from collections.abc import Sequence
from dataclasses import replace

from flowstream.demo.experiment import Settings
from flowstream.demo.pretraining import ModelSize

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
