"""One test for all loaders: a stream that is stopped anywhere, and resumed twice, delivers what it would have."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import loader_recipes
import pytest
import torch
from loader_recipes import EVERY_STOP, RECIPES, outcome, resumed, same, stream_over, uninterrupted

import flowstream as fs

README = Path(__file__).parents[2] / "README.md"
EXACT = [name for name, recipe in RECIPES.items() if recipe.exact]
EVER_EXACT = [name for name in EXACT if RECIPES[name].next_exact]
ALONE = [name for name in RECIPES if "workers" not in name]
"""Without workers, which take long to start."""


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    loader_recipes.write_shards(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "mode"),
    [*product(RECIPES, ["weight"]), *product(RECIPES if EVERY_STOP else ALONE, ["resample"])],
)
def test_resumed_stream_equals_uninterrupted_stream_over_every_loader(name, mode, at):
    found = outcome(name, at, mode)
    assert (found.this_epoch, found.next_epoch) == (RECIPES[name].exact, RECIPES[name].next_exact)
    assert (found.this_epoch and found.next_epoch) or found.told


def test_the_readme_has_the_table_that_was_measured(at):
    text = README.read_text()
    begin, end = "<!-- what resumes exactly: written by tests/sources/write_table.py -->\n", "\n<!-- end -->"
    assert begin in text
    assert end in text
    found = text.split(begin)[1].split(end)[0]
    assert found == loader_recipes.table(at), "python tests/sources/write_table.py writes it anew"


# -- a language model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer(tiny: Callable[..., Any]) -> fs.CausalLMScorer:
    return fs.CausalLMScorer(tiny("llama"))


SOME = [("weight", "sample", "path"), ("weight", "token", "none")]
REST = [("weight", "sample", "none"), ("weight", "token", "path"), ("resample", "sample", "none")]
REST += [("resample", "sample", "path")]


@pytest.mark.parametrize(("mode", "level", "cache"), SOME + REST if EVERY_STOP else SOME)
@pytest.mark.parametrize("name", EVER_EXACT if EVERY_STOP else [n for n in EXACT if n in ALONE])
def test_a_language_models_losses_and_weights_are_the_same_bits(name, mode, level, cache, at, scorer, tmp_path):
    def streams() -> fs.FlowStream:
        path = None if cache == "none" else tmp_path / "losses"
        return stream_over(RECIPES[name].make(at), scorer=scorer, mode=mode, level=level, cache=path)

    whole = uninterrupted(streams())
    everywhere = range(len(whole.batches) - 4)
    for stop in everywhere if EVERY_STOP else range(9) if name == "list, `Sequence`" else (4, 13):
        rest = resumed(streams, whole.states[stop], 4)
        assert all(map(same, rest, whole.batches[stop : stop + 4])), stop


def test_losses_in_the_memory_cache_are_scored_again_in_a_later_epoch(at, scorer):
    def streams() -> fs.FlowStream:
        return stream_over(RECIPES["`DataLoader`, in order"].make(at), scorer=scorer, cache="memory")

    whole = uninterrupted(streams())
    for stop in range(9, 15):
        for one, other in zip(resumed(streams, whole.states[stop], 4), whole.batches[stop : stop + 4], strict=True):
            assert torch.equal(one["id"], other["id"])
            for key in ("flow_weight", "flow_loss", "flow_tau"):
                torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=1e-5)


def test_a_bf16_reference_is_resumed_to_the_bit_with_stored_losses_and_closely_without(at, tiny, tmp_path):
    scorer = fs.CausalLMScorer(tiny("llama").to(torch.bfloat16))

    def streams(cache: Any) -> fs.FlowStream:
        return stream_over(RECIPES["`DataLoader`, in order"].make(at), scorer=scorer, cache=cache)

    for cache in (None, str(tmp_path / "losses")):
        whole = uninterrupted(streams(cache))
        for stop in (1, 4, 8, 13):
            rest = resumed(partial(streams, cache), whole.states[stop], 4)
            for place, (one, other) in enumerate(zip(rest, whole.batches[stop:], strict=False), start=stop):
                if cache is not None or place // 3 == stop // 3:  # the window in flight: its losses are in the state
                    assert same(one, other)
                assert torch.equal(one["id"], other["id"])
                torch.testing.assert_close(one["flow_loss"], other["flow_loss"], rtol=0.0, atol=0.03)


# -- a new process ---------------------------------------------------------------------------------

NEW_PROCESS = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import loader_recipes
from loader_recipes import RECIPES, resumed, stream_over
out = {}
for (name, mode, stop), (state, num) in torch.load(sys.argv[2], weights_only=True).items():
    make = RECIPES[name].make
    out[name, mode, stop] = resumed(lambda: stream_over(make(Path(sys.argv[3])), mode=mode), state, num)
torch.save(out, sys.argv[4])
"""


def test_a_new_process_resumes_every_loader_to_the_bit(at, tmp_path, request):
    cases, expected = {}, {}
    for name in EXACT:
        if name not in ALONE and not EVERY_STOP:
            continue
        for mode, stops, num in (("weight", (4, 13), 4), ("resample", (1,), 2)):
            whole = uninterrupted(stream_over(RECIPES[name].make(at), mode=mode))
            for stop in stops:
                cases[name, mode, stop] = whole.states[stop], num
                expected[name, mode, stop] = whole.batches[stop : stop + num]
    torch.save(cases, tmp_path / "states.pt")
    tests = str(request.config.rootpath / "tests")
    command = [sys.executable, "-c", NEW_PROCESS, tests, *map(str, (tmp_path / "states.pt", at, tmp_path / "out.pt"))]
    subprocess.run(command, check=True)
    for case, rest in torch.load(tmp_path / "out.pt", weights_only=True).items():
        assert all(map(same, rest, expected[case])), case
        assert len(rest) == len(expected[case])


IN_MEMORY = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import flowstream as fs
from conftest import build
from loader_recipes import RECIPES, resumed, stream_over
make, scorer = RECIPES["`DataLoader`, in order"].make, fs.CausalLMScorer(build("llama"))
streams = lambda: stream_over(make(Path(sys.argv[3])), scorer=scorer, cache="memory")
torch.save({s: resumed(streams, state, 4) for s, state in torch.load(sys.argv[2]).items()}, sys.argv[4])
"""


def test_a_new_process_scores_again_what_was_in_the_memory_cache(at, scorer, tmp_path, request):
    whole = uninterrupted(stream_over(RECIPES["`DataLoader`, in order"].make(at), scorer=scorer, cache="memory"))
    torch.save({stop: whole.states[stop] for stop in (2, 10, 13)}, tmp_path / "states.pt")
    tests = str(request.config.rootpath / "tests")
    command = [sys.executable, "-c", IN_MEMORY, tests, *map(str, (tmp_path / "states.pt", at, tmp_path / "out.pt"))]
    subprocess.run(command, check=True)
    for stop, rest in torch.load(tmp_path / "out.pt").items():
        assert len(rest) == 4
        for one, other in zip(rest, whole.batches[stop:], strict=False):
            assert torch.equal(one["id"], other["id"])
            for key in ("flow_weight", "flow_loss", "flow_tau"):
                torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=1e-5)
