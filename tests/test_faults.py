"""What goes wrong on the way loses nothing: loaders, workers, shards, scorers, disks, and the user's Ctrl-C."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from batches import batches_of, by_key, gamma_losses, gathered
from faulty import Bounded, Raising, RaisingAt
from torch.utils.data import DataLoader, Dataset

import flowstream as fs

FIXED = fs.FixedTemperature(1.0)


def outcomes(stream: fs.FlowStream, stop: int | None = None) -> list[Any]:
    """Batches, and messages of the loader's errors in their place; of one epoch, or the first `stop`."""
    found: list[Any] = []
    iterator = iter(stream)
    while stop is None or len(found) < stop:
        try:
            found.append(next(iterator))
        except OSError as error:
            found.append(str(error))
        except StopIteration:
            break
    return found


def batches_in(found: Iterable[Any]) -> list[Any]:
    return [one for one in found if not isinstance(one, str)]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return bool(one == other)
    return all(one[key] == other[key] if key == "name" else torch.equal(one[key], other[key]) for key in one)


# -- loaders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(14))
@pytest.mark.parametrize("mode", ["weight", "resample", fs.Systematic(2.0)], ids=str)
def test_an_error_within_a_step_leaves_the_step_whole(mode, at):
    loader = Raising(batches_of(gamma_losses(16 * 30 + 5)), [at])
    stream = fs.FlowStream(
        loader, by_key, mode=mode, window=8, accumulate=4, temperature=FIXED, include=("denominator",), cache=None
    )
    found = outcomes(stream)
    batches = batches_in(found)
    assert found[len(batches) :] != []
    (place,) = [i for i, one in enumerate(found) if isinstance(one, str)]
    assert place % 4 == 0
    ids = gathered(batches, "id")
    if mode == "weight":
        assert ids.equal(torch.arange(16 * 30 + 5))
        assert at - 4 < place <= at
    sizes = [len(batch["id"]) for batch in batches]
    assert set(sizes[:-1]) == {16}
    assert len(ids.unique()) == len(ids) or isinstance(mode, fs.Systematic)
    for first in range(0, len(batches), 4):
        denominators = {float(batch["flow_denominator"]) for batch in batches[first : first + 4]}
        assert denominators == {float(sum(sizes[first : first + 4]))}


@pytest.mark.parametrize("mode", ["weight", "resample"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_comes_after_a_loaders_errors_is_resumed_at_every_stop(mode, accumulate):
    def stream() -> fs.FlowStream:
        loader = Raising(batches_of(gamma_losses(16 * 26 + 5)), [5, 6, 13, 19])
        settings: dict[str, Any] = {"window": 4, "accumulate": accumulate, "include": ("tau", "index", "denominator")}
        return fs.FlowStream(
            loader, by_key, mode=mode, temperature=fs.RunningMedian(warmup_samples=32), cache=None, **settings
        )

    whole = outcomes(stream())
    assert sum(isinstance(one, str) for one in whole) == 4
    for stop in range(1, len(whole)):
        stopped = stream()
        outcomes(stopped, stop)
        resumed = stream()
        resumed.load_state_dict(stopped.state_dict())
        rest = outcomes(resumed)
        missing = whole[stop:]
        # An error that came right before the stop, with no batch behind it, may come once more.
        while isinstance(rest[0], str) and len(rest) > len(missing):
            del rest[0]
        assert len(rest) == len(missing), stop
        assert all(map(same, rest, missing)), stop


@pytest.mark.parametrize("mode", ["weight", "resample"])
@pytest.mark.parametrize("error", [RuntimeError, StopIteration])
def test_a_scorers_error_comes_after_the_window_before_it(mode, error):
    batches = batches_of(gamma_losses(16 * 60))
    expected = list(fs.FlowStream(batches, by_key, mode=mode, window=4, temperature=FIXED, cache=None))
    scorer = fs.FunctionScorer(RaisingAt(16 * 25, error))
    iterator = iter(fs.FlowStream(batches, scorer, mode=mode, window=4, temperature=FIXED, cache=None))
    found = []
    told = "the function failed" if error is RuntimeError else "raised StopIteration in epoch 0, window"
    with pytest.raises(RuntimeError, match=told) as caught:
        for batch in iterator:
            found.append(batch)
    assert len(found) % 4 == 0
    assert len(found) == 24 if mode == "weight" else len(found) >= 4
    assert all(map(same, found, expected))
    if error is RuntimeError:
        assert f"window {len(found) // 4}" in caught.value.__notes__[-1]
    with pytest.raises(RuntimeError, match=told):  # and not the end of the epoch
        next(iterator)


def test_a_scorer_that_fails_once_goes_on_where_it_failed():
    scorer = RaisingAt(16 * 9)
    iterator = iter(fs.FlowStream(batches_of(gamma_losses(16 * 20)), fs.FunctionScorer(scorer), window=4, cache=None))
    found = [next(iterator) for _ in range(0)]
    with pytest.raises(RuntimeError, match="the function failed"):
        for batch in iterator:
            found.append(batch)
    scorer.first_id = -1
    found += list(iterator)
    assert gathered(found, "id").equal(torch.arange(16 * 20))


def test_the_warm_up_may_begin_with_empty_batches():
    batches = [{"loss": torch.empty(0), "id": torch.empty(0, dtype=torch.int64), "name": []}] * 2
    batches += batches_of(gamma_losses(16 * 30))
    for mode, num in (("weight", 16 * 30), ("resample", None)):
        found = list(fs.FlowStream(batches, by_key, mode=mode, window=4, temperature=FIXED, cache=None))
        sizes = [len(batch["id"]) for batch in found]
        assert sum(sizes) == num or num is None
        assert set(sizes[2:-1]) == {16}
        assert sizes[:2] == ([0, 0] if mode == "weight" else [16, 16])


@pytest.mark.parametrize("first", [32, 48])
def test_systematic_batches_are_full_where_the_loaders_first_is_the_largest(first):
    losses = gamma_losses(first + 16 * 41 + 3)
    batches = batches_of(losses, first)[:1] + [
        {"loss": part, "id": torch.arange(first + 16 * i, first + 16 * i + len(part)), "name": [""] * len(part)}
        for i, part in enumerate(losses[first:].split(16))
    ]
    found = list(fs.FlowStream(batches, by_key, mode=fs.Systematic(2.0), window=4, temperature=FIXED, cache=None))
    sizes = [len(batch["id"]) for batch in found]
    assert set(sizes[:-1]) == {first}
    assert abs(sum(sizes) - len(losses) / 2) < 4


# -- windows that deliver nothing ------------------------------------------------------------------


def barren(first: int, last: int) -> torch.Tensor:
    """Losses of which the first and the last have no mass."""
    losses = gamma_losses(16 * 120)
    losses[: 16 * first] = 300.0
    losses[len(losses) - 16 * last :] = 300.0
    return losses


def test_windows_without_mass_before_the_first_delivery_count_once():
    def stream(at: tuple[int, ...] = ()) -> fs.FlowStream:
        loader = Raising(batches_of(barren(70, 0)), at)
        return fs.FlowStream(loader, by_key, mode="resample", window=1, temperature=FIXED, cache=None)

    whole = list(expected := stream())
    for resume in (False, True):
        stopped = stream((66,))
        with pytest.raises(OSError, match="torn before batch 66"):
            next(iter(stopped))
        assert stopped.metrics()["flow/samples_seen"] > 16 * 60
        resumed = stream() if resume else stopped
        if resume:
            resumed.load_state_dict(stopped.state_dict())
        found = outcomes(resumed)
        assert not resume or all(map(same, found, whole))
        assert resumed.metrics()["flow/samples_seen"] == expected.metrics()["flow/samples_seen"] == 16 * 120


def test_a_state_on_the_last_batch_counts_the_windows_without_mass_after_it():
    def stream() -> fs.FlowStream:
        temperature = fs.RunningMedian(warmup_samples=32)
        loader = batches_of(barren(0, 50))
        return fs.FlowStream(loader, by_key, mode="resample", window=1, temperature=temperature, cache=None)

    whole = stream()
    num, again = len(list(whole)), list(whole)
    stopped = stream()
    assert len(outcomes(stopped, num)) == num
    assert stopped.state_dict()["epoch"] == 1
    assert stopped.metrics()["flow/samples_seen"] == 16 * 120
    resumed = stream()
    resumed.load_state_dict(stopped.state_dict())
    for found in (list(stopped), list(resumed)):
        assert len(found) == len(again)
        assert all(map(same, found, again))


# -- losses and memory -----------------------------------------------------------------------------


def test_a_burst_of_nan_comes_after_what_is_whole_or_is_weighed_zero_and_counted():
    losses = gamma_losses(16 * 40)
    losses[16 * 21 : 16 * 21 + 9] = torch.nan
    settings: dict[str, Any] = {"window": 4, "temperature": FIXED, "cache": None}
    found = []
    with pytest.raises(
        ValueError, match=r"9 of 64 samples of window 5 .*: batch 21: row 0, row 1, row 2, row 3, …\. More"
    ):
        for batch in fs.FlowStream(batches_of(losses), by_key, **settings):
            found.append(batch)
    assert gathered(found, "id").equal(torch.arange(16 * 20))
    stream = fs.FlowStream(batches_of(losses), by_key, max_bad_fraction=0.2, **settings)
    weight = gathered(list(stream), "flow_weight")
    assert (weight == 0).nonzero().flatten().equal(torch.arange(16 * 21, 16 * 21 + 9))
    assert stream.metrics()["flow/nonfinite"] == 9


def language_batches(num: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(num):
        ids = torch.randint(1, 97, (4, 12), generator=generator)
        out.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return out


def test_a_token_outside_of_the_vocabulary_comes_after_the_window_before_it(tiny):
    batches = language_batches(16)
    batches[9]["input_ids"] = batches[9]["input_ids"].clone()
    batches[9]["input_ids"][2, 3] = 97
    stream = fs.FlowStream(batches, fs.CausalLMScorer(tiny("llama")), window=4, temperature=FIXED)
    found = []
    with pytest.raises(ValueError, match="97"):
        for batch in stream:
            found.append(batch)
    assert len(found) == 8


def test_a_budget_that_memory_has_halved_is_in_the_state(caplog):
    def stream(limit: int = 30) -> fs.FlowStream:
        scorer = fs.CausalLMScorer(Bounded(limit), token_budget=400)
        return fs.FlowStream(language_batches(16), scorer, window=4, temperature=FIXED, cache=None)

    expected = list(stream(10**6))
    stopped = stream()
    found = outcomes(stopped, 6)
    state = stopped.state_dict()
    assert state["scorer"]["token_budget"] <= 30
    assert caplog.text.count("ran out of memory") == 1
    caplog.clear()
    resumed = stream()
    resumed.load_state_dict(state)
    found += outcomes(resumed)
    assert "ran out of memory" not in caplog.text
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one["flow_weight"], other["flow_weight"])


# -- workers ---------------------------------------------------------------------------------------


class Slowly(Dataset[dict[str, Any]]):
    losses = gamma_losses(16 * 200)

    def __len__(self) -> int:
        return len(self.losses)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"loss": self.losses[index], "id": index, "name": f"sample {index}"}


# Killed while it hands a tensor over, the worker leaves torch with a reset connection: torch then raises that, after it
# has opened files to see whether there are too many.
@pytest.mark.filterwarnings("ignore:unclosed file <_io.BufferedRandom:ResourceWarning")
@pytest.mark.parametrize("mode", ["weight", "resample"])
def test_a_killed_worker_of_the_loader_is_an_error_and_the_state_resumes(mode):
    def stream() -> fs.FlowStream:
        loader = DataLoader(Slowly(), batch_size=16, num_workers=2)
        return fs.FlowStream(loader, by_key, mode=mode, window=4, temperature=FIXED, cache=None)

    whole = list(fs.FlowStream(DataLoader(Slowly(), batch_size=16), by_key, mode=mode, window=4, temperature=FIXED))
    stopped = stream()
    found, iterator, others = [], iter(stopped), multiprocessing.active_children()
    with pytest.raises((RuntimeError, ConnectionResetError), match="worker|Connection reset"):
        for batch in iterator:
            found.append(batch)
            if len(found) == 3:
                worker = next(child for child in multiprocessing.active_children() if child not in others)
                assert worker.pid is not None
                os.kill(worker.pid, signal.SIGKILL)
    state = stopped.state_dict()
    stopped.close()
    resumed = stream()
    resumed.load_state_dict(state)
    assert all(torch.equal(one["id"], other["id"]) for one, other in zip(found, whole, strict=False))
    found += list(resumed)
    ids = gathered(found, "id")
    assert ids.diff().gt(0).all()  # in order, and none twice
    assert {len(batch["id"]) for batch in found[:-1]} == {16}
    # The error ended a window. Others follow than without it, and they draw anew, from where it was.
    assert abs(len(ids) - len(gathered(whole, "id"))) < (1 if mode == "weight" else 8)


# -- shards ----------------------------------------------------------------------------------------


def shards(folder: Path) -> list[Path]:
    """Four real tar files of 40 samples."""
    paths = []
    for number in range(4):
        paths.append(folder / f"part-{number}.tar")
        with wds.TarWriter(str(paths[-1])) as writer:
            for index in range(40 * number, 40 * number + 40):
                loss = io.BytesIO()
                np.save(loss, np.float32(1 + index % 7))
                writer.write({"__key__": f"{index:05d}", "loss.npy": loss.getvalue()})
    return paths


def cut_off(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 + 700])


