"""TRL's SFTTrainer wraps, patches and trains the model; the scorer goes on scoring its base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowstream.scoring.causal_lm import CausalLMScorer

peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

BATCH = {"input_ids": torch.randint(4, 97, (4, 16), generator=torch.Generator().manual_seed(0))}


def losses(scorer: CausalLMScorer) -> Tensor:
    (scores,) = scorer.begin([BATCH], level="sample").finish()
    return scores.loss


@pytest.fixture
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, 97))]
    built = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=built, **named)


def make(model: Any, tokenizer: Any, where: Path) -> Any:
    """A trainer that scores between each forward and its backward, if it has a `scorer`."""

    class Trainer(trl.SFTTrainer):  # type: ignore[misc, name-defined]
        scorer: CausalLMScorer | None = None
        found: list[Tensor]

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if self.scorer is not None:
                self.found.append(losses(self.scorer))
                self.scorer.check()
            return loss

    texts = [" ".join(f"w{4 + (7 * row + column) % 90}" for column in range(12)) for row in range(8)]
    settings: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    settings |= {"max_length": 16, "bf16": False, "activation_checkpointing": True, "use_cpu": True}
    settings |= {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    trainer = Trainer(
        model,
        trl.SFTConfig(output_dir=str(where), **settings),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.2, task_type="CAUSAL_LM"),
    )
    trainer.found = []
    return trainer


@pytest.mark.parametrize("made", ["before the trainer", "after the trainer"])
def test_losses_are_the_bases_before_during_and_after_training(
    tiny: Any, tokenizer: Any, tmp_path: Path, made: str
) -> None:
    base = tiny("llama").requires_grad_(False)
    alone = CausalLMScorer(copy.deepcopy(base))
    wanted = losses(alone)
    if made == "before the trainer":
        scorer = CausalLMScorer(base)  # shares it, and the trainer then puts adapters into it
        trainer = make(base, tokenizer, tmp_path)
    else:
        trainer = make(base, tokenizer, tmp_path)
        scorer = CausalLMScorer(trainer.model)
    trainer.scorer = scorer
    assert trainer.model.get_base_model() is base
    patched = vars(base)["forward"]
    assert losses(scorer).equal(wanted)
    trainer.train()
    assert len(trainer.found) == 4
    assert all(found.equal(wanted) for found in trainer.found)
    assert losses(scorer).equal(wanted)
    assert vars(base)["forward"] is patched
    adapted = CausalLMScorer(trainer.model.merge_and_unload(), copy=True)
    assert not torch.allclose(losses(adapted), wanted, atol=1e-3)


def test_scoring_does_not_change_what_trl_trains(tiny: Any, tokenizer: Any, tmp_path: Path) -> None:
    trained = []
    for scores in (True, False):
        base = tiny("llama").requires_grad_(False)
        torch.manual_seed(0)
        trainer = make(base, tokenizer, tmp_path)
        trainer.scorer = CausalLMScorer(trainer.model) if scores else None
        trainer.train()
        trained.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    with_, without = trained
    assert len(with_) == len(without) > 0
    assert all(a.equal(b) for a, b in zip(with_, without, strict=True))


def test_a_copy_of_a_patched_model_does_not_lead_back_to_it(tiny: Any, tokenizer: Any, tmp_path: Path) -> None:
    trainer = make(tiny("llama"), tokenizer, tmp_path)
    scorer = CausalLMScorer(trainer.model, copy=True)
    wanted = losses(scorer)
    for parameter in trainer.model.parameters():
        parameter.data.zero_()
    assert losses(scorer).equal(wanted)
