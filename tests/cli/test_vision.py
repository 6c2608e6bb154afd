"""`flowstream vision` as it is typed: a whole run on digits, and what it says of mistakes, in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from finetuning import run

from flowstream.cli.vision import Vision
from flowstream.vision import models, task
from flowstream.vision.evaluation import measure
from flowstream.vision.models import load_model
from flowstream.vision.task import digits

SHORT = {"epochs": 2, "probe_epochs": 2, "head_epochs": 1}


def failed(capsys: Any, **options: object) -> str:
    assert run("vision", **options) == 1
    found = capsys.readouterr()
    assert found.err.startswith("flowstream: ")
    assert found.err.count("\n") == 1, found.err
    return str(found.err)


def test_a_run_learns_new_digits_and_writes_what_it_reports(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "PRETRAINING_EPOCHS", 4)
    assert run("vision", **SHORT, lr=0.02, exact_tau=True, method="flow+l2", out=tmp_path / "out") == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for name in ("probe", "flow+l2"):
        row = results[name]
        assert (
            f"{name:<16} target {row['target']['accuracy']:.4f}   original {row['original']['accuracy']:.4f}\n"
            in printed
        )
    assert results["flow+l2"]["target"]["loss"] < results["probe"]["target"]["loss"]
    assert results["probe"]["original"]["accuracy"] > 0.8
    assert f"τ {results['tau']:.4f} nats" in printed
    assert results["settings"]["exact_tau"] == "True"
    model = load_model(str(tmp_path / "out"))
    assert measure(model, digits(seed=0)[1].test).accuracy == pytest.approx(results["flow+l2"]["target"]["accuracy"])
    capsys.readouterr()
    assert "is there already: give a folder that is new or empty" in failed(capsys, out=tmp_path / "out")


def test_mistakes_are_told_in_one_line_that_says_what_to_do(capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for options, told in (
        ({"method": "flwo"}, "method 'flwo': give one of standard, flow, permuted, resample, or companions, l2"),
        ({"method": "flow+dro"}, "take one of both"),
        ({"epochs": 0}, "--epochs is 0: give 1 or more"),
        ({"batch_size": 0}, "--batch-size is 0: give 1 or more"),
        ({"lr": "-1"}, "--lr is -1.0: give numbers above 0"),
        ({"tau": 0}, "--tau is 0.0: give numbers above 0"),
        ({"tau": 1, "exact_tau": True}, "--target-ess all choose τ: give one of them"),
        ({"target_ess": 0.5, "exact_tau": True}, "give one of them"),
        ({"target_ess": 1}, "--target-ess is 1.0: give a share between 0 and 1"),
        ({"mixup": -1}, "--mixup is -1.0: give a number above 0, such as 0.2, or 0 for none"),
        ({"seed": -1}, "--seed is -1: give 0 or more"),
        ({"dataset": "cifar10"}, "do not fit: digits are 16 x 16 in grey"),
        ({"model": "timm:resnet18"}, "do not fit"),
        ({"dataset": "cifr10"}, "--dataset cifr10: there is no such folder, and no data set but digits, cifar10"),
        ({"original": tmp_path}, "--original is for other models"),
        ({"out": tmp_path / "file"}, "is there already"),
        ({"out": tmp_path / "file" / "out"}, "cannot be made (Not a directory)"),
    ):
        assert told in failed(capsys, **options), options


@pytest.mark.parametrize("name", ["torchvision", "sklearn"])
def test_a_package_that_is_missing_is_told(name: str, capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    for module in [key for key in sys.modules if key.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    task._all_digits.cache_clear()
    options = {} if name == "sklearn" else {"model": "timm:resnet18", "dataset": "cifar10", "data": tmp_path}
    assert "pip install 'flowstream[vision]'" in failed(capsys, **options)


def test_models_of_hugging_face_are_looked_for_in_their_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        load_model(str(tmp_path / "no"))
    with pytest.raises(ValueError, match="--weights is for timm: and torchvision: models"):
        load_model("some/model", weights=tmp_path)


def test_help_describes_every_option(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        run("vision", "--help")
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "None" not in told
    for name in Vision.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in told


def test_all_images_of_the_users_own(capsys: Any, tmp_path: Path) -> None:
    """resnet18 of random weights, on files in CIFAR-10's place: the way of every other model and data set."""
    torchvision = pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    import numpy as np
    import torch
    from PIL import Image

    draws = np.random.default_rng(0)
    for part in ("train", "test", "original"):
        for kind in "ab":
            (folder := tmp_path / part / kind).mkdir(parents=True)
            for number in range(12):
                pixels = draws.integers(0, 128, (36, 36, 3), dtype=np.uint8) + 127 * (kind == "b")
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pt")
    options = {"model": "torchvision:resnet18", "weights": tmp_path / "weights.pt", "dataset": tmp_path}
    options |= {"original": tmp_path / "original", "size": 32, "batch_size": 8}
    assert run("vision", "--lr", 0.001, 0.01, **options, **SHORT, out=tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "2 classes: 22 images to train on, 2 to choose by, 24 to test" in printed
    assert printed.count("validation accuracy") == 2
    state = torch.load(tmp_path / "out" / "model.pt")
    assert state["fc.weight"].shape == (2, 512)