def garbled_member(path: Path) -> None:
    """One sample of the shard cannot be decoded."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for number, (member, content) in enumerate(members):
            content = b"\x00garbage" if number == 15 else content
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def garbled_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1024 * 20 : 1024 * 20 + 512] = b"\xff" * 512
    path.write_bytes(content)


def no_tar(path: Path) -> None:
    path.write_bytes(b"<html>404 not found</html>" * 400)


HANDLERS = {
    name: getattr(wds, name)
    for name in ("reraise_exception", "warn_and_continue", "ignore_and_continue", "warn_and_stop", "ignore_and_stop")
}


def ids_of(batch: dict[str, Any]) -> list[int]:
    return [int(key) for key in batch["__key__"]]


@pytest.mark.filterwarnings("ignore")  # webdataset's, of each shard
@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("damage", [cut_off, garbled_member, garbled_header, no_tar])
def test_of_damaged_shards_comes_what_webdataset_gives_and_nothing_else(damage, handler, tmp_path):
    paths = shards(tmp_path)
    damage(paths[2])

    def pipeline() -> Iterable[Any]:
        handle: Callable[[Exception], bool] = HANDLERS[handler]
        data = wds.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False, handler=handle)
        return data.decode(handler=handle).rename(loss="loss.npy", __key__="__key__").batched(8)

    def all_of(batches: Iterable[Any]) -> tuple[list[list[int]], str]:
        found = []
        try:
            for batch in batches:
                found.append(ids_of(batch))
        except Exception as error:
            return found, type(error).__name__
        return found, ""

    scorer = fs.FunctionScorer(lambda batch: batch["loss"])

    def stream() -> fs.FlowStream:
        return fs.FlowStream(pipeline(), scorer, window=3, temperature=FIXED)

    expected, error = all_of(pipeline())
    assert bool(error) == (handler == "reraise_exception" and damage is not garbled_header)
    assert 9 <= len(expected) <= 20
    assert all_of(stream()) == (expected, error)
    stopped = stream()
    found = [ids_of(batch) for batch in outcomes(stopped, 7)]
    resumed = stream()
    resumed.load_state_dict(stopped.state_dict())
    rest, error_again = all_of(resumed)
    assert (found + rest, error_again) == (expected, error)


# -- processes -------------------------------------------------------------------------------------


def run(program: str, *arguments: object) -> Any:
    """What a program of this folder prints, as JSON."""
    command = [sys.executable, str(Path(__file__).with_name(program)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_ctrl_c_anywhere_loses_nothing_of_the_state():
    found = run("interrupted_stream.py")
    assert found.keys() == {"weight", "resample"}
    for mode, places in found.items():
        for place, (is_equal, num_interrupts) in places.items():
            assert is_equal, (mode, place)
            assert num_interrupts >= 3, (mode, place)


def test_where_the_disk_fills_streaming_goes_on_and_the_last_whole_state_is_kept(tmp_path):
    found = run("full_disk_stream.py", tmp_path)
    assert found["equal"]
    assert found["told"] == 1
    assert 0 < found["hit_rate"] < 1
    assert "File too large" in found["refused"]
    assert found["step"] == 1
