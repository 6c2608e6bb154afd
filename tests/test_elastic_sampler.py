"""The elastic sampler: every sample once, in one order for any number of ranks, and taken up by another number."""

from __future__ import annotations

import doctest
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resuming import take, through_a_file
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import flowstream as fs
from flowstream import elastic_sampler
from flowstream.distributed.world import World
from flowstream.elastic_sampler import ElasticDistributedSampler, consumed, reshardable

NUM, BATCH = 43, 4


class Samples(Dataset[Any]):
    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"loss": torch.tensor(0.5 + (index * 37 % 11) / 4), "id": torch.tensor(index)}


def samplers(num: int, world_size: int, **settings: Any) -> list[ElasticDistributedSampler]:
    """Those of all ranks."""
    worlds = [World(rank, world_size, tuple(range(world_size))) for rank in range(world_size)]
    return [ElasticDistributedSampler(num, process_group=world, **settings) for world in worlds]


def dealt(order: list[int], offset: int, world_size: int) -> list[list[int]]:
    """What each rank gets of an order from `offset` on, dealt out as cards are."""
    hands: list[list[int]] = [[] for _ in range(world_size)]
    for position in range(offset, len(order)):
        hands[(position - offset) % world_size].append(order[position])
    return hands


def in_batches(indices: list[int], batch_size: int) -> list[list[int]]:
    return [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]


# -- the law ---------------------------------------------------------------------------------------


@st.composite
def chains(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int]]]:
    """(samples, batch size, (world size, batches until it stops) of each run but the last)."""
    num, batch_size = draw(st.integers(0, 200)), draw(st.integers(1, 9))
    stop = st.tuples(st.integers(1, 8), st.integers(0, 12))
    return num, batch_size, draw(st.lists(stop, min_size=1, max_size=5))


@settings(max_examples=150)
@given(chains(), st.integers(0, 2**40), st.integers(0, 5), st.booleans(), st.integers(1, 8))
def test_over_a_chain_of_world_sizes_every_sample_comes_once(chain, seed, epoch, shuffle, last_world_size):
    num, batch_size, stops = chain
    (whole,) = samplers(num, 1, seed=seed, shuffle=shuffle)
    whole.set_epoch(epoch)
    order = list(whole)
    assert sorted(order) == list(range(num))
    seen: list[int] = []
    offset = 0
    for world_size, num_batches in [*stops, (last_world_size, num)]:
        ranks = samplers(num, world_size, seed=seed, shuffle=shuffle)
        for sampler, hand in zip(ranks, dealt(order, offset, world_size), strict=True):
            sampler.start_at(epoch, offset)
            assert list(sampler) == hand
            assert len(sampler) == len(hand)
            delivered = list(BatchSampler(sampler, batch_size, drop_last=False))[:num_batches]
            assert delivered == in_batches(hand, batch_size)[:num_batches]
            seen += [index for batch in delivered for index in batch]
        offset = consumed(offset, world_size, batch_size, num_batches, num)
        assert sorted(seen) == sorted(order[:offset])
    assert offset == num
    assert Counter(seen) == Counter(range(num))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_of_4_then_2_then_3_ranks_lose_and_repeat_nothing(num_workers):
    seen: list[int] = []
    offset = 0
    for world_size, num_batches in ((4, 1), (2, 2), (3, NUM)):
        for sampler in samplers(NUM, world_size):
            loader = DataLoader(Samples(), BATCH, sampler=sampler, num_workers=num_workers)
            found = reshardable(loader)
            assert found is sampler
            found.start_at(3, offset)
            batches = [batch["id"].tolist() for batch in loader]
            assert len(batches) == len(loader)
            seen += [index for batch in batches[:num_batches] for index in batch]
        offset = consumed(offset, world_size, BATCH, num_batches, NUM)
    assert sorted(seen) == list(range(NUM))


def test_ranks_differ_by_one_sample_at_most_where_torch_repeats_or_drops():
    lengths = [len(sampler) for sampler in samplers(10, 4)]
    assert lengths == [3, 3, 2, 2]
    for drop_last, total in ((False, 12), (True, 8)):
        torchs = [DistributedSampler(range(10), 4, rank, drop_last=drop_last) for rank in range(4)]  # type: ignore[arg-type]
        assert sum(map(len, torchs)) == total
    assert [len(list(sampler)) for sampler in samplers(2, 4)] == [1, 1, 0, 0]


# -- the order -------------------------------------------------------------------------------------


def orders(**settings: Any) -> list[list[int]]:
    sampler = ElasticDistributedSampler(50, **settings)
    out = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        out.append(list(sampler))
    return out


def test_an_order_follows_from_seed_and_epoch_alone():
    assert orders() == orders()
    assert len({tuple(order) for seed in (0, 1, 2) for order in orders(seed=seed)}) == 9
    assert orders(shuffle=False) == [list(range(50))] * 3
    # Written down, since states of older runs are to be taken up again.
    assert list(ElasticDistributedSampler(8)) == [7, 4, 6, 2, 0, 1, 5, 3]


