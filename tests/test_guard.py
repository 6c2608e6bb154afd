"""The guard against dropped weights: in loops of all kinds, and at the first step of a trainer."""

from __future__ import annotations

import doctest
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trainers import FlowTrainer, Texts, arguments, collate, fixed, sure_model
from transformers import Trainer

import flowstream as fs
from flowstream import guard

# -- in a loop of one's own ------------------------------------------------------------------------


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(5, 6, generator=generator), torch.randint(3, (5,), generator=generator)
    return {"x": inputs, "labels": labels, "flow_weight": torch.rand(5, generator=generator) + 0.1}


def weighted(model):
    return lambda batch: fs.weighted_cross_entropy(model(batch["x"]), batch["labels"], batch["flow_weight"])


def unweighted(model):
    return lambda batch: F.cross_entropy(model(batch["x"]), batch["labels"])


def test_docstring_example_runs():
    assert doctest.testmod(guard).failed == 0


def test_weights_that_are_used_pass_also_under_dropout(model, batch):
    for seed in range(20):
        torch.manual_seed(seed)
        assert fs.check_weights_used(weighted(model), batch, model=model) is True


def test_weights_that_are_ignored_are_caught_also_under_dropout(model, batch):
    for seed in range(20):
        torch.manual_seed(seed)
        with pytest.raises(
            ValueError, match="does not use the weights: its loss is .* Form the loss with|form the loss"
        ):
            fs.check_weights_used(unweighted(model), batch, model=model)


def test_the_error_names_what_computes_the_loss(model, batch):
    with pytest.raises(ValueError, match="^unweighted.<locals>.<lambda> does not use"):
        fs.check_weights_used(unweighted(model), batch)
    with pytest.raises(ValueError, match="^my_loss does not use"):
        fs.check_weights_used(unweighted(model), batch, name="my_loss")


def test_nothing_is_left_behind(model, batch):
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert int(buffers["1.num_batches_tracked"]) == 0
    kept = {name: tensor.clone() for name, tensor in batch.items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def drawing(batch):
        random.random(), np.random.rand()
        batch["flow_weight"] *= 2  # in place
        return weighted(model)({name: batch.pop(name) for name in list(batch)})

    assert fs.check_weights_used(drawing, batch, model=model)
    assert all(buffer.equal(buffers[name]) for name, buffer in model.named_buffers())
    assert batch.keys() == kept.keys()
    assert all(batch[name].equal(kept[name]) for name in kept)
    assert torch.get_rng_state().equal(states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_that_are_tuples_or_pairs_have_their_weights_at_a_place(model, batch):
    row = (batch["x"], batch["labels"], batch["flow_weight"])

    def of_tuple(row):
        return fs.weighted_cross_entropy(model(row[0]), row[1], row[2])

    assert fs.check_weights_used(of_tuple, row, key=2, model=model)
    assert fs.check_weights_used(of_tuple, list(row), key=2, model=model)
    with pytest.raises(ValueError, match="does not use the weights"):
        fs.check_weights_used(lambda row: F.cross_entropy(model(row[0]), row[1]), row, key=2)

    def of_pair(pair):
        (x, labels), weight = pair
        return fs.weighted_cross_entropy(model(x), labels, weight)

    assert fs.check_weights_used(of_pair, ((batch["x"], batch["labels"]), batch["flow_weight"]), key=1, model=model)


def test_it_takes_a_streams_batch(model, batch):
    rows = [{name: batch[name] for name in ("x", "labels")}] * 8
    scorer = fs.FunctionScorer(lambda batch: batch["x"].abs().sum(1))
    for settings, key in ({}, "flow_weight"), ({"attach": "pair"}, 1):
        with fs.FlowStream(rows, scorer, window=2, cache=None, **settings) as stream:
            given = next(iter(stream))

            def compute(given, is_pair=key == 1):
                found, weight = given if is_pair else (given, given["flow_weight"])
                return fs.weighted_cross_entropy(model(found["x"]), found["labels"], weight)

            assert fs.check_weights_used(compute, given, key=key, model=model)


def test_token_weights_are_changed_too():
    logits = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))
    batch = {"labels": torch.randint(11, (2, 7)), "flow_weight": torch.rand(2, 7)}

    def weighted(batch):
        return fs.weighted_lm_loss(logits, batch["labels"], batch["flow_weight"])

    assert fs.check_weights_used(weighted, batch)


