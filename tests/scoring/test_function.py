"""Losses from a function, or from the batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from flowstream.scoring.function import FunctionScorer, Prescored
from flowstream.scoring.memory_cache import MemoryCache

BATCH = {"x": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "flow_loss": torch.tensor([0.5, 1.5])}


@pytest.mark.parametrize(
    "give",
    [torch.tensor, np.array, list, lambda x: torch.tensor(x, dtype=torch.bfloat16), lambda x: torch.tensor(x).double()],
)
def test_a_function_may_return_a_tensor_an_array_or_a_list(give: Any) -> None:
    scorer = FunctionScorer(lambda batch: give([0.5, 2.0]))
    job = scorer.begin([BATCH, BATCH], level="sample")
    assert job.num_steps == 2
    job.step()
    assert job.num_steps == 1
    for scores in job.finish():
        assert scores.loss.dtype == torch.float32
        assert scores.loss.tolist() == [0.5, 2.0]
        assert scores.count.tolist() == [1, 1]
        assert scores.segment is None
    assert job.cost.num_tokens == 4


def test_a_function_runs_without_gradients_and_is_never_cached() -> None:
    weight = torch.ones(2, requires_grad=True)
    calls = []

    def fn(batch: Any) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return (batch["x"] @ weight).abs()

    scorer, cache = FunctionScorer(fn), MemoryCache()
    for _ in range(2):
        (scores,) = scorer.begin([BATCH], level="sample", cache=cache, row_keys=[["a", "b"]]).finish()
    assert calls == [False, False]
    assert torch.is_grad_enabled()
    assert not scores.loss.requires_grad
    assert scores.loss.tolist() == [3, 7]
    assert len(cache) == 0


def test_losses_taken_in_inference_mode_may_be_trained_on() -> None:
    with torch.inference_mode():
        (scores,) = Prescored().begin([BATCH], level="sample").finish()
        (unscored,) = Prescored().begin([BATCH], level="sample", needs_loss=False).finish()
    for loss in (scores.loss, unscored.loss):
        factor = torch.ones(2, requires_grad=True)
        (factor * loss).sum().backward()
        assert torch.equal(factor.grad, loss)


def test_nan_and_infinity_are_kept() -> None:
    (scores,) = FunctionScorer(lambda batch: [float("nan"), float("inf")]).begin([BATCH], level="sample").finish()
    assert scores.loss.isnan().tolist() == [True, False]
    assert scores.loss.isinf().tolist() == [False, True]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (torch.tensor(1.0), r"one loss a sample, \[2\], and gave \[\] \(batch 1 of the window\): .*reduction='none'"),
        (torch.zeros(2, 3), r"\[2\], and gave \[2, 3\]"),
        (torch.zeros(3), r"\[2\], and gave \[3\]"),
        (None, r"not a NoneType \(batch 1"),
        ("abc", "not a str"),
    ],
)
def test_another_shape_is_refused(found: Any, message: str) -> None:
    answers = iter([[0.0, 0.0], found])
    job = FunctionScorer(lambda batch: next(answers)).begin([BATCH, BATCH], level="sample")
    with pytest.raises(ValueError, match=message):
        job.finish()


def test_no_scores_are_taken_where_none_are_needed() -> None:
    def fn(batch: Any) -> Any:
        raise AssertionError("called")

    job = FunctionScorer(fn).begin([BATCH, (torch.zeros(3, 4), torch.zeros(3))], level="sample", needs_loss=False)
    assert job.num_steps == 0
    assert [scores.loss.tolist() for scores in job.finish()] == [[0, 0], [0, 0, 0]]
    assert [scores.count.tolist() for scores in job.finish()] == [[1, 1], [1, 1, 1]]


class _Row(NamedTuple):
    x: Any
    flow_loss: Any


@pytest.mark.parametrize("batch", [BATCH, _Row(BATCH["x"], BATCH["flow_loss"])])
def test_prescored_takes_the_losses_of_the_batch(batch: Any) -> None:
    (scores,) = Prescored().begin([batch], level="sample").finish()
    assert scores.loss.tolist() == [0.5, 1.5]
    BATCH["flow_loss"].add_(0)
    assert scores.loss.data_ptr() != BATCH["flow_loss"].data_ptr()


def test_prescored_takes_a_position_of_a_tuple() -> None:
    (scores,) = Prescored(2).begin([(BATCH["x"], torch.zeros(2), [1.0, 2.0])], level="sample").finish()
    assert scores.loss.tolist() == [1, 2]


def test_a_missing_key_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"Prescored\(key='loss'\) found no such key in a batch, only \['x', 'flow_loss'\]"
    ):
        Prescored("loss").begin([BATCH], level="sample").finish()


def test_token_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="one loss a sample"):
        Prescored().begin([BATCH], level="token")


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(ValueError, match="not a Tensor"):
        FunctionScorer(torch.zeros(2))  # type: ignore[arg-type]


def test_fingerprints_name_the_function() -> None:
    def mine(batch: Any) -> Any: ...

    assert FunctionScorer(mine).fingerprint() == FunctionScorer(mine).fingerprint()
    assert "mine" in FunctionScorer(mine).fingerprint()
    assert FunctionScorer(mine, name="b").fingerprint() != FunctionScorer(mine).fingerprint()
    assert Prescored("a").fingerprint() != Prescored("b").fingerprint()
    scorer = FunctionScorer(mine)
    scorer.load_state_dict(scorer.state_dict())
    scorer.check()
