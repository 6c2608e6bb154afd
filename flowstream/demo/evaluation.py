"""The demo's splits: problems and held-out pre-training text, and the answers that a model writes to the problems."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import LlamaForCausalLM

from flowstream.compare import evaluation
from flowstream.compare.evaluation import Measures
from flowstream.demo.problems import Problem, read_answer
from flowstream.demo.shards import Encoder

_BATCH = 32


class EvaluationSplit:
    """One split to measure on: problems and chunks of held-out text, batched once."""

    def __init__(self, problems: Sequence[Problem], text: list[list[int]], encoder: Encoder) -> None:
        self.problems = tuple(problems)
        self._encoder = encoder
        encoded = sorted((encoder.encode(p.question, p.worked) for p in problems), key=lambda one: len(one.ids))
        self._split = evaluation.EvaluationSplit(
            target=[
                encoder.collate((0, one) for one in encoded[start : start + _BATCH])
                for start in range(0, len(encoded), _BATCH)
            ],
            general=[{"input_ids": ids, "labels": ids} for ids in torch.tensor(text).split(_BATCH)],
        )

    def measure(self, model: LlamaForCausalLM) -> Measures:
        """Losses and exact match of a model, by one pass over the split."""
        return self._split.measure(model)

    @torch.no_grad()
    def answer_accuracy(self, model: LlamaForCausalLM, max_problems: int, max_new_tokens: int = 72) -> float:
        """Share of the first problems whose decoded answer ends in the right number, however it was worked."""
        problems = self.problems[:max_problems]
        answers = decode_answers(model, self._encoder, [p.question for p in problems], max_new_tokens)
        return sum(read_answer(a) == p.answer for a, p in zip(answers, problems, strict=True)) / len(problems)


@torch.no_grad()
def decode_answers(
    model: LlamaForCausalLM, encoder: Encoder, questions: Sequence[str], max_new_tokens: int = 72
) -> list[str]:
    """Greedy answers, decoded in batches padded on the left."""
    model.eval()
    answers: list[str] = []
    pad = encoder.tokenizer.pad_token_id
    for start in range(0, len(questions), _BATCH):
        rows = [encoder.question(question) for question in questions[start : start + _BATCH]]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        written = cast(Any, model).generate(  # its stub takes no plain model
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad
        )
        answers += encoder.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
    return answers
