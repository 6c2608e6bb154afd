"""`flowstream train`, from texts to a checkpoint: against a loop written by hand, killed, over ranks, in its modes."""

from __future__ import annotations

import math
import random
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning import Lives, problems, run, save_model, write_shards
from pages import read_alone
from tiny_tokenizers import CHAT, MARKED_TEMPLATE, write_lines
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from flowstream.elastic_sampler import ElasticDistributedSampler
from flowstream.finetune.checkpoints import last_checkpoint
from flowstream.finetune.settings import Texts
from flowstream.finetune.tokens import TokenDataset, read_tokens
from flowstream.finetune.trainer import log_of

BATCH = 4
LR = 3e-3
NUM = 46


class Place:
    """A model and texts, and the runs over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_model(folder / "model")
        self.texts = write_lines(folder / "train.jsonl", problems(NUM))
        self.target = write_lines(folder / "target.jsonl", problems(7, seed=1))
        (folder / "general.txt").write_text(" ".join(row["prompt"] for row in problems(30, seed=2)))
        self.shards = write_shards(folder / "shards", problems(40, seed=3), num_shards=4)
        self.ran: list[str] = []

    def options(self, out: str, **options: Any) -> dict[str, Any]:
        common = {"model": self.model, "data": self.texts, "batch_size": BATCH, "lr": LR, "max_length": 64}
        return common | {"out": self.folder / out} | options

    @property
    def evaluated(self) -> dict[str, Any]:
        return {"eval": [f"target={self.target}", f"general={self.folder / 'general.txt'}"], "eval_steps": 8}

    def weighted(self) -> Path:
        """Two epochs, weighted, with evaluations."""
        return self.run("weighted", epochs=2, save_steps=7, log_steps=7, **self.evaluated)

    def adapted(self) -> Path:
        """Adapters, trained on what is kept of shards, over more than an epoch."""
        return self.run("adapted", **self.adapting)

    @property
    def adapting(self) -> dict[str, Any]:
        texts = {"data": self.shards, "shuffle": 16, "max_steps": 9}
        return texts | {"mode": "resample", "lora_rank": 2, "lora_alpha": 8, "save_steps": 4, "log_steps": 2}

    def run(self, out: str, **options: Any) -> Path:
        """The folder; a run of the same name is run once."""
        if out not in self.ran:
            assert run("train", **self.options(out, **options)) == 0
            self.ran.append(out)
        return self.folder / out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    lives = Lives()
    yield lives
    lives.close()


def weights_of(folder: Path | str, **options: Any) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).state_dict())


def furthest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def read(place: Place, path: str) -> TokenDataset:
    return read_tokens(path, Texts(max_length=64).encoder(AutoTokenizer.from_pretrained(place.model)))


def nats(model: Any, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """The losses of one sample's labelled tokens."""
    logits = model(input_ids=sample["input_ids"][None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits, sample["labels"][1:], reduction="none")[sample["labels"][1:] != -100]


def trained_by_hand(place: Place, *, epochs: int, accumulate: int) -> dict[str, torch.Tensor]:
    """FLOW as one would write it without flowstream: one sample at a time, all losses scored beforehand."""
    samples = read(place, place.texts)
    model = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32)
    with torch.no_grad():
        losses = torch.stack([nats(model, samples[row]).mean() for row in range(len(samples))])
    weights = torch.exp(-losses / losses.double().quantile(0.5))
    steps = []
    for epoch in range(epochs):
        order = ElasticDistributedSampler(len(samples), seed=0)
        order.set_epoch(epoch)
        rows = list(order)
        steps += [rows[at : at + BATCH * accumulate] for at in range(0, len(rows), BATCH * accumulate)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    warm = math.floor(0.03 * len(steps))
    model.train()
    for step, rows in enumerate(steps):
        progress = (step - warm) / max(len(steps) - warm, 1)
        factor = step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * progress))
        found = [nats(model, samples[row]) for row in rows]
        total = sum(weights[row] * each.sum() for row, each in zip(rows, found, strict=True))
        (total / sum(len(each) for each in found)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = LR * factor
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict())


