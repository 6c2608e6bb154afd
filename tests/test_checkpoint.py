"""States beside a trainer's checkpoint: whole or not there, the same step on all ranks, and torch's own checkpoints."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from batches import batches_of, by_key, gamma_losses
from torch.distributed.checkpoint.stateful import Stateful

import flowstream as fs

ROOT = Path(__file__).parents[1]


def stream_of(rank: int = 0, **settings: Any) -> fs.FlowStream:
    settings = {"window": 4, "temperature": fs.RunningMedian(warmup_samples=96)} | settings
    return fs.FlowStream(batches_of(gamma_losses(16 * 25, seed=rank)), by_key, cache=None, **settings)


def at_batch(num: int, rank: int = 0, **settings: Any) -> fs.FlowStream:
    stream = stream_of(rank, **settings)
    iterator = iter(stream)
    for _ in range(num):
        next(iterator)
    return stream


def next_ids(stream: fs.FlowStream) -> list[int]:
    return next(iter(stream))["id"].tolist()


def saved(folder: Path) -> list[tuple[int, int]]:
    """(step, rank) of the files in `folder`."""
    names = sorted(name.split("-") for name in os.listdir(folder))
    return [(int(step), int(rank)) for _, step, _, rank, _, _ in names]


def file_of(folder: Path, step: int, rank: int = 0) -> Path:
    (path,) = folder.glob(f"*{step:010d}-rank-{rank:05d}-*")
    return path


def test_a_saved_state_is_taken_up_again(tmp_path):
    folder = tmp_path / "checkpoints" / "stream"
    assert fs.load_state(stream_of(), folder) is None
    path = fs.save_state(at_batch(7), folder, step=70)
    assert torch.load(path, weights_only=True)["step"] == 70  # by a plain torch.load too
    resumed = stream_of()
    assert fs.load_state(resumed, folder) == 70
    assert next_ids(resumed) == list(range(7 * 16, 8 * 16))


def test_the_last_k_steps_are_kept_and_the_newest_is_taken(tmp_path):
    for step in range(6):
        fs.save_state(at_batch(step), tmp_path, step=step, keep_last=3)
    assert saved(tmp_path) == [(3, 0), (4, 0), (5, 0)]
    resumed = stream_of()
    assert fs.load_state(resumed, tmp_path) == 5
    assert fs.load_state(resumed, tmp_path, step=3) == 3
    assert next_ids(resumed) == list(range(3 * 16, 4 * 16))
    with pytest.raises(FileNotFoundError, match=r"no state of step 2, only of \[3, 4, 5\]"):
        fs.load_state(resumed, tmp_path, step=2)


def test_states_of_a_run_that_was_gone_back_on_are_removed(tmp_path):
    for step in (10, 20, 30):
        fs.save_state(at_batch(step // 2), tmp_path, step=step, keep_last=3)
    fs.save_state(at_batch(12), tmp_path, step=25, keep_last=3)
    assert saved(tmp_path) == [(10, 0), (20, 0), (25, 0)]


def test_saving_again_at_a_step_replaces_it(tmp_path):
    for num in (3, 5):
        fs.save_state(at_batch(num), tmp_path, step=1)
    resumed = stream_of()
    assert fs.load_state(resumed, tmp_path) == 1
    assert next_ids(resumed)[0] == 5 * 16


# -- damage ----------------------------------------------------------------------------------------


def torn(content: bytes) -> bytes:
    return content[: len(content) // 2]


def emptied(content: bytes) -> bytes:
    return b""


def flipped(content: bytes) -> bytes:
    at = random.Random(0).randrange(len(content) - 16)
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


def zeroed(content: bytes) -> bytes:
    return bytes(len(content))  # what a file system may leave after a power cut


@pytest.mark.parametrize("damage", [torn, emptied, flipped, zeroed])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_state_is_passed_over_by_all_ranks_with_a_warning(damage, rank, tmp_path, caplog):
    for step in (1, 2):
        for of in (0, 1):
            fs.save_state(at_batch(step, of), tmp_path, step=step, rank=of, world_size=2)
    path = file_of(tmp_path, 2, rank)
    path.write_bytes(damage(path.read_bytes()))
    for of in (0, 1):
        caplog.clear()
        resumed = stream_of(of)
        assert fs.load_state(resumed, tmp_path, rank=of, world_size=2) == 1
        assert "state of step 2" in caplog.text
        assert path.name in caplog.text
        with pytest.raises(RuntimeError, match="state of step 2 .* cannot be loaded"):
            fs.load_state(resumed, tmp_path, step=2, rank=of, world_size=2)
        assert next_ids(resumed)[0] == 16


def test_every_flipped_bit_is_found(tmp_path):
    path = fs.save_state(at_batch(2), tmp_path, step=2)
    fs.save_state(at_batch(1), tmp_path / "whole", step=1)
    content = path.read_bytes()
    draws = random.Random(0)
    for at in draws.sample(range(len(content)), 60):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << draws.randrange(8))]) + content[at + 1 :])
        with pytest.raises(RuntimeError, match="to begin anew, remove the folder"):
            fs.load_state(stream_of(), tmp_path)


def test_a_file_under_anothers_name_is_told(tmp_path):
    for rank in (0, 1):
        fs.save_state(at_batch(2, rank), tmp_path, step=2, rank=rank, world_size=2)
    file_of(tmp_path, 2, 1).write_bytes(file_of(tmp_path, 2, 0).read_bytes())
    with pytest.raises(RuntimeError, match="holds step 2 of rank 0: it was renamed"):
        fs.load_state(stream_of(), tmp_path, step=2, rank=0, world_size=2)


# -- ranks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_rank_killed_between_the_others_renames_leaves_a_step_for_all(keep_last, tmp_path, caplog):
    for step in (1, 2, 3):
        for rank in (0, 1, 2):
            if (step, rank) == (3, 1):
                break  # killed before its rename; rank 2 had no time either
            fs.save_state(at_batch(step, rank), tmp_path, step=step, rank=rank, world_size=3, keep_last=keep_last)
    (tmp_path / f".{file_of(tmp_path, 2, 1).name.replace('02-rank', '03-rank')}.tmp").write_bytes(b"half of it")
    for rank in (0, 1, 2):
        resumed = stream_of(rank)
        assert fs.load_state(resumed, tmp_path, rank=rank, world_size=3) == 2
        assert next_ids(resumed)[0] == 32
    assert "state of step 3" in caplog.text
    assert "rank 1 of 3 did not save it" in caplog.text
    with pytest.raises(FileNotFoundError, match="step 3 .* cannot be loaded: rank 1 of 3 did not save it"):
        fs.load_state(stream_of(), tmp_path, step=3, rank=0, world_size=3)
    for rank in (0, 1, 2):  # the run goes on, and what was left half-written goes
        fs.save_state(at_batch(3, rank), tmp_path, step=3, rank=rank, world_size=3, keep_last=keep_last)
    assert not list(tmp_path.glob(".*"))
    assert fs.load_state(stream_of(), tmp_path, rank=0, world_size=3) == 3


def test_a_run_killed_before_its_first_whole_step_begins_anew(tmp_path, caplog):
    fs.save_state(at_batch(1), tmp_path, step=1, rank=0, world_size=2)
    assert fs.load_state(stream_of(), tmp_path, rank=0, world_size=2) is None
    assert "rank 1 of 2 did not save it" in caplog.text


def test_states_of_ranks_that_knew_nothing_of_each_other_are_not_put_together(tmp_path):
    for rank in (0, 1):
        fs.save_state(at_batch(1, rank), tmp_path, step=1, rank=rank, world_size=2)
    with pytest.raises(ValueError, match="2 states .* of 1 rank.* resume with 2"):
        fs.load_state(stream_of(), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step is -1"),
        ({"step": True}, "step is True"),
        ({"step": 1, "keep_last": 0}, "keep_last is 0"),
        ({"step": 1, "rank": 1}, "give both, or neither"),
        ({"step": 1, "rank": 2, "world_size": 2}, "a rank from 0 to 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fs.save_state(stream_of(), tmp_path, **arguments)


def test_a_state_of_another_configuration_is_refused_unless_that_is_meant(tmp_path):
    fs.save_state(at_batch(5), tmp_path, step=5)
    other = stream_of(seed=1)
    with pytest.raises(ValueError, match="seed=0"):
        fs.load_state(other, tmp_path)
    assert fs.load_state(other, tmp_path, strict=False) == 5


# -- torch.distributed.checkpoint ------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("mode", ["weight", "resample"])
@pytest.mark.parametrize("num", [0, 7])
def test_a_stream_goes_through_torchs_checkpoints_beside_a_model(mode, num, tmp_path):
    stream = at_batch(num, mode=mode)
    assert isinstance(stream, Stateful)
    model = torch.nn.Linear(2, 2)
    dcp.save({"model": model.state_dict(), "stream": stream}, checkpoint_id=tmp_path)
    expected = next(iter(stream)) if num == 0 else None
    for resumed in (stream_of(mode=mode), at_batch(9, mode=mode)):  # new, or in use
        loaded = torch.nn.Linear(2, 2).state_dict()
        dcp.load({"model": loaded, "stream": resumed}, checkpoint_id=tmp_path)
        assert torch.equal(loaded["weight"], model.weight)
        one = next(iter(resumed))
        whole = list(stream_of(mode=mode)) if expected is None else [expected]
        other = whole[num if expected is None else 0]
        assert one["id"].tolist() == other["id"].tolist()


TWO_RANKS = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
sys.path.insert(0, sys.argv[1])
import logging; logging.disable(logging.WARNING)
import flowstream as fs, test_checkpoint as tests
rank, folder = int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
stream = tests.at_batch(5, rank)
losses = stream.state_dict()["position"][0]["losses"]
dcp.save({f"stream {rank}": stream, "model": {"w": torch.ones(3)}}, checkpoint_id=folder + "/dcp")
resumed, model = tests.stream_of(rank), {"w": torch.zeros(3)}
dcp.load({f"stream {rank}": resumed, "model": model}, checkpoint_id=folder + "/dcp")
assert resumed.state_dict()["position"][0]["losses"].equal(losses)  # each rank has its own
assert tests.next_ids(resumed)[0] == 16 * 5 and model["w"].sum() == 3
fs.save_state(stream, folder + "/own", step=3)
dist.barrier()
resumed = tests.stream_of(rank)
assert fs.load_state(resumed, folder + "/own") == 3
assert resumed.state_dict()["position"][0]["losses"].equal(losses)
assert tests.next_ids(resumed)[0] == 16 * 5
dist.destroy_process_group()
"""


def test_each_of_two_ranks_gets_its_own_state_back(tmp_path):
    commands = [[sys.executable, "-c", TWO_RANKS, str(ROOT / "tests"), str(rank), str(tmp_path)] for rank in (0, 1)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert saved(tmp_path / "own") == [(3, 0), (3, 1)]
