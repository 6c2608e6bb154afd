"""Tensor-parallel peers read the same batches, and get the same weights, whatever their own losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from spawned import run_ranks
from torch import Tensor
from torch.distributed import init_device_mesh
from uneven import BATCH, Told, ids_of, plain, shard

import flowstream as fs

SIZES = [200, 61]


def noisy(batch: dict[str, Tensor]) -> Tensor:
    """Losses as a model split over devices gives them: each process its own rounding, here much larger."""
    noise = torch.rand(len(batch["loss"]), generator=torch.Generator().manual_seed(dist.get_rank()))
    return batch["loss"] + 0.3 * noise


CASES: list[dict[str, Any]] = [
    {"include": ("tau", "loss")},
    {"include": ("tau", "loss"), "normalize": True, "temperature": fs.WindowMedian()},
    {"include": ("tau", "loss"), "policy": fs.Permuted(fs.Flow())},
    {"include": ("tau", "loss"), "mode": "resample"},
    {"include": ("tau", "loss"), "mode": fs.Systematic(2.0)},
    {"policy": fs.Uniform()},
]


def of_mesh(num_dp: int, num_tp: int, sizes: list[int]) -> list[list[list[dict[str, Any]]]]:
    """What each case delivers on this process: a list of epochs."""
    mesh = init_device_mesh("cpu", (num_dp, num_tp), mesh_dim_names=("dp", "tp"))
    place = mesh["dp"].get_local_rank()
    found = []
    for settings in CASES:
        temperature = {"temperature": fs.RunningMedian(warmup_samples=40)} | settings
        loader = shard(place, sizes[place])
        scorer = fs.FunctionScorer(noisy)
        with (
            Told() as told,
            fs.FlowStream(loader, scorer, window=4, cache=None, process_group=mesh["dp"], **temperature) as stream,
        ):
            epochs = []
            for _ in range(2):
                epochs.append(
                    [
                        plain(batch) | {"loss": batch["flow_loss"].tolist() if "flow_loss" in batch else None}
                        for batch in stream
                    ]
                )
            assert not [text for text in told.messages if "same samples in the same order" in text]
        found.append(epochs)
    return found


def test_peers_get_the_same_batches_weights_and_draws():
    outcomes = run_ranks(of_mesh, 4, 2, 2, SIZES)
    assert [str(outcome.error) for outcome in outcomes if outcome.error] == []
    for number, settings in enumerate(CASES):
        found = [outcome.result[number] for outcome in outcomes]
        assert found[0] == found[1]
        assert found[2] == found[3]
        assert found[0] != found[2]
        for epoch in range(2):
            taus = [[batch["tau"] for batch in one[epoch]] for one in found]
            assert taus[0] == taus[2]
            for place, one in ((0, found[0]), (1, found[2])):
                ids = [i for batch in one[epoch] for i in batch["ids"]]
                if "mode" in settings:
                    assert ids
                    assert set(ids) <= set(ids_of(place, SIZES[place]))
                else:
                    assert len(one[epoch]) == -(-SIZES[0] // BATCH)
                    assert ids[: SIZES[place]] == ids_of(place, SIZES[place])


def test_peers_of_a_single_data_parallel_rank_agree_too():
    outcomes = run_ranks(of_mesh, 2, 1, 2, [90])
    assert [str(outcome.error) for outcome in outcomes if outcome.error] == []
    assert outcomes[0].result == outcomes[1].result


def failing(who: int) -> list[tuple[int, str, str]]:
    """One process' scorer raises at the 20th batch. Its peer waits for its losses until `timeout`."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    place = mesh["dp"].get_local_rank()

    def fail(batch: dict[str, Tensor]) -> Tensor:
        if dist.get_rank() == who and 160 in batch["id"] % 1_000_000:
            raise RuntimeError("the function failed")
        return batch["loss"]

    num, error = 0, ("", "")
    settings = {"temperature": fs.RunningMedian(warmup_samples=40), "timeout": 4.0}
    stream = fs.FlowStream(
        shard(place, 320), fs.FunctionScorer(fail), window=4, cache=None, process_group=mesh["dp"], **settings
    )
    try:
        for _ in stream:
            num += 1
    except Exception as raised:
        error = type(raised).__name__, str(raised)
    dist.barrier()  # nobody is told by a process that has ended, or by a stream that was closed
    return [(num, *error)]


def test_where_the_scorer_of_one_peer_fails_all_processes_end():
    who = 2  # the first of its peers, whose losses count
    outcomes = run_ranks(failing, 4, who, timeout=45)
    assert [str(outcome.error) for outcome in outcomes if outcome.error] == []
    found = [outcome.result[0] for outcome in outcomes]
    assert found[who][1:] == ("RuntimeError", "the function failed")
    assert {one[0] for one in found} == {found[who][0]}
    assert {one[1] for at, one in enumerate(found) if at != who} == {"RankError"}
