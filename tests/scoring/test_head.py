"""Losses from hidden states, against logits and softmax in fp64."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from allocations import peak_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flowstream.scoring.head import Head

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(
    num_rows: int, vocabulary: int, dim: int = 16, dtype: torch.dtype = torch.float32, bias: bool = False, seed: int = 0
) -> tuple[Tensor, nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(dim, vocabulary, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(num_rows, dim, generator=generator).to(dtype)
    return hidden, linear, torch.randint(vocabulary, (num_rows,), generator=generator)


def plain(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """[n] losses in fp64."""
    logits = hidden.double() @ head.linear.weight.double().T
    if head.linear.bias is not None:
        logits = logits + head.linear.bias.double()
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.logsumexp(1) - logits[torch.arange(len(targets)), targets]


@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(0, 12),
    vocabulary=st.sampled_from([1, 2, 97, 1023, 1025, 3000, 9000]),
    max_bytes=st.sampled_from([1, 2**12, 2**15, 2**17, 2**20, 2**28]),
    dtype=st.sampled_from(DTYPES),
    softcap=st.none() | st.floats(0.1, 100),
    scale=st.floats(0.01, 10),
    bias=st.booleans(),
)
def test_losses_equal_those_in_fp64_for_any_shape_budget_and_transform(
    num_rows: int,
    vocabulary: int,
    max_bytes: int,
    dtype: torch.dtype,
    softcap: float | None,
    scale: float,
    bias: bool,
) -> None:
    hidden, linear, targets = make(num_rows, vocabulary, dtype=dtype, bias=bias)
    head = Head(linear, max_bytes, softcap, scale)
    losses = head.losses(hidden, targets)
    assert losses.dtype == torch.float32
    assert losses.shape == (num_rows,)
    assert (losses >= 0).all()
    # Weights and hidden states are what they are; all that is computed from them is in fp32.
    torch.testing.assert_close(losses.double(), plain(hidden, head, targets), rtol=1e-5, atol=2e-5)


def test_a_loss_next_to_nothing_is_not_below_it() -> None:
    """Over several parts of the vocabulary it is a difference of large numbers, and a negative loss is refused."""
    hidden, linear, _ = make(300, 20_000)
    hidden, targets = hidden * 1000, (hidden @ linear.weight.T).argmax(1)
    for max_bytes in (2**20, 2**28):
        losses = Head(linear, max_bytes).losses(hidden * 1000, targets)
        assert (losses >= 0).all()
        assert losses.median() == 0


def test_weights_that_are_not_finite_give_losses_that_are_not() -> None:
    hidden, linear, targets = make(5, 20_000)
    linear.weight[7] = float("nan")
    assert Head(linear, 2**20).losses(hidden, targets).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "max_bytes"), [(5000, 2**19), (5000, 2**24), (32_000, 2**22)])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_allocations_stay_within_max_bytes(
    max_bytes: int, vocabulary: int, dtype: torch.dtype, softcap: float | None
) -> None:
    hidden, linear, targets = make(300, vocabulary, dtype=dtype)
    head = Head(linear, max_bytes, softcap, 0.5)
    peak = peak_of(lambda: head.losses(hidden, targets))
    assert peak <= max_bytes + 4 * 300
    assert peak <= head.num_bytes(300) + 4 * 300


MEASURED = """
import re, sys, torch
from pathlib import Path
from flowstream.scoring.head import Head

def high_water():  # ru_maxrss would begin with that of the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def run(num_rows, vocabulary, dtype):
    linear = torch.nn.Linear(64, vocabulary, bias=False, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(num_rows, 64, dtype=dtype)
    targets = torch.randint(vocabulary, (num_rows,))
    before = high_water()
    Head(linear, 2**28).losses(hidden, targets)
    return high_water() - before

torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[2])
run(64, 1000, dtype)  # what libraries set up on first use
print(run(2048, int(sys.argv[1]), dtype))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(32_768, "float32"), pytest.param(262_144, "bfloat16", marks=pytest.mark.soak)]
)
def test_memory_of_the_process_grows_by_less_than_the_default_budget(vocabulary: int, dtype: str) -> None:
    """2048 rows: their logits in fp32 would take 256 MB and 2 GB, and as much again their softmax."""
    command = [sys.executable, "-c", MEASURED, str(vocabulary), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 2**28


# Of models


def test_the_head_of_a_model_and_what_its_configuration_says(tiny: Any) -> None:
    for name, softcap, scale in (
        ("llama", None, 1.0),
        ("gemma2", 0.5, 1.0),
        ("cohere", None, 3.0),
        ("granite", None, 5.0),
        ("falcon_h1", None, 0.5),
        ("recurrent_gemma", 30.0, 1.0),
    ):
        model = tiny(name)
        head = Head.of(model, 2**28)
        assert head is not None
        assert head.linear is model.lm_head
        assert (head.softcap, head.scale) == (softcap, pytest.approx(scale))


def test_what_is_no_plain_linear_layer_is_no_head(tiny: Any) -> None:
    class Other(nn.Linear):
        pass

    model = tiny("llama")
    model.lm_head = Other(32, 97, bias=False)
    assert Head.of(model, 1) is None
    assert Head.of(tiny("llama").double(), 1) is None
    assert Head.of(nn.Linear(2, 2), 1) is None
    assert Head.of(tiny("bert"), 1) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_bytes", [2**22, 2**28])
def test_on_a_gpu_losses_are_the_same_within_the_budget(dtype: torch.dtype, max_bytes: int) -> None:
    hidden, linear, targets = make(5000, 32_000, dtype=dtype, bias=True)
    head = Head(linear, max_bytes, 30.0, 0.5)
    expected = plain(hidden, head, targets)
    hidden, targets = hidden.cuda(), targets.cuda()
    head = Head(linear.cuda(), max_bytes, 30.0, 0.5)
    head.losses(hidden, targets)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = head.losses(hidden, targets)
    assert torch.cuda.max_memory_allocated() - before <= max_bytes + 2**21
    torch.testing.assert_close(losses.double().cpu(), expected, rtol=1e-4, atol=1e-4)
