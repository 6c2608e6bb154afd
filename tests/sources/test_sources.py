"""Sources one by one: what they load, ask, tell and refuse."""

from __future__ import annotations

import datetime
import re
from typing import Any

import pytest
import torch
import webdataset as wds
from loader_recipes import (
    BATCH,
    NUM,
    RECIPES,
    Samples,
    Streamed,
    by_loss,
    generator,
    hugging_face,
    stream_over,
    take,
    tar,
    web_loader,
    write_shards,
)
from torch.utils.data import DataLoader

import flowstream as fs
from flowstream.sources import registry, source_of
from flowstream.sources.replay import replayed


class Counting(Samples):
    def __init__(self) -> None:
        self.asked: list[int] = []

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.asked.append(index)
        return super().__getitem__(index)


@pytest.fixture
def at(tmp_path):
    write_shards(tmp_path)
    return tmp_path


def after(loader: Any, num: int) -> dict[str, Any]:
    source = source_of(loader)
    source.start()
    for _ in range(num):
        source.pull()
    return source.snapshot()


def test_a_map_style_loader_loads_nothing_of_what_is_skipped_and_is_the_users_own_afterwards():
    samples = Counting()
    loader = DataLoader(samples, batch_size=BATCH, collate_fn=lambda rows: [row["id"].item() for row in rows])
    batch_sampler = loader.batch_sampler
    source = source_of(loader)
    source.restore(after(DataLoader(Samples(), batch_size=BATCH), 6))
    assert source.pull() == [24, 25, 26, 27]
    assert samples.asked == [24, 25, 26, 27]
    assert loader.batch_sampler is batch_sampler
    assert len(list(loader)) == 9


def test_running_persistent_workers_are_kept_and_replayed():
    def loader() -> DataLoader[Any]:
        arguments: dict[str, Any] = {"num_workers": 1, "persistent_workers": True, "generator": generator()}
        return DataLoader(Samples(), batch_size=BATCH, shuffle=True, **arguments)

    source, bare = source_of(loader()), loader()
    expected = [batch["id"] for batch in bare]
    source.start()
    for _ in range(4):
        source.pull()
    snapshot = source.snapshot()
    source.pull()
    source.restore(snapshot)
    assert torch.equal(source.pull()["id"], expected[4])


def test_a_subclass_with_an_iter_of_its_own_is_replayed():
    class EveryOther(DataLoader[Any]):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number % 2:
                    yield batch

    source = source_of(EveryOther(Samples(), batch_size=BATCH))
    source.restore(after(EveryOther(Samples(), batch_size=BATCH), 2))
    assert source.kind == "replay"
    assert source.pull()["id"].tolist() == [20, 21, 22, 23]


