"""What a fine-tuned model has learnt and kept: target loss, exact match, loss on held-out pre-training text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from flowstream.demo.problems import Problem, read_answer
from flowstream.demo.shards import IGNORED, Encoder

_BATCH = 32


@dataclass(frozen=True)
class Measures:
    """Losses in nats a token; exact match as a share of the problems."""

    target_loss: float
    """Mean over all answer tokens."""
    exact_match: float
    """Share of worked answers that greedy decoding would write token for token: each is the most likely one given those
    before it, which one forward pass tells."""
    retained_loss: float
    """Mean over the tokens of held-out standard-library text."""


class EvaluationSplit:
    """One split to measure on: problems and chunks of held-out text, batched once."""

    def __init__(self, problems: Sequence[Problem], text: list[list[int]], encoder: Encoder) -> None:
        self.problems = tuple(problems)
        self._encoder = encoder
        self._text = torch.tensor(text)
        encoded = sorted((encoder.encode(p.question, p.worked) for p in problems), key=lambda one: len(one.ids))
        self._batches = [
            encoder.collate((0, one) for one in encoded[start : start + _BATCH])
            for start in range(0, len(encoded), _BATCH)
        ]

    @torch.no_grad()
    def measure(self, model: LlamaForCausalLM) -> Measures:
        """Losses and exact match of a model, by one pass over the split."""
        model.eval()
        total, num_tokens, num_exact = 0.0, 0, 0
        for batch in self._batches:
            logits = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            ).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            labelled = labels != IGNORED
            total += float(F.cross_entropy(logits[labelled], labels[labelled], reduction="sum"))
            num_tokens += int(labelled.sum())
            num_exact += int(((logits.argmax(-1) == labels) | ~labelled).all(dim=1).sum())
        retained = [
            F.cross_entropy(model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            * len(ids)
            for ids in self._text.split(_BATCH)
        ]
        return Measures(
            target_loss=total / num_tokens,
            exact_match=num_exact / len(self.problems),
            retained_loss=float(sum(retained)) / len(self._text),
        )

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
