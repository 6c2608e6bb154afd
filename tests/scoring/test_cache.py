"""The keys of a loss cache, and a second epoch through a stream that scores nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flowstream as fs
from flowstream.scoring.cache import Namespace, content_key, row_key

ROOT = Path(__file__).parents[2]


def test_keys_tell_namespaces_contents_and_rows_apart() -> None:
    ids, a, b = np.arange(4), Namespace("a", "sample"), Namespace("b", "sample")
    keys = [
        content_key(a, ids, ids),
        content_key(b, ids, ids),
        content_key(a, ids, ids[::-1]),
        content_key(a, ids[:2], ids[:2]),
        row_key(a, 1),
        row_key(a, "1"),
        row_key(a, 1, index=1),
        row_key(a, 1, count=2),
        row_key(b, 1),
        row_key(Namespace("a", "token"), 1),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 24 for key in keys)
    assert row_key(a, torch.tensor(1)) == row_key(a, np.int64(1)) == row_key(a, 1)


def test_keys_begin_with_their_namespace_whose_label_is_for_people_only() -> None:
    namespace, renamed = Namespace("a", "sample", "one"), Namespace("a", "sample", "other")
    assert content_key(namespace, b"x")[:8] == row_key(namespace, 1)[:8] == namespace.prefix == renamed.prefix


# Through a stream: `calls` counts forward passes of the reference


def _batches(seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 97, (8, 12), generator=generator) for _ in range(10)]
    return [{"input_ids": row, "labels": row.masked_fill(row < 20, -100)} for row in ids]


def _epochs(model: Any, cache: Any, level: str, num: int = 2) -> tuple[list[Tensor], list[int], dict[str, float]]:
    """The weights of each epoch, forward passes up to its end, and the metrics after the last."""
    scorer = fs.CausalLMScorer(model.requires_grad_(False), copy=False)
    calls: list[object] = []
    # Of the first layer: however a scorer enters its model, it comes through here.
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(None))
    weights, counts = [], []
    with fs.FlowStream(
        _batches(), scorer, cache=cache, level=level, temperature=fs.FixedTemperature(1.0), window=2
    ) as stream:
        for _ in range(num):
            weights.append(torch.cat([batch["flow_weight"] for batch in stream]))
            counts.append(len(calls))
        metrics = stream.metrics()
    handle.remove()
    return weights, counts, metrics


@pytest.mark.parametrize("level", ["sample", "token"])
@pytest.mark.parametrize("kind", ["memory", "path"])
def test_a_second_epoch_scores_nothing_and_weighs_the_same_to_the_bit(
    tiny: Callable[..., Any], tmp_path: Path, kind: str, level: str
) -> None:
    (first, second), (before, after), metrics = _epochs(
        tiny("llama"), "memory" if kind == "memory" else tmp_path / "losses", level
    )
    assert before == after > 0
    assert torch.equal(first, second)
    assert metrics["flow/cache_hit_rate"] == 0.5  # of both epochs


def test_without_a_cache_every_epoch_is_scored(tiny: Callable[..., Any]) -> None:
    _, (before, after), _ = _epochs(tiny("llama"), None, "sample")
    assert after > before


def test_a_new_process_with_the_same_path_scores_nothing(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """A stream in a process of its own fills the path; here the same model, built anew, reads it."""
    path = tmp_path / "losses"
    program = f"""
import sys
sys.path[:0] = {[str(ROOT / "tests"), str(ROOT / "tests" / "scoring")]!r}
from conftest import build
from test_cache import _epochs
(weights,), (calls,), _ = _epochs(build("llama"), {str(path)!r}, "sample", 1)
assert calls > 0
print(weights.numpy().tobytes().hex())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (weights,), (calls,), metrics = _epochs(tiny("llama"), str(path), "sample", 1)
    assert calls == 0
    assert metrics["flow/cache_hit_rate"] == 1.0
    assert weights.numpy().tobytes().hex() == done.stdout.strip()


def test_another_reference_dtype_or_level_finds_nothing(tiny: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "losses"
    _epochs(tiny("llama"), path, "sample", 1)
    other = tiny("llama")
    with torch.no_grad():
        other.model.embed_tokens.weight += 0.01
    for model, level in ((other, "sample"), (tiny("llama").bfloat16(), "sample"), (tiny("llama"), "token")):
        _, (calls,), metrics = _epochs(model, path, level, 1)
        assert calls > 0
        assert metrics["flow/cache_hit_rate"] == 0.0
    assert _epochs(tiny("llama"), path, "sample", 1)[1] == [0]


def test_two_streams_share_a_path_in_one_process(tiny: Callable[..., Any], tmp_path: Path) -> None:
    scorer = fs.CausalLMScorer(tiny("llama"))
    with (
        fs.FlowStream(_batches(), scorer, cache=tmp_path) as one,
        fs.FlowStream(_batches(), scorer, cache=f"{tmp_path}/../{tmp_path.name}") as other,
    ):
        weights = [batch["flow_weight"] for batch in one]
        one.close()
        again = [batch["flow_weight"] for batch in other]
        assert other.metrics()["flow/cache_hit_rate"] == 1.0
    assert torch.equal(torch.cat(weights), torch.cat(again))


def test_augmented_rows_are_known_by_name(tiny: Callable[..., Any], tmp_path: Path) -> None:
    named = [batch | {"name": [f"{at} {row}" for row in range(8)]} for at, batch in enumerate(_batches())]
    augmented = [
        new | {"labels": old["labels"], "name": old["name"]} for new, old in zip(_batches(1), named, strict=True)
    ]
    scorer = fs.CausalLMScorer(tiny("llama"))
    weights = []
    for batches in (named, augmented):
        with fs.FlowStream(
            batches, scorer, cache=tmp_path, cache_key="name", temperature=fs.FixedTemperature(1.0)
        ) as stream:
            weights.append(torch.cat([batch["flow_weight"] for batch in stream]))
            rate = stream.metrics()["flow/cache_hit_rate"]
    assert rate == 1.0
    assert torch.equal(*weights)


@pytest.mark.parametrize("cache", [True, 3, "", b"losses", object()])
def test_what_is_no_cache_is_refused(tiny: Callable[..., Any], cache: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="cache is"):
        fs.FlowStream(_batches(), fs.FunctionScorer(len), cache=cache)
