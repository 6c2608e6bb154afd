"""Models of other tasks in a trainer: encoder-decoders, classifiers, mixtures of experts; and those of none."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import build
from torch.utils.data import Dataset
from trainers import RATE, TAU, Texts, arguments, assert_alike, collate, fixed, flow_trainer, sure_model, with_lora
from transformers import Trainer

import flowstream as fs
from flowstream.integrations.task import bare, scorer_of, task_of, weighted_loss
from flowstream.integrations.transformers import FlowTrainer

NUM_STEPS = 8


class Samples(Dataset):
    """Inputs and labels of one task, 14 of them."""

    def __init__(self, name):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 97, (14, 9), generator=generator)
        classes = torch.randint(3, (14,), generator=generator)
        if name == "vit":
            self.columns = {"pixel_values": torch.randn(14, 3, 16, 16, generator=generator), "labels": classes}
        elif name in ("t5", "bart"):
            labels = torch.randint(3, 97, (14, 6), generator=generator)
            for row in range(14):
                labels[row, 2 + row % 5 :] = -100
            self.columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        else:
            self.columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": classes}

    def __len__(self):
        return 14

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


def sure(name):
    model = build(name, **({} if name == "llama_classifier" else {"dropout_rate": 0.0} if name == "t5" else {}))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.dropout = model.config.attention_dropout = model.config.activation_dropout = 0.0
    with torch.no_grad():
        head = next(getattr(model, part) for part in ("lm_head", "classifier", "score") if hasattr(model, part))
        head.weight *= 4
    return model


def trainer_of(kind, model, name, folder, **settings):
    flow = {"flow": settings.pop("flow", fixed())} if kind is FlowTrainer else {}
    return kind(model, arguments(folder, max_steps=NUM_STEPS, **settings), train_dataset=Samples(name), **flow)


def losses_of(model, batch):
    """[B, T] or [B], unreduced, 0 where ignored: from the model's own logits."""
    logits = model(**batch).logits
    labels = batch["labels"]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)


@pytest.mark.filterwarnings("ignore:.*lm_head.*tied.*")
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", ["t5", "bart", "vit", "bert"])
def test_weighted_training_equals_a_loop_by_hand(tmp_path, name, accumulate):
    model = sure(name)
    by_hand, reference = copy.deepcopy(model).train(), copy.deepcopy(model)
    trainer_of(FlowTrainer, model, name, tmp_path, gradient_accumulation_steps=accumulate).train()
    loader = trainer_of(Trainer, by_hand, name, tmp_path).get_train_dataloader()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=RATE)
    done, epoch = 0, 0
    while done < NUM_STEPS:
        loader.set_epoch(epoch)
        batches = list(loader)
        for first in range(0, len(batches), accumulate):
            step = batches[first : first + accumulate]
            number = sum((batch["labels"] != -100).sum() for batch in step)
            for batch in step:
                labelled = (batch["labels"] != -100).view(len(batch["labels"]), -1).sum(1)
                with torch.no_grad():
                    own = losses_of(reference, batch).view(len(labelled), -1).sum(1) / labelled
                losses = losses_of(by_hand, batch).view(len(labelled), -1).sum(1)
                ((torch.exp(-own / TAU) * losses).sum() / number).backward()
            optimizer.param_groups[0]["lr"] = RATE * (1 - done / NUM_STEPS)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done == NUM_STEPS:
                break
        epoch += 1
    assert_alike(model, by_hand)


@pytest.mark.filterwarnings("ignore:.*lm_head.*tied.*")
@pytest.mark.parametrize(
    ("name", "settings"),
    # The plain trainer hands T5 and BERT the labels of the whole step, which their losses do not look at: a step's
    # gradient is then the sum of its batches' means. And T5 has no decoder_input_ids where it smooths.
    [
        ("t5", {}),
        ("vit", {}),
        ("vit", {"gradient_accumulation_steps": 4}),
        ("vit", {"label_smoothing_factor": 0.1}),
        ("bert", {}),
        ("bert", {"label_smoothing_factor": 0.1}),
    ],
    ids=str,
)
def test_weights_of_one_train_as_the_plain_trainer(tmp_path, name, settings):
    model, other = sure(name), sure(name)
    trainer_of(FlowTrainer, model, name, tmp_path, flow=fixed(policy=fs.Uniform()), **settings).train()
    trainer_of(Trainer, other, name, tmp_path, **settings).train()
    assert_alike(model, other)


