"""Rehearsal in transformers' `Trainer`: it hears what each step had right, and goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainers import Texts, collate, fixed, flow_trainer, sure_model

import flowstream as fs

PRIOR = Texts(60).rows[42:]


def rehearsal(**settings: Any) -> fs.Rehearsal:
    usual: dict[str, Any] = {"bins": 1, "label": [number % 3 for number in range(len(PRIOR))], "ratio": 0.3}
    usual |= {"was_correct": [True] * len(PRIOR), "collate_fn": collate, "half_life": None}
    return fs.Rehearsal(PRIOR, fs.CausalLMScorer(sure_model()), **(usual | settings))


def trained(folder: Path, mode: str = "weight", resume: Any = None, stop: int | None = None, **settings: Any) -> Any:
    flow = fixed(mode=mode, window=4, rehearsal=rehearsal())
    trainer = flow_trainer(sure_model(), folder, flow, stop=stop, max_steps=12, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(("mode", "accumulate"), [("weight", 1), ("weight", 2), ("resample", 1)])
def test_the_stream_hears_of_every_rehearsed_sample_and_resumes_exactly(tmp_path, mode, accumulate):
    settings = {"mode": mode, "gradient_accumulation_steps": accumulate}
    whole = trained(tmp_path / "whole", **settings)
    marks = [batch["flow_rehearsed"] for batch in whole.batches]
    num = sum(int((rows >= 0).sum()) for rows in marks)
    assert num > 0
    assert any(bool((rows < 0).all()) for rows in marks)
    learned = whole.flow_stream.rehearsal
    heard = learned.counts().sum() + sum(learned.ledger.pending[: len(learned.sizes)])
    told = sum(sum(tally[: len(learned.sizes)]) for tally in learned.ledger.state_dict()["told"].values())
    assert heard <= num <= heard + told
    assert not np.allclose(learned.rates(), 0.5)  # of which nothing is known
    stopped = trained(tmp_path / "cut", stop=5, **settings)
    resumed = trained(tmp_path / "cut", resume=True, **settings)
    assert len(stopped.batches) + len(resumed.batches) == len(whole.batches)
    for one, other in zip([*stopped.batches, *resumed.batches], whole.batches, strict=True):
        assert torch.equal(one["flow_rehearsed"], other["flow_rehearsed"])
        assert torch.equal(one["input_ids"], other["input_ids"])
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert np.array_equal(resumed.flow_stream.rehearsal.rates(), learned.rates())


def test_a_model_whose_logits_are_not_to_be_had_is_refused(tmp_path):
    class Silent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = sure_model()
            self.config = self.inner.config

        def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
            outputs = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            return {"loss": outputs.loss, "hidden_states": outputs.logits.sum(-1)}

    flow = fixed(mode="resample", window=4, rehearsal=rehearsal(), scorer=fs.CausalLMScorer(sure_model()))
    with pytest.raises(ValueError, match="no logits, or its batches no labels"):
        flow_trainer(Silent(), tmp_path, flow, max_steps=12).train()
