"""`flowstream compare` as it is typed: own model and texts, table and page, a kill in the middle, and mistakes."""

from __future__ import annotations

import _thread
import json
import math
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finetuning import Lives, problems, run, save_model
from pages import read_alone
from safetensors.torch import load_file, save_file
from scipy import stats
from scipy.interpolate import PchipInterpolator
from tiny_tokenizers import write_lines

METHODS = "standard,l2,lora,wise,hft,flow,permuted,subsample,flow+wise"
Results = dict[str, Any]


class Place:
    """A model, texts, and what must be retained."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_model(folder / "model", num_hidden_layers=1)
        self.data = write_lines(folder / "train.jsonl", problems(60))
        self.test = write_lines(folder / "test.jsonl", problems(12, seed=1))
        self.general = str(folder / "general.txt")
        Path(self.general).write_text("".join(f"{k * k % 1000}=" for k in range(100)))  # nothing that is learnt

    def options(self, **options: Any) -> dict[str, Any]:
        common: dict[str, Any] = {"model": self.model, "data": self.data, "general": self.general, "max_length": 32}
        common |= {"steps": 8, "batch_size": 4, "warmup_samples": 16, "window": 2, "measured_at": "0.5,1"}
        return common | {"strengths": 300, "alphas": 0.5, "lrs": "4e-3", "rank": 2, "processes": 1} | options


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def finished(place: Place) -> Path:
    out = place.folder / "finished"
    assert run("compare", **place.options(out=out, methods=METHODS, seeds=2)) == 0
    return out


@pytest.fixture(scope="module")
def results(finished: Path) -> Results:
    found: Results = json.loads((finished / "results.json").read_text())
    return found


def runs_of(results: Results, method: str, budget: str = "equal_steps", seed: int = 0) -> list[Any]:
    key = (method, budget, seed)
    return [each for each in results["runs"] if (each["method"], each["budget"], each["seed"]) == key]


def cells(out: Path) -> dict[str, Any]:
    """Name → what was found, but the time."""
    found = {str(path.relative_to(out)): json.loads(path.read_text()) for path in out.glob("seed-*/cells/*.json")}
    return {name: {**one, "seconds": 0, "score_seconds": 0} for name, one in found.items()}


def choices(results: Results) -> list[tuple[Any, ...]]:
    return [
        (method, budget, *(one[name] for name in ("seed", "learning_rate", "step", "strength", "alpha")))
        for method, found in results["methods"].items()
        for budget, figure in found["figures"].items()
        for one in figure["choices"]
    ]


def test_every_method_runs_on_one_grid_and_standard_at_more_rates(results: Results) -> None:
    assert list(results["methods"]) == METHODS.split(",")
    for method in METHODS.split(","):
        for seed in (0, 1):
            found = runs_of(results, method, seed=seed)
            rates = [0.004, 0.002, 0.004 / math.sqrt(2)] if method == "standard" else [0.004]
            assert [each["learning_rate"] for each in found] == pytest.approx(rates, abs=1e-6)
            assert {point["step"] for each in found for point in each["points"]} == {4, 8}


def test_gains_are_the_distance_to_the_curve_and_intervals_those_of_a_t_test(results: Results) -> None:
    num_inside = 0
    for method, found in results["methods"].items():
        for budget, figure in found["figures"].items():
            gains = []
            for curve, choice in zip(results["curves"], figure["choices"], strict=True):
                x, y = curve["target_loss"], curve["retained_loss"]
                target = choice["target_loss"]
                if len(x) < 2 or not x[0] <= target <= x[-1]:
                    assert choice["gain"] is None or len(x) == 1 or method == "standard"
                    continue
                expected = float(PchipInterpolator(x, y)(target)) - choice["retained_loss"]
                assert choice["gain"] == pytest.approx(expected, abs=1e-4)
                gains.append(choice["gain"])
            num_inside += len(gains)
            interval = found["gains"][budget]
            if len(gains) == 2 and gains[0] != gains[1]:
                low, high = stats.ttest_1samp(gains, 0.0).confidence_interval(0.95)
                assert interval["mean"] == pytest.approx((low + high) / 2, abs=1e-5)
                assert interval["half_width"] == pytest.approx((high - low) / 2, rel=1e-3, abs=1e-4)
            assert figure["num_outside"] + interval["num"] == 2
    assert num_inside > 5


def test_flops_are_those_of_the_formula_and_equal_flops_are_within_standards(results: Results) -> None:
    num = results["reference"]["num_parameters"]
    allowance = max(each["points"][-1]["flops"] for each in runs_of(results, "standard"))
    for each in results["runs"]:
        rate = 4 * each["num_parameters"] + 2 * each["num_trained"]
        for point in each["points"]:
            assert point["flops"] == pytest.approx(rate * point["train_tokens"] + 2 * num * point["score_tokens"])
    afforded = {}
    for method in ("lora", "hft", "flow", "permuted"):
        (each,) = runs_of(results, method, "equal_flops")
        afforded[method] = each["points"][-1]["step"]
        assert each["points"][-1]["flops"] <= allowance
    assert afforded["lora"] > 8
    assert afforded["hft"] >= 8
    assert afforded["flow"] < 8
    assert not runs_of(results, "l2", "equal_flops")
    wise = results["methods"]["wise"]
    assert wise["figures"]["equal_flops"] == wise["figures"]["equal_steps"]
    assert results["methods"]["lora"]["flops_ratio"] < 0.8 < 1.2 < results["methods"]["flow"]["flops_ratio"]


def test_wise_lies_between_the_reference_and_the_run_that_it_takes(results: Results) -> None:
    for name, base in (("wise", "standard"), ("flow+wise", "flow")):
        (between,) = runs_of(results, name)
        tuned = next(each for each in runs_of(results, base) if each["learning_rate"] == 0.004)
        for point, end in zip(between["points"], tuned["points"], strict=True):
            assert point["alpha"] == 0.5
            assert point["distance"] == pytest.approx(end["distance"] / 2, abs=1e-5)
            assert point["flops"] == end["flops"]
            low, high = sorted([results["reference"]["validation"]["target_loss"], end["target_loss"]])
            assert low < point["target_loss"] < high


def test_the_table_is_printed_as_it_is_written_and_shown_on_a_page_that_loads_nothing(
    place: Place, finished: Path, results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compare", **place.options(out=finished, methods=METHODS, seeds=2)) == 0
    printed = capsys.readouterr().out
    table = (finished / "table.md").read_text()
    assert table in printed
    assert re.search(r"(\d+) cells, \1 of them finished before", printed)
    assert "4N + 2T a trained token" in table
    assert results["verdict"] in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(METHODS.split(","))
    assert len({len(line) for line in lines}) == 1
    document = (finished / "report.html").read_text()
    page = read_alone(document)
    assert document.count("<svg ") == 3
    for row in results["table"][1]:
        for cell in row:
            assert cell in page.text
    assert not list(finished.glob("seed-*/parameters"))


def test_the_test_split_decides_nothing(place: Place, finished: Path, results: Results, tmp_path: Path) -> None:
    methods = "l2,wise"
    found = []
    for seed in (1, 2):
        test = write_lines(tmp_path / f"{seed}.jsonl", problems(12, seed=seed))
        validation = write_lines(tmp_path / "validation.jsonl", problems(12, seed=9))
        # What is in both is left out of the training set: these have nothing to do with it.
        asked = place.options(test=test, validation=validation, methods=methods, seeds=1, strengths="1,300")
        data = write_lines(tmp_path / "train.jsonl", problems(40, seed=5))
        out = tmp_path / f"out-{seed}"
        assert run("compare", **asked | {"data": data, "out": out, "steps": 4}) == 0
        found.append(json.loads((out / "results.json").read_text()))
    one, other = found
    assert choices(one) == choices(other)
    assert [each["points"] for each in one["runs"]] == [each["points"] for each in other["runs"]]
    assert one["curves"][0]["target_loss"] != other["curves"][0]["target_loss"]
    assert not list(tmp_path.glob("*/losses*"))  # no method asks for them: nothing is scored
    assert one["reference"]["tau"] is None
    assert "ESS/n" not in (tmp_path / "out-1" / "report.html").read_text()


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    lives = Lives()
    yield lives
    lives.close()


ASKED = {"methods": "l2,wise,flow", "seeds": 1, "steps": 4}
REACHED = "seed-0/cells/equal_steps,l2,0.004,strength=300.0.json"


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    out = place.folder / "whole"
    assert run("compare", **place.options(out=out, **ASKED)) == 0
    return out


def assert_goes_on(out: Path, whole: Path, times: dict[Path, int], printed: str) -> None:
    """What was finished is as it was, and all that is found is the same, to the bit."""
    assert 3 <= len(times) <= len(cells(whole))
    num_trained = sum("wise" not in path.name for path in times)
    assert f"cells, {num_trained} of them finished before" in printed
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert cells(out) == cells(whole)
    for name in ("table.md", "seed-0/test.json", "reference.json"):
        assert (out / name).read_text() == (whole / name).read_text()


def times_of(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob("seed-*/cells/*.json")}


def test_interrupted_by_the_user_it_goes_on_to_the_same_bits(
    place: Place, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def press() -> None:
        while not (tmp_path / REACHED).exists():
            time.sleep(1e-3)
        _thread.interrupt_main()

    thread = threading.Thread(target=press)
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    try:
        thread.start()
        assert run("compare", **place.options(out=tmp_path, **ASKED)) == 130
        thread.join()
    finally:
        signal.signal(signal.SIGINT, heard)
    times = times_of(tmp_path)
    assert run("compare", **place.options(out=tmp_path, **ASKED)) == 0
    assert_goes_on(tmp_path, whole, times, capsys.readouterr().out)


@pytest.mark.soak
@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1, 0.3])
def test_killed_in_the_middle_it_goes_on_to_the_same_bits(
    place: Place, whole: Path, lives: Lives, tmp_path: Path, delay: float
) -> None:
    asked = place.options(out=tmp_path, **ASKED)
    assert lives.live("compare", until=tmp_path / REACHED, delay=delay, **asked).status == -9
    times = times_of(tmp_path)
    end = lives.live("compare", **asked)
    assert end.status == 0, end.stderr
    assert_goes_on(tmp_path, whole, times, end.stdout)


def test_a_damaged_cell_is_named_and_trained_again_once_it_is_removed(
    place: Place, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in ("equal_steps,flow,0.004", "equal_steps,wise,0.004"):
        path = out / "seed-0" / "cells" / f"{name}.json"
        path.write_text(path.read_text()[:100])
        assert run("compare", **place.options(out=out, **ASKED)) == 1
        (err,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("run ")]
        assert f"{path} is damaged" in err
        assert "remove it, and it is trained again" in err
        path.unlink()
        assert run("compare", **place.options(out=out, **ASKED)) == 0
        assert cells(out) == cells(whole)
    assert (out / "table.md").read_text() == (whole / "table.md").read_text()


def test_seeds_may_be_added_and_nothing_else_may_change(
    place: Place, finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    same = place.options(out=out, methods=METHODS, seeds=1)
    assert run("compare", **same) == 0
    assert "One seed has no confidence interval" in capsys.readouterr().out
    for changed, told in (
        ({"steps": 5}, "--steps was 8, and now it is 5"),
        ({"lrs": "1e-3"}, "--lrs was 0.004, and now it is 0.001"),
        ({"methods": "standard,flow"}, "--methods was standard,l2"),
        ({"max_length": 64}, "--max-length was 32, and now it is 64"),
        ({"max_samples": 20}, "--max-samples was not given, and now it is 20"),
    ):
        assert run("compare", **same | changed) == 1
        err = capsys.readouterr().err
        assert told in err
        assert err.count("\n") == 1
    weights = Path(place.model) / "model.safetensors"
    before = load_file(weights)
    shutil.copy(weights, tmp_path / "kept.safetensors")
    try:
        before["model.norm.weight"][0] += 1e-3
        save_file(before, weights, {"format": "pt"})
        assert run("compare", **same) == 1
        assert "the weights of --model have changed. Give another --out" in capsys.readouterr().err
    finally:
        shutil.copy(tmp_path / "kept.safetensors", weights)
    other = write_lines(tmp_path / "train.jsonl", problems(60, seed=3))
    shutil.copy(place.data, tmp_path / "kept.jsonl")
    try:
        shutil.copy(other, place.data)
        assert run("compare", **same) == 1
        assert "what is in --data, --general" in capsys.readouterr().err
    finally:
        shutil.copy(tmp_path / "kept.jsonl", place.data)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"methods": "flow,best"}, "there is no best; a method is one of standard"),
        ({"methods": "l1+l2"}, "exclude each other"),
        ({"lrs": "1e-3,fast"}, "--lrs is 1e-3,fast: give numbers with commas between"),
        ({"lrs": "1e-3,0.001"}, "give each once"),
        ({"lrs": "-1"}, "give numbers above 0"),
        ({"steps": 0}, "--steps is 0: give 1 or more"),
        ({"measured_at": "0.5,2"}, "--measured-at is 0.5,2: give shares above 0, up to 1"),
        ({"alphas": "0"}, "--alphas is 0"),
        ({"fraction": 0}, "--fraction is 0.0"),
        ({"budgets": "equal-time"}, "there are equal-steps and equal-flops"),
        ({"budgets": "equal-flops"}, "--budgets needs equal-steps"),
        ({"quick": True}, "--quick is a size of the demo's model"),
        ({"model": "./nowhere"}, "there is no folder ./nowhere"),
        ({"data": "nowhere.jsonl"}, "there is no file nowhere.jsonl"),
        ({"general": "nowhere.txt"}, "nowhere.txt"),
        ({"max_samples": 0}, "--max-samples is 0: give 1 or more"),
        ({"max_samples": 3}, "there are 3 samples to learn, and a batch has 4"),
        ({"validation": "TEST", "test": "TEST"}, "12 samples that are in --validation"),
        ({"batch_size": 50}, "samples to learn, and a batch has 50"),
        ({"max_length": 64, "general": "SHORT"}, "validation and test need one each"),
        ({"data": "FEW"}, "too few to split a validation set off: give --validation"),
    ],
)
def test_mistakes_are_told_in_one_line_that_says_what_to_do(
    place: Place, options: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("how are you")
    few = write_lines(tmp_path / "few.jsonl", problems(5))
    named = {"SHORT": str(short), "FEW": few, "TEST": place.test}
    asked = {name: named.get(value, value) for name, value in options.items()}
    assert run("compare", **place.options(out=tmp_path / "out", seeds=1) | asked) == 1
    err = capsys.readouterr().err
    assert err.startswith("flowstream: ")
    assert told in err
    assert err.count("\n") == 1, err
    assert not list(tmp_path.glob("out/*"))  # and once it is mended, nothing is in the way


def test_options_that_belong_together_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", model="somewhere", out=tmp_path / "out") == 1
    assert "--model goes with --data: give --model, --data and --general" in capsys.readouterr().err
    assert run("compare", test="test.jsonl", out=tmp_path / "out") == 1
    assert "--validation and --test go with --model" in capsys.readouterr().err
    (tmp_path / "letter.txt").touch()
    assert run("compare", out=tmp_path) == 1
    assert "holds other files, and no comparison" in capsys.readouterr().err


@pytest.mark.soak
def test_the_other_methods_run_from_end_to_end(place: Place, tmp_path: Path) -> None:
    methods = "l1,dro,mofo,flow-token,resample,flow+l2,flow+lora"
    assert run("compare", **place.options(out=tmp_path, methods=methods, seeds=1, steps=4, lrs="2e-3")) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["methods"]) == ["standard", *methods.split(",")]
    distances = set()
    for method, found in results["methods"].items():
        (chosen,) = found["figures"]["equal_steps"]["choices"]
        distances.add(chosen["distance"])
        scores = method in ("flow-token", "resample", "flow+l2", "flow+lora")
        assert all((each["points"][-1]["score_tokens"] > 0) is scores for each in runs_of(results, method))
        assert runs_of(results, method)[0]["strength"] == (300 if method[-2:] in ("l1", "l2") else None)
    assert len(distances) == len(results["methods"])


@pytest.mark.soak
def test_without_a_model_the_demos_is_trained_on_the_spot_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {
        "quick": True,
        "methods": "standard,flow",
        "steps": 8,
        "batch_size": 4,
        "out": tmp_path / "o",
    }
    assert run("compare", **asked, seeds=1, processes=1) == 0
    trained = (tmp_path / "o" / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    assert run("compare", **asked, seeds=2, processes=2) == 0
    assert (tmp_path / "o" / "checkpoint" / "model.safetensors").stat().st_mtime_ns == trained
    assert "| standard |" in capsys.readouterr().out
