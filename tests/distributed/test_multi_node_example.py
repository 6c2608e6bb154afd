"""The examples of many processes, under torchrun: ranks keep in step, each sample is seen once, runs go on."""

from __future__ import annotations

import itertools
import json
import re
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch
import webdataset as wds
from torchrun import ROOT, torchrun

import flowstream as fs

BATCH = 4


def run(
    name: str, *arguments: object, num_processes: int, folder: Path, is_forked: bool = True
) -> tuple[int, float, int]:
    """(steps, τ, samples) of the last line. What it trains on goes to the files `seen-…`."""
    printed, told = torchrun(
        ROOT / "tests" / "watched_example.py",
        *("seen", ROOT / "examples" / f"{name}.py", *arguments),
        num_processes=num_processes,
        folder=folder,
        is_forked=is_forked,
    )
    found = re.fullmatch(r"step (\d+): τ = ([\d.]+) nats, (\d+) samples scored\n", printed)
    assert found, f"{printed}\n{told}"
    tau = float(found[2])
    assert 5 < tau < 6  # of an untrained model over 256 bytes: log(256) = 5.545
    return int(found[1]), tau, int(found[3])


def seen(folder: Path) -> list[list[list[str]]]:
    """Of each rank, the texts of each step, over all runs: none in a padded batch."""
    logs = [map(json.loads, path.read_text().splitlines()) for path in sorted(folder.glob("seen-*"))]
    steps = [[(step["texts"], step["weights"]) for step in log] for log in logs]
    for texts, weights in itertools.chain.from_iterable(steps):
        assert sum(weight > 0 for weight in weights) == len(texts)
    return [[texts for texts, _ in rank] for rank in steps]


def flat(steps: list[list[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(steps))


def shares(folder: Path, num_processes: int) -> list[list[str]]:
    """The texts of each rank's shards, unequal as they were written."""
    shards = sorted(map(str, folder.glob("multi_node/part-*.tar")))
    samples = [wds.WebDataset(shards[rank::num_processes], shardshuffle=False) for rank in range(num_processes)]
    texts = [[sample["txt"][:128].hex() for sample in share] for share in samples]
    assert min(map(len, texts)) < 0.6 * max(map(len, texts))
    return texts


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_ranks_of_unequal_shards_keep_in_step_and_see_each_sample_once(num_processes, tmp_path):
    steps, _, num_samples = run("multi_node", num_processes=num_processes, folder=tmp_path)
    texts = shares(tmp_path, num_processes)
    ranks = seen(tmp_path)
    assert steps == max(-(-len(share) // BATCH) for share in texts)
    assert [len(rank) for rank in ranks] == [steps] * num_processes
    assert [Counter(flat(rank)) for rank in ranks] == list(map(Counter, texts))
    assert num_samples == sum(map(len, texts))


def test_stopped_multi_node_run_goes_on_from_its_last_checkpoint_to_the_same_model(tmp_path):
    folders = whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder, stops in ((whole, [1000]), (stopped, [19, 1000])):  # one rank has nothing left from step 17 on
        folder.mkdir()
        for stop in stops:
            settings = ("--steps", stop, "--save-every", 8)
            steps, *_ = found = run("multi_node", *settings, num_processes=2, folder=folder)
            assert steps <= stop
        ends = sorted(path.name for path in (folder / "multi_node").glob("model-*"))
        assert ends == [f"model-{at:08d}.pt" for at in (24, steps)]
        for at in (24, steps):
            assert len(list((folder / "multi_node" / "streams").glob(f"flowstream-{at:010d}-*.pt"))) == 2
    assert [Counter(flat(rank)) for rank in seen(stopped)] == list(map(Counter, shares(stopped, 2)))
    assert [len(rank) for rank in seen(stopped)] == [steps] * 2
    models = [torch.load(folder / "multi_node" / ends[-1])["model"] for folder in folders]
    torch.testing.assert_close(*models, rtol=0, atol=0)
    assert found[2] == sum(map(len, shares(stopped, 2)))


@pytest.mark.parametrize(
    ("num_processes", "stops"), [(2, (3, 5)), pytest.param(4, (6,), marks=pytest.mark.soak)], ids=["2", "4"]
)
def test_fsdp2_shares_the_samples_out_and_goes_on_from_its_sharded_checkpoint(num_processes, stops, tmp_path):
    for stop in stops:
        settings = ("--steps", stop, "--shard-over", 2)
        is_forked = num_processes == 2  # the soak's are started by torchrun's own command
        steps, _, _ = run("fsdp2", *settings, num_processes=num_processes, folder=tmp_path, is_forked=is_forked)
    assert steps == sum(stops)

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-c]*.py"))
    found = [re.findall('"""(.{20,}?)"""', file.read_text("utf-8"), re.DOTALL) for file in files]
    texts = [text.encode()[:128].hex() for text in flat(found)]
    order = list(fs.ElasticDistributedSampler(texts))
    ranks = seen(tmp_path)
    assert len(ranks) == num_processes
    for rank, of_rank in enumerate(ranks):
        assert flat(of_rank) == [texts[index] for index in order[rank::num_processes][: steps * BATCH]]
