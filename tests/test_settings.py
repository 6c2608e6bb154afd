"""What a stream is asked to do: the window's size, and the words that a state must agree with."""

from __future__ import annotations

import pytest

import flowstream as fs
from flowstream.settings import Settings, window_size


@pytest.mark.parametrize(
    ("num_samples", "num_bytes", "arguments", "expected"),
    [
        (64, 1000, {}, 8),  # at least 8 batches
        (8, 1000, {}, 32),  # at least 256 samples
        (1, 1000, {}, 256),
        (64, 1000, {"accumulate": 3}, 9),  # a multiple of accumulate
        (64, 1000, {"accumulate": 8}, 16),  # two optimizer steps: trainers pull all batches of one at once
        (64, 1000, {"accumulate": 5}, 10),
        (64, 1000, {"accumulate": 16, "mode": "resample"}, 32),
        (64, 1000, {"accumulate": 16, "window": 16}, 16),  # who gives a number gets it
        (64, 100, {"max_window_bytes": 1500}, 5),  # three windows within the bytes
        (64, 100, {"max_window_bytes": 1500, "accumulate": 4}, 4),
        (64, 10**6, {"max_window_bytes": 1, "accumulate": 4}, 4),  # never below one step
        (64, 100, {"max_window_bytes": 1800, "mode": "resample"}, 2),  # candidates are held too
        (64, 1000, {"window": 3}, 3),
    ],
)
def test_window_size(num_samples, num_bytes, arguments, expected):
    assert window_size(Settings(**arguments), num_samples, num_bytes) == expected


def test_settings_are_described_in_words_that_are_equal_in_every_process():
    described = Settings(mode=fs.Thin(0.5), policy=fs.Permuted(fs.Flow()), seed=3).described()
    assert described["mode"] == "Thin(scale=0.5)"
    assert described["policy"] == "Permuted(policy=Flow())"
    assert described["seed"] == "3"
    assert all(isinstance(value, str) and " at 0x" not in value for value in described.values())
    assert Settings(mode="resample").described() == Settings(mode=fs.Thin()).described()


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        ({}, True),
        ({"policy": fs.Uniform()}, False),
        ({"policy": fs.Uniform(), "include": ("loss",)}, True),
        ({"policy": fs.Permuted(fs.Uniform())}, False),
        ({"policy": lambda loss, tau: loss}, True),
    ],
)
def test_losses_are_needed_where_a_policy_or_the_user_reads_them(arguments, needed):
    assert Settings(**arguments).needs_loss is needed