@pytest.mark.parametrize("zero", ["weights", "labels"])
def test_a_batch_that_cannot_tell_is_false_after_as_many_forwards_as_any(model, batch, zero):
    calls = []

    def counted(batch):
        calls.append(1)
        return weighted(model)(batch)

    changed = {"weights": {"flow_weight": torch.zeros(5)}, "labels": {"labels": torch.full((5,), -100)}}[zero]
    assert fs.check_weights_used(counted, batch | changed, model=model) is False
    assert fs.check_weights_used(counted, batch, model=model) is True
    assert len(calls) == 4, "ranks of one model must run it equally often"


def test_a_loss_over_its_own_weights_is_caught_at_one_sample(model, batch):
    model.eval()

    def normalised(batch):
        return fs.weighted_cross_entropy(
            model(batch["x"]), batch["labels"], batch["flow_weight"], denominator="weights"
        )

    one = {name: tensor[:1] for name, tensor in batch.items()}
    with pytest.raises(ValueError, match="divided out again"):
        fs.check_weights_used(normalised, one)
    assert fs.check_weights_used(normalised, batch)  # relative weights do count


@pytest.mark.parametrize(
    ("change", "compute", "found"),
    [
        (
            lambda batch: batch.pop("flow_weight"),
            None,
            "has no 'flow_weight', only .*'labels', 'x'.*dropped the weights",
        ),
        (lambda batch: batch.update(flow_weight=[1.0]), None, "is a list: weights are a tensor"),
        (None, lambda batch: (batch["flow_weight"].sum(), 1), "gives a tuple, and no loss"),
        (None, lambda batch: batch["flow_weight"], r"gives shape \[5\], and no loss"),
        (None, lambda batch: F.relu(**batch), "hands the weights to what knows none.*unexpected keyword"),
    ],
)
def test_bad_input(batch, change, compute, found):
    if change is not None:
        change(batch)
    if compute is not None and "knows none" in found:
        batch = {"input": torch.ones(5), "flow_weight": batch["flow_weight"]}
    with pytest.raises(ValueError, match=found):
        fs.check_weights_used(compute or (lambda batch: torch.ones(())), batch)


def test_another_type_error_is_the_users_own(batch):
    with pytest.raises(TypeError, match="another"):
        fs.check_weights_used(lambda batch: (_ for _ in ()).throw(TypeError("another")), batch)


# -- in a trainer ----------------------------------------------------------------------------------