def lora(model):
    """Around attention only."""
    return with_lora(model, target_modules=["q_proj", "v_proj"])


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 4}, {"label_smoothing_factor": 0.1}, {"peft": True}],
    ids=str,
)
def test_experts_are_balanced_as_in_the_plain_trainer(tmp_path, settings):
    options = dict(settings)
    wrap = lora if options.pop("peft", False) else lambda model: model
    # A coefficient so large that its absence would show.
    model, other, unbalanced = (
        wrap(sure_model("mixtral", output_router_logits=True, router_aux_loss_coef=coefficient))
        for coefficient in (0.5, 0.5, 0.0)
    )
    arguments_of = {"max_steps": 6, "learning_rate": 0.02} | options
    flow_trainer(model, tmp_path, fixed(policy=fs.Uniform()), **arguments_of).train()
    flow_trainer(unbalanced, tmp_path, fixed(policy=fs.Uniform()), **arguments_of).train()
    Trainer(other, arguments(tmp_path, **arguments_of), train_dataset=Texts(), data_collator=collate).train()
    assert_alike(model, other)
    if "label_smoothing_factor" not in options:
        gaps = [
            (one - two).detach().abs().max()
            for one, two in zip(model.parameters(), unbalanced.parameters(), strict=True)
        ]
        assert max(gaps) > 1e-4


@pytest.mark.parametrize("name", ["gpt2", "bloom", "opt", "gpt_neox", "gptj", "mamba"])
def test_causal_models_of_other_names_train_as_in_the_plain_trainer(tmp_path, name):
    models = [sure_model(name), sure_model(name)]
    for model in models:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2}
    if name == "opt":
        for model in models:
            for layer in model.model.decoder.layers:
                layer.dropout = layer.self_attn.dropout = 0.0
    flow_trainer(models[0], tmp_path, fixed(policy=fs.Uniform()), **settings).train()
    Trainer(models[1], arguments(tmp_path, **settings), train_dataset=Texts(), data_collator=collate).train()
    assert_alike(*models)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_tasks_are_told_by_the_model():
    assert task_of(build("llama")) == task_of(build("gpt2")) == task_of(build("bloom")) == "causal language model"
    assert task_of(with_lora(build("gpt2"), fan_in_fan_out=True)) == "causal language model"
    assert task_of(torch.compile(build("llama"))) == "causal language model"
    assert task_of(build("t5")) == task_of(build("bart")) == "encoder-decoder"
    assert task_of(build("bert")) == task_of(build("vit")) == task_of(build("llama_classifier")) == "classifier"
    model = build("llama")
    assert bare(with_lora(model)) is model


@pytest.mark.parametrize("settings", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}], ids=str)
def test_regression_and_several_labels_are_refused(settings):
    with pytest.raises(ValueError, match="BertForSequenceClassification is no .* single-label classifier.*resample"):
        task_of(build("bert", **settings))


def test_models_of_no_known_task_are_refused(tmp_path):
    import transformers

    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.BertForMaskedLM(config)
    with pytest.raises(ValueError, match='BertForMaskedLM is no causal language model.*mode="resample" with a scorer'):
        flow_trainer(model, tmp_path)
    scorer = fs.FunctionScorer(lambda batch: batch["attention_mask"].sum(1).float())
    resampled = flow_trainer(model, tmp_path, fixed(mode="resample", scorer=scorer), max_steps=2)
    resampled.train()
    assert resampled.state.global_step == 2
    with pytest.raises(ValueError, match="BertForMaskedLM is no causal language model"):
        flow_trainer(model, tmp_path, fixed(scorer=scorer))


def test_labels_that_are_no_classes_are_refused():
    outputs = {"logits": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match="torch.float32 numbers.*one integer a sample"):
        weighted_loss("classifier", outputs, torch.zeros(2, 3), torch.ones(2), denominator=None)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda batch: {name: batch[name] for name in ("input_ids", "attention_mask")}, r"a training batch has \['att"),
        (lambda batch: batch | {"shift_labels": batch["labels"]}, "no shift_labels.*resample"),
    ],
)
def test_batches_without_labels_to_weigh_are_refused(tmp_path, change, found):
    def changed(rows):
        return change(collate(rows))

    with pytest.raises(ValueError, match=found):
        flow_trainer(sure_model(), tmp_path, data_collator=changed, remove_unused_columns=False).train()


def test_a_copy_goes_where_it_is_wanted_and_a_path_is_read(tmp_path):
    model = build("vit")
    model.save_pretrained(tmp_path)
    batch = {name: column[:4] for name, column in Samples("vit").columns.items()}
    expected = losses_of(model, batch)
    for reference in ("initial", tmp_path, str(tmp_path)):
        scorer = scorer_of(model, reference, device=torch.device("cpu"))
        with fs.FlowStream([batch], scorer, include=("loss",), cache=None) as stream:
            torch.testing.assert_close(next(iter(stream))["flow_loss"], expected, rtol=0, atol=1e-5)
