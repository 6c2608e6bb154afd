"""Which checkpoint is gone on from: one that lacks nothing, however its writing ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowstream.finetune.checkpoints import is_whole, last_checkpoint, num_ranks, step_of


def write(folder: Path, step: int, *, ranks: int = 1, world_size: int = 1, state: str | None = '{"a": 1}') -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for rank in range(ranks):
        (checkpoint / f"flowstream-{step:010d}-rank-{rank:05d}-of-{world_size:05d}.pt").touch()
    if state is not None:
        (checkpoint / "trainer_state.json").write_text(state)
    return checkpoint


def test_the_newest_is_that_of_the_highest_step_not_of_the_last_name(tmp_path: Path) -> None:
    for step in (9, 10, 100, 20):
        write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-200").touch()  # a file
    found = last_checkpoint(tmp_path)
    assert found == tmp_path / "checkpoint-100"
    assert step_of(found) == 100


@pytest.mark.parametrize(
    "torn",
    [
        {"state": None},
        {"state": ""},
        {"state": '{"a": '},
        {"ranks": 0},
        {"ranks": 1, "world_size": 2},
    ],
)
def test_what_is_not_whole_is_passed_over(torn: dict[str, object], tmp_path: Path) -> None:
    write(tmp_path, 5, ranks=2, world_size=2)
    assert not is_whole(write(tmp_path, 6, **torn))  # type: ignore[arg-type]
    found = last_checkpoint(tmp_path)
    assert found == tmp_path / "checkpoint-5"
    assert num_ranks(found) == 2


def test_there_is_none_where_nothing_was_written(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None
