"""A tokenizer and an untrained model, small enough to build for every test session."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flowstream.demo.pretraining import train_tokenizer
from flowstream.demo.problems import Problem, make_problems
from flowstream.demo.shards import Encoder


@pytest.fixture(scope="session")
def problems() -> list[Problem]:
    return make_problems(48, seed=5)


@pytest.fixture(scope="session")
def encoder(problems: list[Problem]) -> Encoder:
    texts = [f"{problem.question}\n{problem.worked}" for problem in problems]
    return Encoder(train_tokenizer(texts, vocabulary=400))


@pytest.fixture
def model(encoder: Encoder) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(encoder.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=encoder.tokenizer.bos_token_id,
        eos_token_id=encoder.tokenizer.eos_token_id,
        pad_token_id=encoder.tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()
