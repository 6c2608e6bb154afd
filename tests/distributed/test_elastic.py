"""A run that goes on with another number of ranks: nothing lost, nothing repeated, τ and counters kept."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from spawned import run_ranks
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import flowstream as fs

NUM_SAMPLES, BATCH = 1003, 4

by_key = fs.FunctionScorer(lambda batch: batch["loss"], name="by key")


def all_losses() -> Tensor:
    return torch._standard_gamma(torch.full((NUM_SAMPLES,), 2.0), generator=torch.Generator().manual_seed(5))


class Samples(Dataset[dict[str, Any]]):
    def __init__(self) -> None:
        self.losses = all_losses()

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"loss": self.losses[index], "id": index}


def stream_over(workers: int = 0, **settings: Any) -> fs.FlowStream:
    samples = Samples()
    loader = DataLoader(
        samples, batch_size=BATCH, sampler=fs.ElasticDistributedSampler(samples, seed=3), num_workers=workers
    )
    settings = {"window": 8, "temperature": fs.RunningMedian(warmup_samples=64), "include": ("tau",)} | settings
    return fs.FlowStream(loader, by_key, cache=None, **settings)


def go_on(folder: str, num_batches: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Go on from the newest step, deliver some batches (or all), save."""
    with stream_over(**settings) as stream:
        step = fs.load_state(stream, folder) or 0
        before = stream.metrics()
        epoch, ids, taus = stream.epoch, [], []
        iterator = iter(stream)
        while len(ids) != num_batches and (batch := next(iterator, None)) is not None:
            ids.append([i for i, weight in zip(batch["id"].tolist(), batch["flow_weight"], strict=True) if weight])
            taus.append(float(batch["flow_tau"]))
        fs.save_state(stream, folder, step=step + len(ids))
        torch.distributed.barrier()
        return {"step": step, "epoch": epoch, "ids": ids, "taus": taus, "before": before, "after": stream.metrics()}


@pytest.mark.parametrize("stops", [(40, 45), (3, 1), (16, 8)])
def test_from_4_to_2_to_3_ranks_no_sample_is_lost_or_repeated(tmp_path, stops):
    lives = [
        [outcome.result for outcome in run_ranks(go_on, world_size, str(tmp_path), num, {})]
        for world_size, num in zip((4, 2, 3), (*stops, -1), strict=True)
    ]
    assert [ranks[0]["step"] for ranks in lives] == [0, stops[0], sum(stops)]
    assert all(rank["epoch"] == 0 for ranks in lives for rank in ranks)
    seen = [i for ranks in lives for rank in ranks for batch in rank["ids"] for i in batch]
    assert sorted(seen) == list(range(NUM_SAMPLES))
    # The order of the epoch is one, whoever reads it: each life took what came next.
    order = list(fs.ElasticDistributedSampler(NUM_SAMPLES, seed=3))
    at = 0
    for ranks in lives:
        now = sorted(i for rank in ranks for batch in rank["ids"] for i in batch)
        assert now == sorted(order[at : at + len(now)])
        delivered = all_losses()[order[:at]]
        if at:  # what was learned is of what was delivered: no more, no less
            assert ranks[0]["taus"][0] == pytest.approx(np.median(delivered), rel=0.002)
            assert ranks[0]["before"]["flow/samples_seen"] == at
            assert sum(rank["before"]["flow/samples_emitted"] for rank in ranks) == at
            assert len({rank["taus"][0].hex() for rank in ranks}) == 1
        at += len(now)
    assert lives[-1][0]["after"]["flow/samples_seen"] == NUM_SAMPLES


def two_epochs(folder: str) -> list[tuple[int, list[int]]]:
    with stream_over() as stream:
        fs.load_state(stream, folder)
        found = []
        for _ in range(2):
            ids = [i for batch in stream for i in batch["id"][batch["flow_weight"] > 0].tolist()]
            found.append((stream.epoch, ids))
        return found


def test_the_epoch_after_one_taken_up_by_other_ranks_is_whole(tmp_path):
    before = [outcome.result for outcome in run_ranks(go_on, 3, str(tmp_path), 30, {})]
    ranks = [outcome.result for outcome in run_ranks(two_epochs, 2, str(tmp_path))]
    assert [epoch for epoch, _ in ranks[0]] == [0, 1]
    first = [i for rank in before for batch in rank["ids"] for i in batch]
    rest, whole = ([i for rank in ranks for i in rank[number][1]] for number in (0, 1))
    assert sorted(first + rest) == list(range(NUM_SAMPLES))
    assert sorted(whole) == list(range(NUM_SAMPLES))


def within_an_entered_epoch(folder: str) -> list[list[int]]:
    """Entered by other ranks, saved again by as many, and resumed exactly."""
    with stream_over() as stream:
        fs.load_state(stream, folder)
        iterator = iter(stream)
        for _ in range(11):
            next(iterator)
        state = copy.deepcopy(stream.state_dict())
        expected = [batch["id"].tolist() for batch in iterator]
    with stream_over() as resumed:
        resumed.load_state_dict(state)
        found = [batch["id"].tolist() for batch in resumed]
    assert found == expected
    return found


