"""Seeds side by side."""

from dataclasses import replace
from pathlib import Path

import pytest

from flowstream.compare.pool import run_side_by_side
from flowstream.demo.experiment import SeedOutcome, run_seed
from flowstream.demo.preparation import prepare
from flowstream.demo.settings import QUICK

# webdataset leaves shards open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def losses(outcomes: list[SeedOutcome]) -> list[tuple[int, str, int, float, float]]:
    return [
        (run.seed, run.method, point.step, round(point.target_loss, 3), round(point.retained_loss, 3))
        for outcome in outcomes
        for run in outcome.runs
        for point in run.points
    ]


@pytest.mark.soak
def test_seeds_side_by_side_find_what_seeds_in_turn_find(tmp_path: Path) -> None:
    settings = replace(
        QUICK,
        model=replace(QUICK.model, steps=3),
        max_train_chars=50_000,
        num_problems=64,
        steps=8,
        learning_rates=(1e-3,),
        warmup_samples=16,
        num_decoded=1,
    )
    task = prepare(settings, tmp_path, lambda step: None).task
    told: list[str] = []
    in_turn = run_side_by_side(run_seed, task, [0, 1], told.append, max_processes=1)
    assert len(told) == 20
    side_by_side = run_side_by_side(run_seed, task, [0, 1], told.append, max_processes=2)
    assert losses(side_by_side) == losses(in_turn)
    assert sorted(told[:20]) == sorted(told[20:])
