"""What scoring takes, as told beforehand, against what it then takes."""

from __future__ import annotations

import logging
from typing import Any

import peft
import pytest
import torch
from allocations import peak_of

from flowstream.scoring.causal_lm import CausalLMScorer


@pytest.mark.parametrize(("family", "within"), [("llama", 0.25), ("gemma2", 0.25), ("gpt2", 0.5), ("mixtral", 0.6)])
def test_the_memory_of_a_full_micro_batch_is_as_estimated(tiny: Any, family: str, within: float) -> None:
    scorer = CausalLMScorer(tiny(family), token_budget=2048)
    ids = torch.randint(3, 97, (64, 33), generator=torch.Generator().manual_seed(0))
    job = scorer.begin([{"input_ids": ids, "labels": ids}], level="sample")
    assert job.num_steps == 1
    grown = peak_of(job.finish)
    told = scorer.estimate()
    assert told.activation_bytes + told.head_bytes == pytest.approx(grown, rel=within)


def test_weights_are_counted_once_and_not_at_all_where_they_are_the_trained_models(tiny: Any) -> None:
    model = tiny("llama")
    alone = CausalLMScorer(model).estimate()
    assert alone.num_parameters == sum(p.numel() for p in model.parameters())
    assert alone.weight_bytes == 4 * alone.num_parameters
    assert alone.share_of_training == pytest.approx(1 / 3)
    tied = CausalLMScorer(tiny("llama", tie_word_embeddings=True)).estimate()
    assert tied.num_parameters == alone.num_parameters - 97 * 32
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    copied = CausalLMScorer(adapted, copy=True).estimate()
    assert copied.weight_bytes == alone.weight_bytes
    assert copied.share_of_training == pytest.approx(1 / 2)
    lora = CausalLMScorer(adapted).estimate()
    assert lora.num_parameters == alone.num_parameters
    assert lora.weight_bytes == 0
    assert lora.share_of_training == pytest.approx(1 / 2)


def test_it_is_told_at_the_start(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="flowstream"):
        scorer = CausalLMScorer(tiny("llama"))
    assert str(scorer.estimate()) in caplog.text
    assert "memory: weights 0 MB, micro-batches" in caplog.text
    assert "+33% of training's" in caplog.text
