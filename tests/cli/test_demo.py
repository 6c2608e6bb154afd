"""`flowstream demo` as a user runs it, and the way in."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowstream.cli.__main__ import main

ROOT = Path(__file__).parents[2]
METHODS = {"standard", "exact", "weighted", "resampled", "permuted", "subsampled"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A quick run in a process of its own: its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "flowstream", "demo", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def results(finished: tuple[Path, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished[0] / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def report(finished: tuple[Path, str]) -> str:
    return (finished[0] / "report.html").read_text()


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from numbers(entry)
    elif isinstance(value, int | float):
        yield value


def test_every_method_ran_at_every_learning_rate_for_every_seed(results: dict[str, Any]) -> None:
    rates, seeds = results["settings"]["learning_rates"], results["settings"]["seeds"]
    assert seeds == [0, 1]
    runs = [
        (run["method"], run["learning_rate"], run["seed"]) for run in results["runs"] if run["budget"] == "equal_steps"
    ]
    grid = [(method, rate, seed) for method in METHODS for rate in rates for seed in seeds]
    between = [run for run in runs if run[1] not in rates]
    assert sorted(run for run in runs if run[1] in rates) == sorted(grid)
    assert [(method, seed) for method, _, seed in between] == [("standard", seed) for seed in seeds]
    assert all(rate == pytest.approx(math.sqrt(rates[0] * rates[1]), abs=1e-6) for _, rate, _ in between)


def test_every_run_was_measured_along_the_way_with_finite_losses(results: dict[str, Any]) -> None:
    for run in results["runs"]:
        steps = [point["step"] for point in run["points"]]
        assert steps == sorted(steps)
        if run["budget"] == "equal_steps":
            assert len(steps) == 3
            assert steps[-1] == results["settings"]["steps"]
        assert all(math.isfinite(number) for number in numbers(run))
        assert all(0 <= point["exact_match"] <= 1 for point in run["points"])
        targets = [point["target_loss"] for point in run["points"]]
        assert targets[-1] < results["reference"]["validation"]["target_loss"] or steps[-1] < 4


def test_online_tau_is_within_a_few_percent_of_the_exact_median(results: dict[str, Any]) -> None:
    temperature = results["temperature"]
    losses = sorted(number for level in results["loss_by_level"].values() for number in level)
    assert len(losses) == results["settings"]["num_problems"]
    assert temperature["exact"] == pytest.approx(losses[(len(losses) - 1) // 2], abs=1e-5)
    assert temperature["relative_error"] < 0.03
    assert 0 < temperature["exact_ess"] <= 1
    for windows in temperature["online"].values():
        assert len(windows) >= 3
        assert all(window["tau"] == pytest.approx(temperature["exact"], rel=0.1) for window in windows)
        assert all(window["tau_error"] > 0 for window in windows)


def test_scoring_is_charged_where_there_is_any(results: dict[str, Any]) -> None:
    methods = results["methods"]
    assert set(methods) == METHODS
    assert methods["standard"]["flops_ratio"] == pytest.approx(1)
    for method, result in methods.items():
        scores = method in {"exact", "weighted", "resampled", "permuted"}
        assert (result["score_share"] > 0.1) == scores
        assert (result["score_share"] == 0) != scores
    assert methods["subsampled"]["num_samples"] == pytest.approx(methods["resampled"]["num_samples"], rel=0.1)
    assert 0.2 < methods["resampled"]["acceptance"] < 0.6


def test_figures_are_paired_by_seed_and_equal_flops_are_within_standards(results: dict[str, Any]) -> None:
    allowance = {
        seed: max(
            run["points"][-1]["flops"] for run in results["runs"] if (run["method"], run["seed"]) == ("standard", seed)
        )
        for seed in results["settings"]["seeds"]
    }
    shorter = [run for run in results["runs"] if run["budget"] == "equal_flops"]
    assert {run["method"] for run in shorter} >= {"weighted", "resampled", "permuted"}
    for run in shorter:
        assert 0.6 * allowance[run["seed"]] < run["points"][-1]["flops"] <= allowance[run["seed"]]
    for result in results["methods"].values():
        assert [choice["seed"] for choice in result["equal_steps"]["choices"]] == [0, 1]
        gains = [c["gain"] for c in result["equal_steps"]["choices"] if c["gain"] is not None]
        assert result["equal_steps"]["num_outside"] == 2 - len(gains)
        if gains:
            assert result["equal_steps"]["mean"] == pytest.approx(sum(gains) / len(gains), abs=2e-6)
    assert all(choice["gain"] == 0 for choice in results["methods"]["standard"]["equal_steps"]["choices"])
    assert results["methods"]["permuted"]["over_permuted"] in ([0, 0], [0, None], [None, 0], [None, None])


def test_the_report_loads_nothing_from_elsewhere(report: str) -> None:
    assert not re.search(r"""(?:src|href)\s*=\s*(?:["'](?!#)|[^"'\s])""", report)
    assert not re.search(r"@import|url\((?!['\"]?#)|<(?:script|link|iframe|img|object)\b", report)
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"'<\s]+", report)) <= namespaces


def test_the_report_shows_every_method_and_figure(report: str, results: dict[str, Any]) -> None:
    assert report.count("<svg ") == report.count("</svg>") == 5
    for result in results["methods"].values():
        assert report.count(result["title"]) >= 3
    for word in (
        "tau_error",
        "Retention against target",
        "equal FLOPs",
        "effective sample size",
        results["versions"]["torch"],
    ):
        assert word in report


def test_the_terminal_shows_the_table_and_the_path_of_the_report(finished: tuple[Path, str]) -> None:
    out, printed = finished
    assert "Above standard's curve on every seed" in " ".join(printed.split())
    assert "report.html" in printed
    assert {path.name for path in out.iterdir()} == {"checkpoint", "report.html", "results.json", "shards"}
    assert len(list((out / "shards").glob("*.tar"))) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "at least 1"),
        (["--steps", "2"], "at least 8"),
        (["--learning-rates", "-1.0"], "above 0"),
    ],
)
def test_impossible_options_are_refused_in_words(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_the_command_line_imports_no_torch_before_a_command_needs_it() -> None:
    """The package's own `__init__` is replaced by an empty one: what it imports is not the command line's."""
    program = f"""
import sys, types
package = types.ModuleType("flowstream")
package.__path__ = [{str(ROOT / "flowstream")!r}]
sys.modules["flowstream"] = package
from flowstream.cli.__main__ import main
try:
    main(["demo", "--help"])
except SystemExit:
    pass
heavy = {{"torch", "transformers", "matplotlib", "webdataset"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout
