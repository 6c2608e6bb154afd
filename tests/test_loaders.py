"""FlowStream over real loaders: nothing is asked of the user but the loader and the scorer."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import webdataset as wds
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import flowstream as fs

NUM = 203
LOSSES = np.random.default_rng(0).gamma(2.0, 1.0, NUM).astype(np.float32)


class Samples(Dataset):
    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"loss": torch.tensor(LOSSES[index]), "id": index, "name": f"sample {index}"}


class Streamed(IterableDataset):
    """Each worker its share."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(first, NUM, step):
            yield Samples()[index]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four real tar shards."""
    folder = tmp_path_factory.mktemp("shards")
    with wds.ShardWriter(str(folder / "part-%03d.tar"), maxcount=NUM // 4 + 1, verbose=False) as writer:
        for index in range(NUM):
            tokens = io.BytesIO()
            np.save(tokens, np.full(3 + index % 5, index))
            writer.write({"__key__": f"{index:05d}", "loss.json": float(LOSSES[index]), "ids.npy": tokens.getvalue()})
    assert len(list(Path(folder).glob("*.tar"))) == 4
    return str(folder / "part-{000..003}.tar")


def decoded(sample: dict[str, Any]) -> dict[str, Any]:
    return {
        "loss": torch.tensor(sample["loss.json"]),
        "id": torch.tensor(int(sample["__key__"])),
        "name": f"sample {int(sample['__key__'])}",
    }


def tar_samples(shards: str) -> wds.WebDataset:
    return wds.WebDataset(shards, shardshuffle=False, empty_check=False).decode().map(decoded)


def web_loader(shards: str, num_workers: int = 0) -> wds.WebLoader:
    return wds.WebLoader(tar_samples(shards).batched(16), batch_size=None, num_workers=num_workers)


def hugging_face() -> datasets.IterableDataset:
    table = {"loss": LOSSES, "id": list(range(NUM)), "name": [f"sample {i}" for i in range(NUM)]}
    return datasets.Dataset.from_dict(table).to_iterable_dataset(num_shards=4).with_format("torch")


LOADERS: dict[str, Callable[[str], Iterable[Any]]] = {
    "map-style, 0 workers": lambda shards: DataLoader(Samples(), batch_size=16),
    "map-style, 2 workers": lambda shards: DataLoader(Samples(), batch_size=16, num_workers=2),
    "iterable, 0 workers": lambda shards: DataLoader(Streamed(), batch_size=16),
    "iterable, 2 workers": lambda shards: DataLoader(Streamed(), batch_size=16, num_workers=2),
    "WebLoader, 0 workers": web_loader,
    "WebLoader, 2 workers": lambda shards: web_loader(shards, 2),
    "WebDataset.batched": lambda shards: tar_samples(shards).batched(16),
    "HF IterableDataset": lambda shards: hugging_face().batch(16),
    "HF IterableDataset in a DataLoader": lambda shards: DataLoader(hugging_face(), batch_size=16),
    "StatefulDataLoader, 0 workers": lambda shards: StatefulDataLoader(Samples(), batch_size=16),
    "StatefulDataLoader, 2 workers": lambda shards: StatefulDataLoader(Samples(), batch_size=16, num_workers=2),
    "generator": lambda shards: (batch for batch in DataLoader(Samples(), batch_size=16)),
    "list": lambda shards: list(DataLoader(Samples(), batch_size=16)),
}
by_loss = fs.FunctionScorer(lambda batch: batch["loss"])


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_is_weighted_in_its_own_order(name, shards):
    bare = [batch["id"] for batch in LOADERS[name](shards)]
    temperature = fs.RunningMedian(warmup_samples=64)
    out = list(fs.FlowStream(LOADERS[name](shards), by_loss, window=2, temperature=temperature, include=("tau",)))
    assert [batch["id"].tolist() for batch in out] == [torch.as_tensor(ids).tolist() for ids in bare]
    assert sorted(i for batch in out for i in batch["id"].tolist()) == list(range(NUM))
    for batch in out:
        expected = np.exp(-LOSSES[batch["id"].tolist()] / float(batch["flow_tau"]))
        np.testing.assert_allclose(batch["flow_weight"].numpy(), expected, atol=1e-6)
        assert list(batch["name"]) == [f"sample {i}" for i in batch["id"].tolist()]


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_is_resampled_and_fields_travel_with_their_sample(name, shards):
    out = list(fs.FlowStream(LOADERS[name](shards), by_loss, window=2, mode="resample"))
    ids = [i for batch in out for i in batch["id"].tolist()]
    assert 40 < len(ids) == len(set(ids)) < 130
    for batch in out:
        assert list(batch["name"]) == [f"sample {i}" for i in batch["id"].tolist()]
        np.testing.assert_array_equal(batch["loss"].numpy(), LOSSES[batch["id"].tolist()])


def test_tuples_of_a_webdataset_gain_an_element(shards):
    def to_tuple(sample):
        return sample["loss"], sample["name"]

    pipeline = tar_samples(shards).map(to_tuple).batched(16)
    scorer = fs.FunctionScorer(lambda batch: torch.as_tensor(batch[0]))
    out = list(fs.FlowStream(pipeline, scorer, temperature=fs.FixedTemperature(1.0)))
    for loss, names, weight in out:
        assert len(names) == len(weight)
        torch.testing.assert_close(weight, torch.exp(-torch.as_tensor(loss)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stage_of_a_pipeline_gives_what_the_stream_around_it_gives(shards, num_workers):
    settings: dict[str, Any] = {"window": 2, "temperature": fs.RunningMedian(warmup_samples=64), "include": ("tau",)}
    around = list(fs.FlowStream(web_loader(shards, num_workers), by_loss, **settings))
    stage = fs.stage(by_loss, **settings)
    pipeline = web_loader(shards, num_workers).compose(stage)
    inside = list(pipeline)
    for one, other in zip(inside, around, strict=True):
        assert torch.equal(one["id"], other["id"])
        assert torch.equal(one["flow_weight"], other["flow_weight"])
    assert len(list(pipeline)) == len(inside)  # τ goes on from epoch to epoch
    assert stage.stream.epoch == 1
    assert stage.stream.metrics()["flow/samples_seen"] == 2 * NUM


def test_a_stage_may_be_followed_by_others(shards):
    doubled = web_loader(shards).compose(fs.stage(by_loss)).map(lambda batch: batch | {"w2": 2 * batch["flow_weight"]})
    for batch in doubled:
        assert torch.equal(batch["w2"], 2 * batch["flow_weight"])


def test_a_text_data_set_of_tar_shards_is_scored_by_a_language_model(shards, tiny):
    def with_ids(sample):
        return torch.as_tensor(sample["ids.npy"] % 97)

    def collate(rows):
        width = max(map(len, rows))
        ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
        mask = torch.stack([torch.arange(width) < len(row) for row in rows]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    pipeline = wds.WebDataset(shards, shardshuffle=False, empty_check=False).decode().map(with_ids)
    loader = wds.WebLoader(pipeline.batched(8, collation_fn=collate), batch_size=None)
    for mode in ("weight", "resample"):
        stream = fs.FlowStream(loader, fs.CausalLMScorer(tiny("llama")), mode=mode, window=4)
        rows = [
            tuple(ids[mask.bool()].tolist())
            for b in stream
            for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
        ]
        assert all(len(set(row)) == 1 for row in rows)
        assert len(rows) == NUM if mode == "weight" else 0 < len(rows) < NUM
