"""Which samples are right: a loop over rows and tokens says the same."""

from __future__ import annotations

import pytest
import torch

from flowstream.rehearsal.criteria import Judge


def by_loop(logits, labels, threshold):
    """Of each row, whether enough labelled tokens are predicted at the position before."""
    right = []
    for row in range(len(labels)):
        hits = [
            int(logits[row, t - 1].argmax()) == int(labels[row, t])
            for t in range(1, labels.shape[1])
            if labels[row, t] != -100
        ]
        right.append(bool(hits) and sum(hits) / len(hits) >= threshold)
    return right


def batch_of(seed=0):
    torch.manual_seed(seed)
    labels = torch.randint(0, 5, (12, 9))
    labels[torch.rand(labels.shape) < 0.3] = -100
    labels[3] = -100
    logits = torch.randn(12, 9, 5)
    known = torch.rand(12, 9) < torch.rand(12, 1)
    logits[:, :-1][known[:, :-1]] += 9.0 * torch.nn.functional.one_hot(labels[:, 1:].clamp(min=0), 5)[known[:, :-1]]
    logits[0, :-1] += 30.0 * torch.nn.functional.one_hot(labels[0, 1:].clamp(min=0), 5)
    return logits, labels


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9, 1.0])
def test_token_accuracy(threshold):
    logits, labels = batch_of()
    expected = by_loop(logits, labels, threshold)
    assert Judge("token_accuracy", threshold).right(logits, labels).tolist() == expected
    assert any(expected)
    assert not all(expected)
    if threshold == 1.0:
        assert Judge("exact_match", 0.3).right(logits, labels).tolist() == expected


def test_a_decoder_predicts_labels_in_place():
    logits, labels = batch_of()
    shifted = torch.cat([torch.full((12, 1), -100), labels], 1)
    padded = torch.cat([logits, logits[:, :1]], 1)
    expected = by_loop(padded, shifted, 0.3)
    assert Judge("token_accuracy", 0.3, shifts=False).right(logits, labels).tolist() == expected


def test_documents_of_packed_rows_are_judged_as_if_alone():
    logits, labels = batch_of()
    owner = torch.full((1, 12 * 9), -1)
    spans = [(i * 9, i * 9 + 5 + i % 4) for i in range(12)]
    for i, (begin, end) in enumerate(spans):
        owner[0, begin:end] = i
    alone = [
        by_loop(logits.view(1, -1, 5)[:, begin:end], labels.view(1, -1)[:, begin:end], 0.3)[0] for begin, end in spans
    ]
    found = Judge("token_accuracy", 0.3).right(logits.view(1, -1, 5), labels.view(1, -1), owner, 12)
    assert found.tolist() == alone


def test_classes_and_distributions():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    judge = Judge("class")
    assert judge.right(logits, torch.tensor([1, 1, -100])).tolist() == [True, False, False]
    assert judge.right(logits, torch.tensor([[0.4, 0.6], [0.9, 0.1], [0.8, 0.2]])).tolist() == [True, True, False]


def test_logits_that_are_no_numbers_are_never_right():
    nothing = torch.full((2, 3, 5), float("nan"))
    nothing[1, :, 0] = 1.0
    labels = torch.zeros(2, 3, dtype=torch.int64)
    assert Judge("token_accuracy").right(nothing, labels).tolist() == [False, False]
    assert Judge("class").right(nothing[:, 0], labels[:, 0]).tolist() == [False, False]


def test_a_criterion_of_ones_own():
    logits = torch.randn(3, 2, requires_grad=True)
    judge = Judge(lambda logits, labels: logits[:, 0] > labels)
    assert judge.right(logits, torch.tensor([-9.0, 9.0, -9.0])).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="gave \\[\\] for 3 rows"):
        Judge(lambda logits, labels: logits.mean() > 0).right(logits, torch.zeros(3))


def test_shapes_that_do_not_go_together():
    with pytest.raises(ValueError, match="criterion='class'"):
        Judge("token_accuracy").right(torch.zeros(4, 7), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="\\[4, 6, 7\\] beside labels \\[4, 5\\]"):
        Judge("exact_match").right(torch.zeros(4, 6, 7), torch.zeros(4, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="'class' takes"):
        Judge("class").right(torch.zeros(4, 5, 7), torch.zeros(4, 5, dtype=torch.int64))
