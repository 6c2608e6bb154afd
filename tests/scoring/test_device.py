"""Where a reference computes: in line on a CPU, on a stream of its own on a GPU, where nobody waits for it."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from texts import check_samples, make_samples, padded, score
from torch import Tensor

from flowstream.scoring.causal_lm import CausalLMScorer
from flowstream.scoring.device import Lane, copied_to, on_host

CPU = torch.device("cpu")


def test_on_a_cpu_all_is_in_line() -> None:
    lane = Lane(CPU)
    lane.follow()
    arrays = np.arange(6).reshape(2, 3), np.zeros(0, dtype=np.int64), np.array([4])
    with lane.entered():
        sent = lane.send(*arrays)
        fetched = lane.fetch(torch.tensor([1.5, 2.5]))
    for tensor, array in zip(sent, arrays, strict=True):
        assert tensor.dtype == torch.int64
        assert tensor.tolist() == array.tolist()
    assert fetched.wait().tolist() == [1.5, 2.5]


def test_batches_on_the_host_are_the_same_objects() -> None:
    batches = [{"input_ids": torch.ones(2, 3), "nested": {"a": torch.ones(1)}, "text": "b"}, (torch.ones(2),)]
    assert on_host(batches) is batches


def test_a_copy_shares_nothing() -> None:
    tensor = torch.ones(3)
    copied = copied_to(tensor, CPU)
    copied.zero_()
    assert tensor.tolist() == [1, 1, 1]


# On a GPU

Named = namedtuple("Named", ["input_ids", "labels"])


@contextmanager
def without_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def spin(device: torch.device) -> None:
    """Keep the current stream busy for a while."""
    torch.cuda._sleep(200_000_000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_copied_to_the_host() -> None:
    ids = torch.arange(6, device="cuda").reshape(2, 3)
    batches = [{"input_ids": ids, "nested": {"labels": ids + 1}, "text": "b"}, Named(ids, None), (ids, ids)]
    mapping, named, pair = on_host(batches)
    for found in (mapping["input_ids"], named.input_ids, *pair):
        assert found.device.type == "cpu"
        assert found.tolist() == ids.tolist()
    assert mapping["nested"]["labels"].tolist() == (ids + 1).tolist()
    assert (mapping["text"], named.labels) == ("b", None)
    assert batches[0]["input_ids"].is_cuda


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "mamba"])
@pytest.mark.filterwarnings("ignore")
def test_losses_on_a_gpu_are_those_on_the_cpu(tiny: Any, name: str, dtype: torch.dtype) -> None:
    model, samples = tiny(name).to(dtype), make_samples((5, 11, 1, 8, 2, 14))
    (expected,) = score(CausalLMScorer(model), padded(samples, "left"))
    (scores,) = score(CausalLMScorer(model.cuda()), padded(samples, "left"))
    assert scores.loss.device.type == "cpu"
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(scores.loss, expected.loss, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("level", ["sample", "token"])
@pytest.mark.filterwarnings("ignore")
def test_the_steps_of_a_window_wait_for_nothing_on_a_gpu(tiny: Any, name: str, level: Any) -> None:
    model = tiny(name).bfloat16().cuda()
    scorer = CausalLMScorer(model, token_budget=256)
    samples = make_samples(tuple(8 + 7 * i % 40 for i in range(32)))
    batches = [padded(samples[i : i + 8], "left") for i in range(0, 32, 8)]
    expected = scorer.begin(batches, level=level).finish()  # what is made on first use may wait
    job = scorer.begin(batches, level=level)
    assert job.num_steps > 1
    with without_synchronisation():
        while job.num_steps:
            job.step()
    for found, wanted in zip(job.finish(), expected, strict=True):
        assert found.loss.equal(wanted.loss)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_lane_waits_for_what_the_current_stream_was_given() -> None:
    device = torch.device("cuda:0")
    lane = Lane(device)
    value = torch.zeros(1000, device=device)
    spin(device)
    value += 1
    lane.follow()
    with lane.entered():
        fetched = lane.fetch(value * 2)
    assert fetched.wait().tolist() == [2.0] * 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_is_sent_reaches_a_gpu_in_one_copy_that_nobody_waits_for() -> None:
    lane = Lane(torch.device("cuda:0"))
    arrays = np.arange(6).reshape(2, 3), np.zeros(0, dtype=np.int64), np.array([4])
    with without_synchronisation(), lane.entered():
        sent = lane.send(*arrays)
    for tensor, array in zip(sent, arrays, strict=True):
        assert tensor.is_cuda
        assert tensor.tolist() == array.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_the_current_stream_and_scoring_beside_it_do_not_mix(tiny: Any) -> None:
    model, trained = tiny("llama").requires_grad_(False).cuda(), tiny("llama").cuda()
    samples = make_samples((5, 11, 1, 8, 2, 14))
    batch = padded(samples, "left")
    (expected,) = score(CausalLMScorer(model), batch)
    scorer = CausalLMScorer(model)
    ids: Tensor = batch["input_ids"].cuda()
    for _ in range(5):
        job = scorer.begin([batch], level="sample")
        spin(torch.device("cuda:0"))
        job.step()
        trained(input_ids=ids, labels=ids).loss.backward()
        (scores,) = job.finish()
        assert scores.loss.equal(expected.loss)
    check_samples(model.cpu(), samples, scores, atol=1e-3)
