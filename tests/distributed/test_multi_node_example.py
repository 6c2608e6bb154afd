"""The examples of many processes, under torchrun: ranks keep in step, each sample is seen once, runs go on."""

from __future__ import annotations

import itertools
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import webdataset as wds
from torchrun import ROOT, torchrun

import flowstream as fs

WATCHED = ROOT / "tests" / "watched_example.py"
BATCH = 4


def run(
    name: str, *arguments: object, num_processes: int, folder: Path, is_forked: bool = True
) -> tuple[int, float, int]:
    """(steps, τ, samples) of the last line. What it trains on goes to the files `seen-…`."""
    printed, told = torchrun(
        WATCHED,
        *("seen", ROOT / "examples" / f"{name}.py", *arguments),
        num_processes=num_processes,
        folder=folder,
        is_forked=is_forked,
    )
    found = re.fullmatch(r"step (\d+): τ = ([\d.]+) nats, (\d+) samples scored\n", printed)
    assert found, f"{printed}\n{told}"
    return int(found[1]), float(found[2]), int(found[3])


def seen(folder: Path) -> list[list[list[str]]]:
    """Of each rank, the texts of each step, over all runs."""
    logs = [path.read_text().splitlines() for path in sorted(folder.glob("seen-*"))]
    return [[json.loads(line)["texts"] for line in lines] for lines in logs]


def texts_of(shards: list[Path]) -> list[str]:
    samples = wds.WebDataset(list(map(str, shards)), shardshuffle=False)
    return [sample["txt"][:128].hex() for sample in samples]


def flat(steps: Iterable[list[str]]) -> Counter[str]:
    return Counter(itertools.chain.from_iterable(steps))


@pytest.mark.parametrize(("num_processes", "stops"), [(2, (27, 1000)), (4, (1000,))], ids=["2", "4"])
def test_ranks_of_unequal_shards_keep_in_step_and_see_each_sample_once(num_processes, stops, tmp_path):
    for stop in stops:
        settings = ("--steps", stop, "--save-every", 8)
        steps, tau, num_samples = run(
            "multi_node", *settings, num_processes=num_processes, folder=tmp_path, is_forked=num_processes == 2
        )
        assert steps <= stop
    shards = sorted(tmp_path.glob("multi_node/part-*.tar"))
    texts = [texts_of(shards[rank::num_processes]) for rank in range(num_processes)]
    assert min(map(len, texts)) < 0.6 * max(map(len, texts))
    assert steps == max(-(-len(rows) // BATCH) for rows in texts)
    assert num_samples == sum(map(len, texts))
    assert 5 < tau < 6  # of an untrained model over 256 bytes: log(256) = 5.545
    ranks = seen(tmp_path)
    assert [len(rank) for rank in ranks] == [steps] * num_processes
    assert [flat(rank) for rank in ranks] == [Counter(rows) for rows in texts]

    # Of the last two steps that were saved, the model and the streams of all ranks.
    saved = [int(path.stem.split("-")[1]) for path in sorted(tmp_path.glob("multi_node/model-*.pt"))]
    streams = sorted(path.name.split("-") for path in tmp_path.glob("multi_node/streams/*.pt"))
    assert len(saved) == 2
    assert saved[-1] == steps
    assert {(step, rank) for step in saved for rank in range(num_processes)} <= {
        (int(step), int(rank)) for _, step, _, rank, _, _ in streams
    }


@pytest.mark.parametrize(("num_processes", "shard_over", "stops"), [(2, 2, (3, 5)), (4, 2, (6,))], ids=["2", "4"])
def test_fsdp2_goes_on_from_its_sharded_checkpoint(num_processes, shard_over, stops, tmp_path):
    total = 0
    for stop in stops:
        settings = ("--steps", stop, "--shard-over", shard_over)
        steps, tau, num_samples = run("fsdp2", *settings, num_processes=num_processes, folder=tmp_path)
        total += stop
        assert steps == total
    assert num_samples >= steps * BATCH * num_processes
    assert 5 < tau < 6

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-c]*.py"))
    found = [re.findall('"""(.{20,}?)"""', file.read_text("utf-8"), re.DOTALL) for file in files]
    texts = [text.encode()[:128].hex() for text in itertools.chain.from_iterable(found)]
    order = list(fs.ElasticDistributedSampler(texts))
    for rank, steps_of_rank in enumerate(seen(tmp_path)):
        share = order[rank::num_processes][: steps * BATCH]
        assert [text for step in steps_of_rank for text in step] == [texts[index] for index in share]