def test_a_run_equals_a_loop_written_by_hand(place: Place) -> None:
    found, expected = weights_of(place.weighted()), trained_by_hand(place, epochs=2, accumulate=1)
    assert furthest(found, expected) < 1e-5
    assert furthest(found, weights_of(place.model)) > 1e-2


def test_losses_scored_ahead_are_found_and_accumulation_equals_large_batches(place: Place, capsys: Any) -> None:
    hub = place.folder / "hub"  # of the same rows, read by datasets
    hub.mkdir()
    shutil.copy(place.texts, hub)
    cache = place.folder / "losses"
    asked = {"model": place.model, "data": place.texts, "cache": cache, "max_length": 64}
    assert run("score", **asked) == 0
    assert f"{NUM} samples" in capsys.readouterr().out
    out = place.run("accumulated", epochs=2, accumulate=4, cache=cache, log_steps=1, data=f"hf:{hub}")
    log = log_of(last_checkpoint(out) or out)
    assert log is not None
    assert {row.cache_hit_rate for row in log.windows} == {1.0}
    assert furthest(weights_of(out), trained_by_hand(place, epochs=2, accumulate=4)) < 1e-5
    assert "of the reference's losses, 100% were in the cache" in capsys.readouterr().out
    assert run("score", **asked) == 0
    assert "100% of them known" in capsys.readouterr().out
    assert run("score", **asked, bf16=True) == 0  # another dtype, other losses
    assert "0% of them known" in capsys.readouterr().out


def test_evaluations_are_means_over_tokens_and_the_last_is_of_what_is_written(place: Place) -> None:
    out = place.weighted()
    model, samples = AutoModelForCausalLM.from_pretrained(out), read(place, place.target)
    with torch.no_grad():
        expected = torch.cat([nats(model, samples[row]) for row in range(len(samples))]).mean()
    log = log_of(out / "checkpoint-24")
    assert log is not None
    assert [each.step for each in log.evaluations] == [0, 8, 16, 24]
    assert log.evaluations[-1].losses["target"] == pytest.approx(float(expected), abs=1e-5)
    assert log.target == "target"


def test_the_folder_has_a_checkpoint_a_report_and_tensorboards_files(place: Place) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = place.weighted()
    assert AutoTokenizer.from_pretrained(out)("hello")["input_ids"]
    page = read_alone((out / "report.html").read_text())
    for told in ("24 steps in weight mode", "lr", "0.003", "general", "batch_size"):
        assert told in page.text
    (events,) = (out / "tensorboard").rglob("events*")
    told = EventAccumulator(str(events)).Reload()
    names = told.Tags()["scalars"]
    assert {"train/flow/tau", "train/loss", "eval/target_loss"} <= set(names), names
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-21", "checkpoint-24"]


def test_adapters_are_merged_into_what_is_written_and_stand_beside_it(place: Place) -> None:
    from peft import PeftModel

    out = place.adapted()
    merged, base = weights_of(out), AutoModelForCausalLM.from_pretrained(place.model)
    adapted: Any = PeftModel.from_pretrained(base, str(out / "adapter"))
    assert furthest(merged, dict(adapted.merge_and_unload().state_dict())) < 1e-6
    assert furthest(merged, weights_of(place.model)) > 1e-3
    # All is learned already: written from the last checkpoint, this time as adapters alone.
    alone = place.folder / "alone"
    shutil.copytree(out / "checkpoint-9", alone / "checkpoint-9")
    assert run("train", **place.options("alone", **place.adapting), resume=True, merge=False) == 0
    assert not (alone / "model.safetensors").exists()
    unmerged: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place.model), str(alone))
    assert furthest(merged, dict(unmerged.merge_and_unload().state_dict())) < 1e-6
    found: Any = AutoModelForCausalLM.from_pretrained(alone)
    assert {name for name, _ in found.named_parameters() if "lora" in name}
    assert "9 steps in resample mode" in read_alone((alone / "report.html").read_text()).text