class IgnoresWeights(FlowTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class WeighsItself(FlowTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels, weight = inputs.pop("labels"), inputs.pop("flow_weight")
        return fs.weighted_lm_loss(model(**inputs).logits, labels, weight, denominator=num_items_in_batch)


class DividesByItsWeights(FlowTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels, weight = inputs.pop("labels"), inputs.pop("flow_weight")
        return fs.weighted_lm_loss(model(**inputs).logits, labels, weight, denominator="weights")


class PreparesWithout(FlowTrainer):
    def _prepare_inputs(self, inputs):
        return {name: value for name, value in super()._prepare_inputs(inputs).items() if name != "flow_weight"}


class FiltersTheLoader(FlowTrainer):
    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        return [{name: batch[name] for name in ("input_ids", "labels", "attention_mask")} for batch in loader]


class StepsPast(FlowTrainer):
    """As Trainer's own `training_step` in short, with the model's own loss."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


class StepsPastWeighed(FlowTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


class StepsPastWithout(StepsPastWeighed):
    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs.pop("flow_weight")
        return super().training_step(model, inputs, num_items_in_batch)


def trainer_of(kind, tmp_path, model=None, flow=None, **settings):
    own = {name: settings.pop(name) for name in ("compute_loss_func",) if name in settings}
    args = arguments(tmp_path, **({"max_steps": 2} | settings))
    model = sure_model() if model is None else model
    return kind(model, args, train_dataset=Texts(9), data_collator=collate, flow=flow or fixed(), **own)


@pytest.mark.parametrize(
    ("kind", "settings", "found"),
    [
        (IgnoresWeights, {}, "IgnoresWeights.compute_loss does not use the weights.*mode=.resample"),
        (DividesByItsWeights, {"per_device_train_batch_size": 1}, "DividesByItsWeights.compute_loss .*divided out"),
        (PreparesWithout, {}, "lost its flow_weight.*: PreparesWithout._prepare_inputs has dropped it"),
        (FiltersTheLoader, {}, "lost its flow_weight.*: FiltersTheLoader.get_train_dataloader has dropped it"),
        (StepsPast, {}, r"StepsPast.training_step does not call super\(\).training_step"),
        (StepsPastWeighed, {}, r"StepsPastWeighed.training_step does not call .*check_weights=False"),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trainer_that_drops_the_weights_is_stopped_before_any_parameter_has_changed(
    tmp_path, kind, settings, found, accumulate
):
    trainer = trainer_of(kind, tmp_path, gradient_accumulation_steps=accumulate, **settings)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=found):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(parameter.equal(before[name]) for name, parameter in trainer.model.named_parameters())


@pytest.mark.parametrize("kind", [IgnoresWeights, DividesByItsWeights, StepsPast, StepsPastWeighed])
def test_who_says_so_may_pass(tmp_path, kind):
    trainer = trainer_of(kind, tmp_path, flow=fixed(check_weights=False), per_device_train_batch_size=1)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("kind", [PreparesWithout, FiltersTheLoader, StepsPastWithout])
def test_weights_that_are_gone_are_told_all_the_same(tmp_path, kind):
    with pytest.raises(ValueError, match=f"lost its flow_weight on the way to the loss.*{kind.__name__}"):
        trainer_of(kind, tmp_path, flow=fixed(check_weights=False)).train()


def test_a_loss_of_ones_own_that_is_weighted_passes_and_trains_as_ours(tmp_path):
    ours, own = sure_model(), sure_model()
    trainer_of(FlowTrainer, tmp_path, ours).train()
    trainer_of(WeighsItself, tmp_path, own).train()
    for one, two in zip(ours.parameters(), own.parameters(), strict=True):
        assert one.equal(two)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom"])
def test_every_kind_of_model_is_caught(tmp_path, name):
    """Some swallow what they do not know, some raise."""
    with pytest.raises(ValueError, match="IgnoresWeights.compute_loss (does not use|hands the weights to)"):
        trainer_of(IgnoresWeights, tmp_path, sure_model(name)).train()


def test_the_check_leaves_training_as_it_is(tmp_path):
    models = []
    for check in (True, False):
        models.append(sure_model(attention_dropout=0.2))
        trainer_of(FlowTrainer, tmp_path, models[-1], fixed(check_weights=check), max_steps=3).train()
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert one.equal(two)


def test_a_loss_function_is_refused_at_once_but_in_resample_mode(tmp_path):
    def own(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    with pytest.raises(ValueError, match="compute_loss_func never sees .*override compute_loss .*mode=.resample"):
        trainer_of(FlowTrainer, tmp_path, compute_loss_func=own)
    trainer = trainer_of(FlowTrainer, tmp_path, flow=fixed(mode="resample"), compute_loss_func=own)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_trainer_with_a_loss_of_its_own_is_refused_but_in_resample_mode(tmp_path):
    from flowstream.integrations.transformers import FlowTrainerMixin

    class Distilling(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).logits.square().mean()

    class FlowDistilling(FlowTrainerMixin, Distilling):
        pass

    with pytest.raises(ValueError, match="Distilling forms a loss of its own.*override.*mode=.resample"):
        trainer_of(FlowDistilling, tmp_path)
    trainer_of(FlowDistilling, tmp_path, flow=fixed(mode="resample")).train()
