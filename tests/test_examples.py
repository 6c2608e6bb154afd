"""The examples, run as a user runs them: a process each, warnings as errors, no network."""

import json
import re
from pathlib import Path

import pytest
import torch
import webdataset as wds
from torchrun import script

ROOT = Path(__file__).parents[1]
NAMES = (
    "accelerate_loop",
    "lightning_module",
    "lora",
    "plain_pytorch",
    "resampling",
    "vision",
    "webdataset_llm",
)
OF_MANY_PROCESSES = ("fsdp2", "multi_node")
"""Run by tests/distributed/test_multi_node_example.py."""


def run(name: str, *arguments: str, folder: Path, allowed: str = "") -> tuple[str, str]:
    """What the example printed to stdout and stderr, run in `folder`, which is where temporary files go, too."""
    return script(ROOT / "examples" / f"{name}.py", *arguments, folder=folder, allowed=allowed)


def numbers(pattern: str, text: str) -> list[tuple[float, ...]]:
    return [tuple(map(float, found.groups())) for found in re.finditer(pattern, text)]


def test_every_example_is_short_and_says_how_to_run_it():
    files = sorted((ROOT / "examples").glob("*.py"))
    assert [file.stem for file in files] == sorted(NAMES + OF_MANY_PROCESSES)
    for file in files:
        lines = file.read_text("utf-8").splitlines()
        launched = file.stem in OF_MANY_PROCESSES
        assert len(lines) < (100 if launched else 60), file.name
        assert lines[0].startswith('"""'), file.name
        launcher = "torchrun --nproc-per-node 4" if launched else "python"
        assert lines[2].startswith(f"{launcher} examples/{file.name}"), file.name


def test_plain_loop_learns_and_goes_on_from_its_checkpoint(tmp_path):
    pattern = r"(\d+) samples, loss ([\d.]+) → ([\d.]+)"
    halves = [run("plain_pytorch", "--steps", "8", "--checkpoint", "half.pt", folder=tmp_path)[0] for _ in range(2)]
    ((num_samples, start, middle),), ((total, _, end),) = (numbers(pattern, printed) for printed in halves)
    assert num_samples == 8 * 4 * 4
    assert total == 2 * num_samples
    assert end < middle < start

    run("plain_pytorch", "--steps", "16", folder=tmp_path)
    resumed, uninterrupted = (torch.load(tmp_path / file) for file in ("half.pt", "checkpoint.pt"))
    torch.testing.assert_close(resumed["model"], uninterrupted["model"])
    assert resumed["stream"]["num_emitted"] == uninterrupted["stream"]["num_emitted"]


def test_webdataset_pipeline_writes_its_shards_and_learns(tmp_path):
    printed, _ = run("webdataset_llm", folder=tmp_path)
    shards = sorted(map(str, tmp_path.glob("*/part-*.tar")))
    assert len(shards) >= 2
    samples = list(wds.WebDataset(shards, shardshuffle=False).decode())
    assert all(set(sample["json"]) == {"prompt", "answer"} for sample in samples)
    (first,), (second,) = numbers(r"epoch \d: loss ([\d.]+)", printed)
    assert second < first
    metrics = {name: float(value) for name, value in re.findall(r"(flow/\w+) (\S+)", printed)}
    assert metrics["flow/samples_emitted"] == pytest.approx(2 * len(samples), rel=0.01)  # printed to three digits
    assert metrics["flow/cache_hit_rate"] == pytest.approx(0.5, abs=0.01)


def test_webdataset_pipeline_takes_the_shards_of_a_user(tmp_path):
    for number in range(2):
        with wds.ShardWriter(str(tmp_path / f"mine-{number}-%d.tar"), verbose=0) as writer:
            for row in range(20):
                sample = {"prompt": f"{row} + {number} = ", "answer": f"{row + number}"}
                writer.write({"__key__": f"{number}-{row}", "json": json.dumps(sample)})
    printed, _ = run("webdataset_llm", "--shards", str(tmp_path / "mine-{0..1}-0.tar"), folder=tmp_path)
    assert "flow/samples_emitted 80\n" in printed


def test_classifier_learns_new_digits_and_is_measured_on_the_old(tmp_path):
    printed, told = run("vision", folder=tmp_path)
    assert told == ""
    rows = re.findall(r"^(\S+) +new digits ([\d.]+)  old ones ([\d.]+)$", printed, re.MULTILINE)
    new = {name: float(value) for name, value, _ in rows}
    assert list(new) == ["probe", "plain", "FLOW"]
    assert min(new["plain"], new["FLOW"]) > new["probe"] > 0.8
    assert min(float(value) for _, _, value in rows) > 0.9


def test_lora_learns_and_keeps_the_losses_of_its_base_for_the_next_run(tmp_path):
    peft_under_transformers = "`is_gradient_checkpointing` is deprecated"
    for share in (50, 100):
        printed, _ = run("lora", "--cache", "losses", folder=tmp_path, allowed=peft_under_transformers)
        (begin, middle), (_, end) = numbers(r"epoch \d: loss ([\d.]+) → ([\d.]+)", printed)
        assert end < middle < begin
        assert f"the reference, {share}% came from losses" in printed


def test_resampling_leaves_the_loop_as_it_is_and_takes_the_accepted_share_of_steps(tmp_path):
    printed, _ = run("resampling", folder=tmp_path)
    pretrained, loader, stream = numbers(r"(\d+) steps, loss ([\d.]+) → ([\d.]+)", printed)
    for _, first, last in (pretrained, loader, stream):
        assert last < first
    ((kept,),) = numbers(r"(\d+)% of the samples", printed)
    assert stream[0] == pytest.approx(loader[0] * kept / 100, abs=1.5)