def test_a_state_taken_in_an_epoch_that_others_began_resumes_exactly(tmp_path):
    run_ranks(go_on, 1, str(tmp_path), 30, {})
    assert all(outcome.result for outcome in run_ranks(within_an_entered_epoch, 2, str(tmp_path)))


def with_cache(folder: str, num_batches: int) -> dict[str, Any]:
    """Scored by a model, whose losses a cache on disk keeps."""
    torch.manual_seed(0)
    samples = [(torch.randn(6, generator=torch.Generator().manual_seed(i)), i % 3) for i in range(240)]
    sampler = fs.ElasticDistributedSampler(samples, seed=1)
    loader = DataLoader(samples, batch_size=BATCH, sampler=sampler)
    scorer = fs.ClassifierScorer(torch.nn.Linear(6, 3))
    settings = {"window": 8, "temperature": fs.RunningMedian(warmup_samples=64), "cache": f"{folder}/losses"}
    with fs.FlowStream(loader, scorer, **settings) as stream:
        step = fs.load_state(stream, folder) or 0
        iterator = iter(stream)
        num = sum(1 for _ in zip(range(num_batches), iterator, strict=False))
        fs.save_state(stream, folder, step=step + num)
        torch.distributed.barrier()
        return stream.metrics()


def test_another_number_of_ranks_finds_the_losses_of_the_last_in_the_cache(tmp_path):
    first = [outcome.result for outcome in run_ranks(with_cache, 3, str(tmp_path), 10**6)]
    second = [outcome.result for outcome in run_ranks(with_cache, 2, str(tmp_path), 10)]
    assert all(metrics["flow/cache_hit_rate"] == 0 for metrics in first)
    assert all(metrics["flow/cache_hit_rate"] == 1 for metrics in second)
    assert second[0]["flow/samples_seen"] >= first[0]["flow/samples_seen"] + 2 * 10 * BATCH


def state_of(mode: str, elastic: bool, num_batches: int) -> bytes:
    losses = all_losses()[torch.distributed.get_rank() :: 2]
    plain = [{"loss": part, "id": torch.arange(len(part))} for part in losses.split(BATCH)]
    if elastic:
        stream = stream_over(mode=mode)
    else:
        stream = fs.FlowStream(plain, by_key, mode=mode, window=8, cache=None)
    with stream:
        for _ in zip(range(num_batches), stream, strict=False):
            pass
        buffer = io.BytesIO()
        torch.save(stream.state_dict(), buffer)
        return buffer.getvalue()


def states_of(*args: Any) -> list[dict[str, Any]]:
    """Of two ranks."""
    found = [outcome.result for outcome in run_ranks(state_of, 2, *args)]
    return [torch.load(io.BytesIO(saved), weights_only=True) for saved in found]


def plain_stream(mode: str) -> fs.FlowStream:
    batches = [{"loss": part, "id": torch.arange(len(part))} for part in all_losses().split(BATCH)]
    return fs.FlowStream(batches, by_key, mode=mode, window=8, cache=None)


def test_elsewhere_the_error_says_what_to_do_and_between_epochs_all_loads():
    within = states_of("weight", False, 20)
    with pytest.raises(ValueError, match="the state is one of 2 ranks, this run has 1.*fs.merge_states"):
        plain_stream("weight").load_state_dict(within[0])
    with pytest.raises(ValueError, match="ElasticDistributedSampler.*strict=False"):
        fs.merge_states(within)
    with pytest.raises(ValueError, match="1 states were given.*of 2 ranks"):
        fs.merge_states(within[:1])
    stream = plain_stream("weight")
    stream.load_state_dict(fs.merge_states(within, strict=False))
    assert stream.epoch == 0
    assert stream.metrics()["flow/tau"] != stream.metrics()["flow/tau"]  # the warm-up was not over
    assert len(list(stream)) == -(-NUM_SAMPLES // BATCH)
    after = states_of("weight", False, 10**6)
    stream = plain_stream("weight")
    stream.load_state_dict(fs.merge_states(after))
    assert stream.epoch == 1
    assert stream.metrics()["flow/samples_seen"] == NUM_SAMPLES
    first = next(iter(stream))
    assert first["flow_weight"].shape == (BATCH,)
    assert stream.metrics()["flow/tau"] == pytest.approx(np.median(all_losses()), rel=0.002)


def test_a_resampled_epoch_is_not_taken_up_by_other_ranks():
    states = states_of("resample", True, 12)
    with pytest.raises(ValueError, match="cannot go on in the same place"):
        fs.merge_states(states)


def test_states_of_different_steps_are_not_put_together():
    one, other = (states_of("weight", True, num) for num in (12, 13))
    with pytest.raises(ValueError, match="of different steps"):
        fs.merge_states([one[0], other[1]])