def test_the_users_generator_is_given_back():
    source = source_of(DataLoader(Samples(), batch_size=BATCH, shuffle=True))
    snapshot = after(DataLoader(Samples(), batch_size=BATCH, shuffle=True), 2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    source.restore(snapshot)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_batch_size_is_refused():
    with pytest.raises(ValueError, match="a loader of batch_size=4, this one has batch_size=5"):
        source_of(DataLoader(Samples(), batch_size=5)).restore(after(DataLoader(Samples(), batch_size=BATCH), 2))


class Loader:
    """A loader with a state, that counts how often it is asked for."""

    def __init__(self, odd: Any = None) -> None:
        self.num_asked, self.next, self.odd = 0, 0, odd
        self.kept = {"next": 0, "odd": odd}

    def __iter__(self):
        batches = list(DataLoader(Samples(), batch_size=2))
        while self.next < len(batches):
            self.next += 1
            yield batches[self.next - 1]
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        self.num_asked += 1
        self.kept["next"] = self.next  # the same dict every time, as litdata gives
        return self.kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


def test_a_loader_is_asked_for_its_state_once_a_window_and_once_an_epoch():
    loader = Loader()
    with stream_over(loader) as stream:
        for num, batch in enumerate(stream):
            assert batch["id"].tolist() == [2 * num, 2 * num + 1]
            stream.state_dict()
    assert loader.num_asked <= -(-17 // 3) + 2


def test_the_same_mutable_state_is_copied():
    whole = [batch["id"] for batch in stream_over(Loader())]
    with stream_over(Loader()) as first:
        taken = take(first, 7)
        state = first.state_dict()
        take(first, 5)
    with stream_over(Loader()) as second:
        second.load_state_dict(state)
        assert torch.equal(torch.cat([batch["id"] for batch in taken + list(second)]), torch.cat(whole))


def test_a_state_that_cannot_be_kept_is_told_once_and_replaced_by_a_count(caplog):
    odd = datetime.date(2026, 1, 1)
    with stream_over(Loader(odd)) as first:
        take(first, 7)
        state = first.state_dict()
        first.state_dict()
    assert caplog.text.count("state['odd'] is a datetime.date") == 1
    with stream_over(Loader(odd)) as second:
        second.load_state_dict(state)
        assert take(second, 1)[0]["id"].tolist() == [14, 15]


def test_whole_shards_are_skipped_and_the_pipeline_is_put_back(at):
    opened = []

    def counted(shards):
        for shard in shards:
            opened.append(shard["url"])
            yield shard

    def pipeline() -> Any:
        dataset = tar(at)
        dataset.pipeline.insert(-4, counted)
        return web_loader(dataset)

    snapshot = after(pipeline(), 6)
    loader = pipeline()
    source, stages = source_of(loader), list(loader.pipeline[0].dataset.pipeline)
    source.restore(snapshot)
    assert source.pull()["id"].tolist() == [24, 25, 26, 27]
    assert loader.pipeline[0].dataset.pipeline == stages


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda at: tar(at).shuffle(8), r"detshuffle\(8, seed=…\)"),
        (
            lambda at: wds.DataPipeline(wds.ResampledShards(str(at / "part-000.tar")), wds.tarfile_to_samples()),
            "deterministic=True",
        ),
        (lambda at: tar(at).compose(wds.rsample(0.5)), "select"),
        (lambda at: DataLoader(Samples(), shuffle=True), r"generator=torch.Generator"),
        (lambda at: DataLoader(Samples(), num_workers=2, in_order=False), "in_order=True"),
    ],
)
def test_what_is_not_exact_is_told_once_with_the_remedy(make, remedy, at, caplog):
    stream = fs.FlowStream(make(at), by_loss)
    assert not caplog.text
    stream.state_dict()
    stream.state_dict()
    (record,) = caplog.records
    assert re.search(remedy, record.getMessage())


def test_a_shuffle_of_hugging_face_without_a_seed_is_refused_where_its_order_is_another():
    def dataset() -> Any:
        return hugging_face(buffer_size=8).batch(BATCH).with_format("torch")

    with stream_over(dataset()) as first:
        take(first, 4)
    with stream_over(dataset()) as second:
        second.load_state_dict(first.state_dict())
        with pytest.raises(ValueError, match="seed"):
            take(second, 1)


def test_a_long_replay_tells_its_rate_and_the_time_to_go(monkeypatch, caplog):
    monkeypatch.setattr("flowstream.sources.counted._TELL_EVERY", 0.0)
    replayed(range(50)).restore(after(iter(range(50)), 40))
    assert "replaying the loader: 20 of 40 batches" in caplog.text
    assert "s to go" in caplog.text


def test_a_state_of_another_kind_of_loader_is_counted_and_that_is_told(caplog):
    with stream_over(list(DataLoader(Samples(), batch_size=BATCH))) as first:
        take(first, 4)
    with stream_over(DataLoader(Samples(), batch_size=BATCH)) as second:
        second.load_state_dict(first.state_dict())
        assert take(second, 1)[0]["id"].tolist() == [16, 17, 18, 19]
    assert "resumed by index, this one is resumed by sampler" in caplog.text


def test_a_source_of_the_users_is_registered_by_class_name_or_predicate(monkeypatch):
    monkeypatch.setattr(registry, "_by_class", dict(registry._by_class))
    monkeypatch.setattr(registry, "_by_predicate", list(registry._by_predicate))

    class Mine(Streamed):
        pass

    class Own:
        kind = "own"

        def __init__(self, loader: Any) -> None: ...

    assert source_of(Mine()).kind == "replay"
    fs.register_source(lambda loader: isinstance(loader, Mine), Own)
    assert source_of(Mine()).kind == "own"
    fs.register_source(f"{Loader.__module__}.{Loader.__qualname__}", Own)
    assert source_of(Loader()).kind == "own"
    fs.register_source(Streamed, replayed)
    assert source_of(Mine()).kind == "replay"
    with pytest.raises(ValueError, match="give a class"):
        fs.register_source(3, Own)


def test_every_recipe_covers_all_samples(at):
    for name in ("`DataLoader`, in order", "`WebLoader`", "`torchdata.nodes.Loader`"):
        ids = [i for batch in RECIPES[name].make(at) for i in batch["id"].tolist()]
        assert sorted(ids) == list(range(NUM))
