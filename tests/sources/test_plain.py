"""States as plain values: what goes through a checkpoint comes back as it was."""

from __future__ import annotations

import datetime
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
from resuming import through_a_file

from flowstream.sources.plain import from_plain, to_plain


def test_states_with_numpy_generators_sets_and_queues_come_back():
    state = {
        "twister": np.random.RandomState(0).get_state(),
        "pcg": np.random.default_rng(0).bit_generator.state,
        "python": (3, (1, 2, 3), None),
        "set": {1, 2},
        "queue": deque([1, 2], maxlen=4),
        "ordered": OrderedDict(a=b"bytes"),
        "scalars": [np.int64(3), np.float32(0.5), np.bool_(True)],
        0: torch.arange(3),
    }
    back = from_plain(through_a_file(to_plain(state)))
    assert back.keys() == state.keys()
    np.testing.assert_array_equal(back["twister"][1], state["twister"][1])
    assert back["twister"][1].dtype == np.uint32
    assert back["pcg"] == state["pcg"]
    for name in ("python", "set", "queue", "ordered", "scalars"):
        assert back[name] == state[name]
        assert type(back[name]) is type(state[name])
    assert back["queue"].maxlen == 4
    assert torch.equal(back[0], state[0])


def test_a_copy_is_not_changed_by_the_loader():
    state = {"list": [1], "tensor": torch.zeros(1)}
    kept = to_plain(state)
    state["list"].append(2)
    state["tensor"] += 1
    assert kept["list"] == [1]
    assert kept["tensor"].item() == 0


def test_an_object_that_would_run_code_on_loading_is_named_with_its_place():
    with pytest.raises(ValueError, match=r"state\['a'\]\[1\] is a datetime.date"):
        to_plain({"a": [0, datetime.date(2026, 1, 1)]})
