"""GSM8K as a user would train on it, and the model that is trained: from ../shared, or made of the same lengths.

Questions without labels, answers with, padded to the longest of each batch. Where ../shared is absent a small Llama
with random weights reads random ids: some 200 tokens a sample, 61 % of them labelled, 1.8 padded tokens a real one in
batches of 16.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

MODEL = Path(__file__).parents[2] / "shared" / "models" / "tiny-llama"
TEXTS = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"

BATCH = 16

Row = tuple[list[int], list[int]]
"""Ids of the question and of the answer."""


def is_there() -> bool:
    return MODEL.exists() and TEXTS.exists()


def described() -> str:
    """What is read by what, in words."""
    return "GSM8K under tiny-llama" if is_there() else "synthetic questions under a small random Llama"


def model(dtype: torch.dtype) -> LlamaForCausalLM:
    """4 M parameters, in eval mode."""
    if is_there():
        found: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
        return found.eval()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def rows(num_samples: int) -> list[Row]:
    """The first samples: of GSM8K, or as long as its samples are."""
    if is_there():
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        with TEXTS.open() as lines:
            texts = [json.loads(line) for line, _ in zip(lines, range(num_samples), strict=False)]
        questions = tokenizer([text["question"] + "\n" for text in texts]).input_ids
        answers = tokenizer([text["answer"] for text in texts]).input_ids
        return list(zip(questions, answers, strict=True))
    generator = np.random.default_rng(0)
    common, *own = generator.normal(size=(3, num_samples))  # long questions have long answers
    questions, answers = (
        np.maximum(mean * np.exp(sigma * (common + of_its_own) / 2**0.5 - sigma**2 / 2), 2).astype(int)
        for mean, sigma, of_its_own in zip((81, 126), (0.37, 0.43), own, strict=True)
    )
    return [
        (generator.integers(2, 4096, question).tolist(), generator.integers(2, 4096, answer).tolist())
        for question, answer in zip(questions, answers, strict=True)
    ]


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    width = max(len(question) + len(answer) for question, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (question, answer) in enumerate(rows):
        length = len(question) + len(answer)
        ids[row, :length] = torch.tensor(question + answer)
        labels[row, len(question) : length] = torch.tensor(answer)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loader(rows: Sequence[Row]) -> DataLoader[Any]:
    """Batches of 16 in order."""
    return DataLoader(rows, batch_size=BATCH, collate_fn=collate)  # type: ignore[arg-type]
