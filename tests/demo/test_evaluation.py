"""Measures of a model, against each sample alone and against decoding."""

import pytest
import torch
from transformers import LlamaForCausalLM

from flowstream.demo.evaluation import EvaluationSplit, decode_answers
from flowstream.demo.problems import Problem
from flowstream.demo.shards import Encoder

TEXT = torch.randint(3, 300, (5, 24), generator=torch.Generator().manual_seed(0)).tolist()


def overfit(model: LlamaForCausalLM, encoder: Encoder, problems: list[Problem]) -> None:
    """Teach a model some problems by heart."""
    batch = encoder.collate((0, encoder.encode(problem.question, problem.worked)) for problem in problems)
    batch.pop("sample")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(80):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def test_losses_are_those_of_every_sample_alone(
    model: LlamaForCausalLM, encoder: Encoder, problems: list[Problem]
) -> None:
    total, num_tokens = 0.0, 0
    for problem in problems:
        encoded = encoder.encode(problem.question, problem.worked)
        count = len(encoded.ids) - encoded.num_question
        loss = model(input_ids=torch.tensor([encoded.ids]), labels=torch.tensor([encoded.labels])).loss
        total, num_tokens = total + count * float(loss), num_tokens + count
    retained = [float(model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss) for row in TEXT]
    measures = EvaluationSplit(problems, TEXT, encoder).measure(model)
    assert measures.target_loss == pytest.approx(total / num_tokens, rel=1e-4)
    assert measures.retained_loss == pytest.approx(sum(retained) / len(retained), rel=1e-4)


def test_exact_match_is_what_greedy_decoding_writes(
    model: LlamaForCausalLM, encoder: Encoder, problems: list[Problem]
) -> None:
    known = [problem for problem in problems if problem.level == "code"][:3]
    overfit(model, encoder, known)
    some = known + problems[:9]
    decoded = decode_answers(model, encoder, [problem.question for problem in some])
    num_exact = sum(answer == problem.worked for answer, problem in zip(decoded, some, strict=True))
    assert num_exact >= 2
    split = EvaluationSplit(some, TEXT, encoder)
    assert split.measure(model).exact_match == pytest.approx(num_exact / len(some))
    assert split.answer_accuracy(model, max_problems=3) >= 2 / 3


def test_answers_do_not_depend_on_the_padding_of_their_batch(
    model: LlamaForCausalLM, encoder: Encoder, problems: list[Problem]
) -> None:
    overfit(model, encoder, problems[:4])
    questions = [problem.question for problem in problems[:6]]
    assert decode_answers(model, encoder, questions) == [
        answer for question in questions for answer in decode_answers(model, encoder, [question])
    ]
