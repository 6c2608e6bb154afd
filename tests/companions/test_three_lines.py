"""Beside the stream each companion takes three lines at most: those that the loops of its tests mark."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

COMPANIONS = ("reference_distance", "wise_ft", "mofo", "half_fine_tuning", "dro", "lora")


@pytest.mark.parametrize("companion", COMPANIONS)
def test_a_companion_takes_at_most_three_lines_of_a_loop_over_the_stream(companion: str) -> None:
    text = (Path(__file__).parent / f"test_{companion}.py").read_text("utf-8")
    loops = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    counts = []
    for loop in loops:
        source = ast.get_source_segment(text, loop) or ""
        if "for batch in stream" in source:
            counts.append(source.count("# companion"))
    assert counts
    assert all(1 <= count <= 3 for count in counts)