@pytest.mark.parametrize("kind", ["weighted", "adapted"])
def test_killed_and_resumed_equals_uninterrupted(kind: str, place: Place, lives: Lives) -> None:
    """While a checkpoint is written, at a random moment behind one, and while the model is written."""
    expected = place.weighted() if kind == "weighted" else place.adapted()
    asked = {"epochs": 2, "save_steps": 7, "log_steps": 7, **place.evaluated} if kind == "weighted" else place.adapting
    asked = place.options(f"killed-{kind}", **asked)
    out, every = asked["out"], asked["save_steps"]
    for until, delay in (
        (out / f"checkpoint-{every}", 0.0),
        (out / f"checkpoint-{2 * every}", random.uniform(0.0, 0.1)),
        (out / "tokenizer_config.json", 0.0),
    ):
        end = lives.live("train", until=until, delay=delay, resume=True, **asked)
        assert end.status == -9, end.stderr
    end = lives.live("train", resume=True, **asked)
    assert end.status == 0, end.stderr
    assert re.search(r"^resumes after step \d+, from checkpoint-\d+$", end.stdout, re.MULTILINE)
    assert furthest(weights_of(out), weights_of(expected)) <= 1e-6
    found, uncut = (log_of(last_checkpoint(folder) or folder) for folder in (out, expected))
    assert found is not None
    assert uncut is not None
    assert [row.step for row in found.steps] == [row.step for row in uncut.steps]
    assert [row.loss for row in found.steps] == pytest.approx([row.loss for row in uncut.steps], rel=1e-6)
    assert found.evaluations == uncut.evaluations
    assert found.extremes.state_dict() == uncut.extremes.state_dict()
    assert found.losses.num_values == uncut.losses.num_values