def test_sampling_draws_on_no_generator_of_the_users():
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    orders()
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == before[2]).all()


def test_an_offset_holds_for_its_epoch_and_no_other():
    (sampler,) = samplers(20, 1)
    sampler.start_at(2, 15)
    assert (sampler.epoch, sampler.offset, len(sampler)) == (2, 15, 5)
    rest = list(sampler)
    sampler.set_epoch(2)  # the same epoch, named once more
    assert (sampler.offset, list(sampler)) == (15, rest)
    sampler.set_epoch(3)
    assert (sampler.offset, len(sampler)) == (0, 20)
    sampler.set_epoch(2)
    assert (sampler.offset, list(sampler)[15:]) == (0, rest)
    sampler.start_at(2, 20)
    assert (len(sampler), list(sampler)) == (0, [])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ElasticDistributedSampler(-1), "the number of samples is -1"),
        (lambda: ElasticDistributedSampler(True), "got a bool, which has no length"),
        (lambda: ElasticDistributedSampler(iter(range(5))), "got a range_iterator, which has no length"),  # type: ignore[arg-type]
        (lambda: ElasticDistributedSampler(5).start_at(0, 6), "offset is 6, but the data set has 5 samples"),
        (lambda: ElasticDistributedSampler(5).start_at(-1, 0), "epoch is -1"),
        (lambda: consumed(0, 0, 1, 1, 5), "world_size is 0"),
        (lambda: consumed(6, 1, 1, 1, 5), "num_samples is 5: give a whole number of at least 6"),
    ],
)
def test_numbers_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_docstring_examples_run():
    assert doctest.testmod(elastic_sampler).failed == 0


# -- the loader over it, and the stream ------------------------------------------------------------


class Reversed(DataLoader[Any]):
    def __iter__(self) -> Any:
        return reversed(list(super().__iter__()))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda at: DataLoader(Samples(), BATCH, sampler=at), True),
        (lambda at: DataLoader(Samples(), BATCH, sampler=at, drop_last=True, num_workers=2), True),
        (lambda at: DataLoader(Samples(), BATCH, sampler=at, in_order=False), True),  # no worker, no other order
        (lambda at: DataLoader(Samples(), BATCH, sampler=at, num_workers=2, in_order=False), False),
        (lambda at: DataLoader(Samples(), batch_size=None, sampler=at), False),
        (lambda at: DataLoader(Samples(), batch_sampler=BatchSampler(at, BATCH, True)), False),
        (lambda at: DataLoader(Samples(), BATCH), False),
        (lambda at: Reversed(Samples(), BATCH, sampler=at), False),
        (lambda at: StatefulDataLoader(Samples(), BATCH, sampler=at), False),
        (lambda at: [1, 2, 3], False),
    ],
)
def test_reshardable_loaders_are_those_that_deliver_in_the_samplers_order(make, expected):
    sampler = ElasticDistributedSampler(NUM)
    assert reshardable(make(sampler)) is (sampler if expected else None)


by_loss = fs.FunctionScorer(lambda batch: batch["loss"], name="by loss")


def stream_of(world: World, num_workers: int = 0) -> fs.FlowStream:
    sampler = ElasticDistributedSampler(NUM, seed=5, process_group=world)
    loader = DataLoader(Samples(), BATCH, sampler=sampler, num_workers=num_workers)
    temperature = fs.RunningMedian(warmup_samples=12)
    return fs.FlowStream(loader, by_loss, window=3, temperature=temperature, include=("tau", "loss"), cache=None)


def same(ours: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    pairs = zip(ours, expected, strict=True)
    return all(one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one) for one, two in pairs)


@pytest.mark.parametrize(
    ("world", "num_workers", "stops"),
    [
        (World(), 0, range(28)),
        (World(1, 2, (0, 1)), 0, range(14)),
        (World(), 2, (5, 14)),  # in the second window; in the second epoch
    ],
)
def test_a_stream_over_it_resumes_exactly_in_any_epoch(world, num_workers, stops):
    stream = stream_of(world, num_workers)
    assert (stream._reader._source.kind, stream._reader.caveat) == ("sampler", "")
    with stream:
        per_epoch = len(stream)
        whole = take(stream, max(stops) + 4)
    epochs = [torch.cat([batch["id"] for batch in whole[i : i + per_epoch]]) for i in (0, per_epoch)]
    assert not torch.equal(epochs[0][:20], epochs[1][:20])
    for stop in stops:
        with stream_of(world, num_workers) as first:
            take(first, stop)
            state = through_a_file(first.state_dict())
        with stream_of(world, num_workers) as second:
            second.load_state_dict(state)
            assert same(take(second, 4), whole[stop : stop + 4])


def test_a_stream_begins_at_the_samplers_offset_and_its_next_epoch_at_the_beginning():
    stream = stream_of(World())
    sampler = reshardable(stream._loader)
    assert sampler is not None
    order = list(sampler)
    sampler.start_at(0, 30)
    assert [i for batch in stream for i in batch["id"].tolist()] == order[30:]
    assert sorted(i for batch in stream for i in batch["id"].tolist()) == list(range(NUM))
