"""The two sizes that the demo comes in."""

from collections.abc import Sequence
from dataclasses import replace

from flowstream.demo.experiment import Settings
from flowstream.demo.pretraining import ModelSize

FULL = Settings()

QUICK = Settings(
    model=ModelSize(vocabulary=512, width=48, layers=2, context=64, steps=60, batch=8, max_threads=1),
    max_train_chars=400_000,
    num_problems=256,
    num_shards=4,
    num_validation=16,
    num_test=32,
    num_text_chunks=8,
    learning_rates=(1e-3, 4e-3),
    steps=16,
    window=4,
    warmup_samples=64,
    num_decoded=8,
    max_processes=1,
)


def adapted(settings: Settings, steps: int | None, learning_rates: Sequence[float]) -> Settings:
    """A preset with the user's own steps and learning rates, where given."""
    return replace(
        settings,
        steps=steps or settings.steps,
        learning_rates=tuple(learning_rates) or settings.learning_rates,
    )