def test_two_processes_equal_one_of_twice_the_batch_also_when_one_is_killed(
    place: Place, lives: Lives, capsys: Any
) -> None:
    asked = place.options("ranks", epochs=2, save_steps=7, log_steps=7, **place.evaluated) | {"batch_size": BATCH // 2}
    out, alone = asked["out"], place.weighted()
    end = lives.live("train", num_ranks=2, until=out / "checkpoint-14" / "trainer_state.json", **asked)
    assert end.status != 0  # torchrun may name the rank that was killed, or the one that then lost its peer
    assert not (out / "checkpoint-21").exists()
    capsys.readouterr()
    assert run("train", **asked, resume=True) == 1
    assert "was written by 2 processes, and now there are 1: start as many as then" in capsys.readouterr().err
    end = lives.live("train", num_ranks=2, resume=True, **asked)
    assert end.status == 0, end.stderr
    assert all(line.startswith(("step ", "ESS/n ")) for line in end.stderr.splitlines()), end.stderr
    assert furthest(weights_of(out), weights_of(alone)) < 1e-5
    found, expected = log_of(out / "checkpoint-24"), log_of(alone / "checkpoint-24")
    assert found is not None
    assert expected is not None
    for ours, theirs in zip(found.evaluations, expected.evaluations, strict=True):
        assert ours.losses == pytest.approx(dict(theirs.losses), abs=1e-5)


def test_every_rank_tells_an_error_in_one_line(place: Place, lives: Lives) -> None:
    shards = write_shards(place.folder / "broken", [*problems(39), {"prompt": "how"}], num_shards=4)
    end = lives.live("train", num_ranks=2, **place.options("broken-run", data=shards, max_steps=20))
    told = [line for line in end.stderr.splitlines() if line.startswith("flowstream: ")]
    assert len(told) in (1, 2)  # the agent may end one before it has spoken
    assert all("003.tar sample 00300009 has no column response" in line for line in told)


def test_streamed_shards_are_read_by_workers_over_several_epochs(place: Place, lives: Lives) -> None:
    asked = place.options("streamed", data=place.shards, max_steps=25, workers=2, log_steps=1)
    end = lives.live("train", **asked)
    assert (end.status, end.stderr.count("Error")) == (0, 0), end.stderr
    log = log_of(place.folder / "streamed" / "checkpoint-25")
    assert log is not None
    assert log.windows[-1].samples_emitted > 80  # of 40


def test_tokens_of_chats_are_weighed_in_bfloat16_with_checkpointed_activations(place: Place) -> None:
    model = save_model(place.folder / "chatty", template=MARKED_TEMPLATE)
    draws = random.Random(0)
    chats = [{"messages": [*CHAT, {"role": "user", "content": draws.choice("ab")}, CHAT[-1]]} for _ in range(20)]
    texts = write_lines(place.folder / "chats.jsonl", chats)
    asked = {"level": "token", "target_ess": 0.6, "normalize": True, "label_smoothing": 0.1, "bf16": True}
    out = place.run("chat", model=model, data=texts, max_steps=4, gradient_checkpointing=True, log_steps=1, **asked)
    log = log_of(last_checkpoint(out) or out)
    assert log is not None
    assert log.windows[-1].ess == pytest.approx(0.6, abs=0.05)
    assert all(math.isfinite(row.loss) and row.loss < 20 for row in log.steps)
    assert all(value.dtype == torch.float32 for value in AutoModelForCausalLM.from_pretrained(out).parameters())


def test_checkpointed_activations_and_losses_scored_ahead_change_nothing_for_adapters(place: Place) -> None:
    cache = place.folder / "losses of shards"
    assert run("score", model=place.model, data=place.shards, cache=cache, max_length=64) == 0
    spared = place.run("spared", gradient_checkpointing=True, cache=cache, **place.adapting)
    log = log_of(last_checkpoint(spared) or spared)
    assert log is not None
    assert log.windows[-1].cache_hit_rate == 1.0
    assert furthest(weights_of(place.adapted()), weights_of(spared)) < 1e-6


def test_what_is_there_is_neither_overwritten_nor_taken_for_another_run(place: Place, capsys: Any) -> None:
    place.weighted()
    base = {"epochs": 2, "save_steps": 7, "log_steps": 7, **place.evaluated}
    for changed, told in (
        ({}, "go on from it with --resume, or give another --out"),
        ({"resume": True, "batch_size": 2}, "--batch-size was 4, and now it is 2"),
        ({"resume": True, "mode": "resample"}, "--mode was weight, and now it is resample"),
        ({"resume": True, "model": place.model + "x"}, "--model was"),
        ({"resume": True, "max_length": 32}, "--max-length was 64, and now it is 32"),
    ):
        capsys.readouterr()
        assert run("train", **place.options("weighted", **(base | changed))) == 1
        found = capsys.readouterr()
        assert found.err.startswith("flowstream: ")
        assert found.err.count("\n") == 1
        assert told in found.err
        assert found.out == ""


def test_ctrl_c_ends_without_a_traceback(place: Place, lives: Lives) -> None:
    asked = place.options("interrupted", epochs=40, save_steps=5)
    until = place.folder / "interrupted" / "tensorboard"  # stays, while old checkpoints go
    end = lives.live("train", until=until, delay=random.uniform(0.0, 0.5), number=signal.SIGINT, **asked)
    assert end.status == 130, end.stderr
    assert all(line.startswith(("step ", "ESS/n ")) for line in end.stderr.splitlines()), end.stderr


def test_two_processes_score_each_sample_once(place: Place, lives: Lives) -> None:
    asked = {"model": place.model, "data": place.texts, "cache": place.folder / "shared losses", "max_length": 64}
    end = lives.live("score", num_ranks=2, **asked)
    assert end.status == 0, end.stderr
    assert all(line.startswith("ESS/n ") for line in end.stderr.splitlines()), end.stderr
    assert end.stdout.startswith(f"{NUM} samples in ")
    assert run("score", **asked) == 0
