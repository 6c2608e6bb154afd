"""From scores to weights, against numpy in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowstream.policies import Flow, Permuted, Threshold, Uniform
from flowstream.scoring.base import Scores
from flowstream.weighing import Losses, flatten, num_labelled, num_rows, place, sum_up, weigh

NAN, INF = float("nan"), float("inf")
SEED = (0, 0, 0, 0)


def by_sample(loss: Sequence[float], count: Sequence[int] | None = None) -> Scores:
    counts = [1] * len(loss) if count is None else count
    return Scores(torch.tensor(loss, dtype=torch.float32), torch.tensor(counts, dtype=torch.int64))


def by_token(rows: Sequence[Sequence[float | None]], segment: Sequence[Sequence[int]] | None = None) -> Scores:
    """Scores of labels where a loss is given; a sample is a row, or what `segment` says."""
    mask = torch.tensor([[loss is not None for loss in row] for row in rows])
    token_loss = torch.tensor([[0.0 if loss is None else loss for loss in row] for row in rows], dtype=torch.float16)
    owner = torch.arange(len(rows))[:, None].expand(mask.shape) if segment is None else torch.tensor(segment)
    num = int(owner.max()) + 1
    count = torch.zeros(num, dtype=torch.int64)
    loss = torch.zeros(num)
    for s in range(num):
        own = mask & (owner == s)
        count[s] = own.sum()
        loss[s] = token_loss[own].float().mean() if own.any() else 0.0
    return Scores(loss, count, None if segment is None else owner, token_loss, mask)


LOSSES = st.one_of(st.floats(0, 100, width=32), st.sampled_from([NAN, INF, -INF]))


# Weights


@settings(deadline=None)
@given(st.lists(st.lists(st.tuples(LOSSES, st.integers(0, 3)), max_size=6), max_size=4), st.floats(1e-3, 50))
def test_weights_are_exp_of_minus_loss_over_tau(batches: list[list[tuple[float, int]]], tau: float) -> None:
    scores = [by_sample([loss for loss, _ in batch], [n for _, n in batch]) for batch in batches]
    losses = flatten(scores, "sample")
    loss = np.array([loss for batch in batches for loss, _ in batch], dtype=np.float64)
    usable = np.isfinite(loss) & np.array([n > 0 for batch in batches for _, n in batch], dtype=bool)
    expected = np.where(usable, np.exp(-np.where(usable, loss, 0.0) / tau), 0.0)
    weight = weigh(losses, tau, Flow(), SEED)
    assert weight.dtype == torch.float32
    np.testing.assert_array_equal(weight.numpy(), expected.astype(np.float32))
    assert losses.sizes == [len(batch) for batch in batches]
    assert losses.usable.tolist() == usable.tolist()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_gets_weight_zero(bad: float) -> None:
    losses = flatten([by_sample([0.0, bad, 1.0])], "sample")
    assert weigh(losses, 1.0, Flow(), SEED).tolist() == pytest.approx([1.0, 0.0, np.exp(-1)])
    assert weigh(losses, 1.0, Threshold(INF), SEED).tolist() == [1.0, 0.0, 1.0]


def test_a_sample_without_a_label_gets_weight_zero_whatever_the_policy() -> None:
    losses = flatten([by_sample([0.0, -1.0, 1.0], [2, 0, 3])], "sample")
    assert weigh(losses, 1.0, Uniform(), SEED).tolist() == [1.0, 0.0, 1.0]
    assert losses.num_empty == 1


@pytest.mark.parametrize("level", ["sample", "token"])
def test_of_nothing_comes_nothing(level: Any) -> None:
    losses = flatten([], level)
    assert len(losses.loss) == len(losses.sample) == len(losses.count) == 0
    assert len(weigh(losses, 1.0, Flow(), SEED)) == len(weigh(losses, [], Flow(), SEED)) == 0
    assert sum_up(losses, torch.empty(0)).num == 0


def test_each_batch_may_have_its_own_temperature() -> None:
    losses = flatten([by_sample([1.0, 2.0]), by_sample([]), by_sample([1.0])], "sample")
    got = weigh(losses, [0.5, 9.0, 2.0], Flow(), SEED)
    np.testing.assert_array_equal(got.numpy(), np.exp(-np.array([1 / 0.5, 2 / 0.5, 1 / 2.0])).astype(np.float32))


def test_a_policy_never_sees_what_is_not_usable() -> None:
    seen: list[Tensor] = []

    def policy(loss: Tensor, tau: Tensor | float) -> Tensor:
        seen.append(loss)
        return torch.ones_like(loss)

    losses = flatten([by_sample([3.0, NAN, INF, 5.0], [1, 1, 1, 0])], "sample")
    assert weigh(losses, 1.0, policy, SEED).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert seen[0].tolist() == [3.0, 0.0, 0.0, 0.0]


def test_a_policy_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="the policy returned shape"):
        weigh(flatten([by_sample([1.0, 2.0])], "sample"), 1.0, lambda loss, tau: loss[:1], SEED)


# Permuted


def permuted(seed: tuple[int, ...]) -> tuple[Losses, Tensor]:
    rng = np.random.default_rng(0)
    batches = [rng.gamma(1.0, size=20).tolist() for _ in range(3)]
    batches[1][4], batches[2][7] = NAN, INF
    counts = [[1] * 20 for _ in range(3)]
    counts[0][0] = 0
    losses = flatten([by_sample(b, c) for b, c in zip(batches, counts, strict=True)], "sample")
    return losses, weigh(losses, 1.0, Permuted(Flow()), seed)


def test_permuted_weights_are_the_same_weights_among_the_usable() -> None:
    losses, weight = permuted((1, 2, 3, 4))
    plain = weigh(losses, 1.0, Flow(), SEED)
    assert weight[~losses.usable].tolist() == [0.0, 0.0, 0.0]
    assert weight.sort().values.tolist() == plain.sort().values.tolist()
    assert not torch.equal(weight, plain)
    assert (weight[20:40] - plain[20:40]).abs().sum() > 0
    assert set(weight[:20].tolist()) - set(plain[:20].tolist()), "weights stay within their batch"


def test_a_permutation_is_a_pure_function_of_the_seed() -> None:
    state = torch.random.get_rng_state()
    assert torch.equal(permuted((1, 2, 3, 4))[1], permuted((1, 2, 3, 4))[1])
    assert torch.equal(torch.random.get_rng_state(), state)
    for other in [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)]:
        assert not torch.equal(permuted((1, 2, 3, 4))[1], permuted(other)[1])


# Tokens and documents

ROWS: list[list[float | None]] = [[None, 1.0, 2.0, None], [None, None, None, None], [0.5, NAN, None, 0.0]]


def test_token_weights_stand_at_their_labels() -> None:
    scores = by_token(ROWS)
    losses = flatten([by_token([[7.0]]), scores], "token")
    assert losses.sizes == [1, 5]
    assert losses.sample.tolist() == [0, 1, 1, 3, 3, 3]
    weight = weigh(losses, 2.0, Flow(), SEED)
    got = place(weight[1:], scores, "token")
    for row, weights in zip(ROWS, got.tolist(), strict=True):
        exact = [0.0 if loss is None or not np.isfinite(loss) else np.exp(-loss / 2) for loss in row]
        assert weights == np.array(exact, dtype=np.float64).astype(np.float32).tolist()


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 7), st.randoms(use_true_random=False))
def test_what_is_placed_is_read_back_by_index(num: int, width: int, random: Any) -> None:
    rows = [[random.choice([None, 1.0, 2.0]) for _ in range(width)] for _ in range(num)]
    scores = by_token(rows)
    losses = flatten([scores], "token")
    values = torch.rand(len(losses.loss))
    left = iter(values.tolist())
    expected = [[0.0 if loss is None else next(left) for loss in row] for row in rows]
    assert place(values, scores, "token").tolist() == expected


SEGMENT = [[0, 0, 0, 1, 1, -1], [2, 2, 2, 2, 2, 2]]
PACKED: list[list[float | None]] = [[None, 1.0, 3.0, None, NAN, None], [None, 0.5, 0.5, None, 0.5, 0.5]]


def test_each_document_of_a_packed_row_has_its_own_weight_at_its_positions() -> None:
    scores = by_token(PACKED, SEGMENT)
    weight = weigh(flatten([scores], "sample"), 1.0, Flow(), SEED)
    assert weight.tolist() == pytest.approx([np.exp(-2.0), 0.0, np.exp(-0.5)])
    got = place(weight, scores, "sample")
    expected = [[0.0 if s < 0 else weight[s].item() for s in row] for row in SEGMENT]
    assert got.tolist() == expected
    assert num_rows(scores) == 2


def test_tokens_of_packed_rows_belong_to_their_documents() -> None:
    losses = flatten([by_token(PACKED, SEGMENT), by_token([[1.0, None]])], "token")
    assert losses.sample.tolist() == [0, 0, 1, 2, 2, 2, 2, 3]


def test_weights_of_rows_are_placed_as_they_are() -> None:
    scores = by_sample([1.0, 2.0])
    values = torch.tensor([0.1, 0.2])
    assert place(values, scores, "sample") is values
    assert num_rows(scores) == 2


def test_packed_rows_without_a_document_have_no_weight() -> None:
    scores = Scores(torch.empty(0), torch.empty(0, dtype=torch.int64), torch.full((1, 3), -1))
    assert place(torch.empty(0), scores, "sample").tolist() == [[0.0, 0.0, 0.0]]
    assert num_rows(scores) == 1


def test_labelled_tokens_of_a_batch() -> None:
    assert num_labelled(by_token(ROWS)) == 5
    assert num_labelled(by_sample([1.0, 2.0, 3.0], [1, 0, 1])) == 2


# Sums


def test_sums_of_samples() -> None:
    losses = flatten([by_sample([1.0, NAN, 2.0], [3, 4, 5]), by_sample([INF, NAN, -1.0, 0.0], [1, 0, 0, 2])], "sample")
    weight = weigh(losses, 1.0, Flow(), SEED)
    sums = sum_up(losses, weight)
    w, n = np.exp(-np.array([1.0, 2.0, 0.0])), np.array([3, 5, 2])
    assert (sums.num, sums.nonfinite, sums.empty) == (3, 2, 2)
    assert sums.num_tokens == 10
    assert sums.total == pytest.approx(w.sum())
    assert sums.total_squares == pytest.approx((w * w).sum())
    assert sums.token_total == pytest.approx((w * n).sum())


def test_sums_of_tokens() -> None:
    losses = flatten([by_token(ROWS), by_token(PACKED, SEGMENT), by_token([[None, None]])], "token")
    sums = sum_up(losses, weigh(losses, 1.0, Flow(), SEED))
    w = np.exp(-np.array([1.0, 2.0, 0.5, 0.0, 1.0, 3.0, 0.5, 0.5, 0.5, 0.5]))
    assert (sums.num, sums.num_tokens) == (10, 10)
    assert (sums.nonfinite, sums.empty) == (2, 2)
    assert sums.total == sums.token_total == pytest.approx(w.sum())
