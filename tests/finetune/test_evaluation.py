"""The loss on an evaluation set is the mean over its tokens, whatever the batches, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from texts import alone
from torch import nn

from flowstream.finetune.collate import Collate
from flowstream.finetune.encoding import Encoded
from flowstream.finetune.evaluation import token_loss
from flowstream.finetune.tokens import TokenDataset

SAMPLES = [
    Encoded(ids=list(range(3, 3 + n)), labels=[-100] * (n // 2) + list(range(3 + n // 2, 3 + n))) for n in range(2, 15)
]
DATASET = TokenDataset.of(SAMPLES)


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Any]) -> Any:
    return tiny("llama", attention_dropout=0.5)


def evaluated(model: Any, batch_size: int) -> float:
    collate = Collate(pad_id=0)
    return token_loss(model, DATASET, collate, batch_size=batch_size, device=torch.device("cpu"))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_it_equals_a_plain_loop_over_samples(model: Any, batch_size: int) -> None:
    found = [alone(model, torch.tensor(each.ids), torch.tensor(each.labels)) for each in SAMPLES]
    labelled = [torch.tensor(each.labels)[1:] != -100 for each in SAMPLES]
    losses = torch.cat([loss[-len(where) :][where] for loss, where in zip(found, labelled, strict=True)])
    assert evaluated(model, batch_size) == pytest.approx(float(losses.mean()), abs=1e-5)


@pytest.mark.parametrize("is_training", [True, False])
def test_the_model_is_evaluated_without_dropout_and_put_back(model: Any, is_training: bool) -> None:
    model.train(is_training)
    assert evaluated(model, 4) == evaluated(model, 4)
    assert model.training is is_training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


def test_the_mode_is_put_back_where_the_model_raises(model: Any) -> None:
    class Broken(nn.Module):
        def forward(self, **batch: Any) -> Any:
            raise RuntimeError("broken")

    broken = Broken().train()
    with pytest.raises(RuntimeError, match="broken"):
        evaluated(broken, 4)
    assert broken.training
