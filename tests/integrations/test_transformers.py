"""`Trainer` with weighted and resampled data: against a loop by hand, the plain `Trainer`, and itself interrupted."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import (
    NUM_STEPS,
    TAU,
    KeepingFlowTrainer,
    Texts,
    assert_alike,
    assert_moved,
    assert_same_batches,
    collate,
    fixed,
    flow_trainer,
    of_reference,
    ones,
    places_of,
    plain_trainer,
    steps_of,
    sure_model,
    train_by_hand,
    weights_by,
    with_lora,
)
from transformers import TrainerCallback

import flowstream as fs
from flowstream.integrations.config import FlowConfig

MODELS = {"full": sure_model, "lora": lambda: with_lora(sure_model())}
both_accumulations = pytest.mark.parametrize("accumulate", [1, 4])
both_modes = pytest.mark.parametrize("mode", ["weight", "resample"])


# -- equal to other trainings ----------------------------------------------------------------------


@both_accumulations
@pytest.mark.parametrize("kind", MODELS)
def test_weighted_training_equals_a_loop_by_hand(tmp_path, kind, accumulate):
    model = MODELS[kind]()
    by_hand, weigh = copy.deepcopy(model), weights_by(model)
    start = copy.deepcopy(model)
    flow_trainer(model, tmp_path, gradient_accumulation_steps=accumulate).train()
    loader = plain_trainer(by_hand, tmp_path).get_train_dataloader()
    steps = list(steps_of(loader, accumulate))
    assert accumulate == 1 or {len(step) for step in steps} == {4, 3}, "no epoch had a ragged end"
    spread = torch.cat([weigh(batch) for batch in steps[0] + steps[1]])
    assert spread.std() / spread.mean() > 0.2, "weights that are all alike prove nothing"
    train_by_hand(by_hand, iter(steps), weigh)
    assert_alike(model, by_hand)
    assert_moved(model, start)


@both_accumulations
@pytest.mark.parametrize("kind", MODELS)
def test_resampled_training_equals_a_loop_by_hand_over_the_drawn_batches(tmp_path, kind, accumulate):
    model = MODELS[kind]()
    by_hand, start = copy.deepcopy(model), copy.deepcopy(model)
    trainer = flow_trainer(model, tmp_path, fixed(mode="resample"), gradient_accumulation_steps=accumulate)
    trainer.train()
    batches = trainer.batches
    assert len(batches) == NUM_STEPS * accumulate
    assert not any("flow_weight" in batch for batch in batches)
    assert sum(len(batch["labels"]) < 4 for batch in batches) < len(batches) / 3, "only an epoch's last may be"
    train_by_hand(by_hand, (batches[at : at + accumulate] for at in range(0, len(batches), accumulate)), ones)
    assert_alike(model, by_hand)
    assert_moved(model, start)
    metrics = trainer.flow_stream.metrics()
    assert metrics["flow/acceptance"] == pytest.approx(metrics["flow/mean_weight"], rel=0.1)
    assert metrics["flow/samples_seen"] > 5 * len(Texts())


@both_accumulations
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_one_train_and_evaluate_as_the_plain_trainer(tmp_path, accumulate, smoothing):
    settings = {"gradient_accumulation_steps": accumulate, "label_smoothing_factor": smoothing}
    settings |= {"eval_strategy": "steps", "eval_steps": 5, "eval_dataset": Texts(9)}
    model, other = sure_model(), sure_model()
    trainer = flow_trainer(model, tmp_path, fixed(policy=fs.Uniform()), **settings)
    plain = plain_trainer(other, tmp_path, **settings)
    trainer.train()
    plain.train()
    assert_alike(model, other)
    assert plain.state.epoch == trainer.state.epoch > 1
    for name in ("loss", "eval_loss", "learning_rate", "epoch"):
        ours, theirs = ([log[name] for log in one.state.log_history if name in log] for one in (trainer, plain))
        assert ours == pytest.approx(theirs, abs=1e-5), name
        assert len(ours) >= NUM_STEPS // 5


@both_accumulations
def test_label_smoothing_is_weighted_like_the_loss_and_left_out_of_scoring(tmp_path, accumulate):
    model = sure_model()
    by_hand, weigh = copy.deepcopy(model), weights_by(model)
    settings = {"gradient_accumulation_steps": accumulate, "label_smoothing_factor": 0.2, "max_steps": 8}
    trainer = flow_trainer(model, tmp_path, **settings)
    trainer.train()
    loader = plain_trainer(by_hand, tmp_path).get_train_dataloader()
    train_by_hand(by_hand, steps_of(loader, accumulate, 8), weigh, smoothing=0.2, num_steps=8)
    assert_alike(model, by_hand)
    for batch in trainer.batches:  # `weigh` knows nothing of smoothing
        torch.testing.assert_close(batch["flow_weight"], weigh(batch), rtol=0, atol=1e-5)


def test_smoothing_leaves_tau_as_it_is(tmp_path):
    taus = []
    for smoothing in (0.0, 0.2):
        trainer = flow_trainer(sure_model(), tmp_path, FlowConfig(), max_steps=12, label_smoothing_factor=smoothing)
        trainer.train()
        taus.append([log["flow/tau"] for log in trainer.state.log_history if "flow/tau" in log])
    assert taus[0] == taus[1]
    assert len(taus[0]) == 2


def test_token_weights_train_as_by_hand_under_the_trainers_own_optimizer(tmp_path):
    """AdamW, and gradients that are clipped."""
    model = sure_model()
    by_hand, start = copy.deepcopy(model), copy.deepcopy(model)
    trainer = flow_trainer(
        model, tmp_path, fixed(level="token"), optim="adamw_torch", max_grad_norm=1.0, learning_rate=1e-3
    )
    trainer.train()
    weights = [batch["flow_weight"] for batch in trainer.batches]
    assert weights[0].shape == trainer.batches[0]["labels"].shape
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / NUM_STEPS)
    by_hand.train()
    for batch, weight in zip(trainer.batches, weights, strict=True):
        logits, labels = by_hand(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"][:, 1:]
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
        ((nll * weight[:, 1:]).sum() / (labels != -100).sum()).backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert_alike(model, by_hand)
    assert_moved(model, start, 0.005)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_checkpointed_activations_and_what_is_included_change_nothing(tmp_path):
    trained = []
    for settings, flow in (({}, fixed()), ({"gradient_checkpointing": True}, fixed(include=("loss", "tau", "index")))):
        for make in MODELS.values():
            trained.append(make())
            flow_trainer(trained[-1], tmp_path, flow, max_steps=6, **settings).train()
    assert_alike(trained[0], trained[2], 1e-6)
    assert_alike(trained[1], trained[3], 1e-6)


def test_bf16_is_close_to_fp32(tmp_path):
    history = []
    for bf16 in (False, True):
        trainer = flow_trainer(sure_model(), tmp_path, bf16=bf16, max_steps=10)
        trainer.train()
        history.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert trainer.flow_stream.metrics()["flow/nonfinite"] == 0
    assert history[0] == pytest.approx(history[1], rel=0.03)
    assert history[0] != history[1]


# -- evaluation and logs ---------------------------------------------------------------------------


def test_evaluation_is_the_plain_trainers(tmp_path):
    def compute_metrics(outcome):
        predicted, labels = outcome.predictions.argmax(-1)[:, :-1], outcome.label_ids[:, 1:]
        return {"accuracy": float((predicted == labels)[labels != -100].mean())}

    model = sure_model()
    settings = {"eval_dataset": Texts(9), "compute_metrics": compute_metrics, "max_steps": 6}
    trainer = flow_trainer(model, tmp_path, eval_strategy="steps", eval_steps=3, **settings)
    trainer.train()
    found = trainer.evaluate()
    expected = plain_trainer(copy.deepcopy(model), tmp_path, **settings).evaluate()
    for name in ("eval_loss", "eval_accuracy"):
        assert found[name] == expected[name], name
    during = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in during] == [3, 6, 6]
    assert during[1]["eval_loss"] == found["eval_loss"]
    assert not any(name.startswith("flow") for batch in trainer.evaluated for name in batch)
    assert not any(name.startswith("flow") for log in during for name in log)
    assert trainer.predict(Texts(9)).metrics["test_loss"] == expected["eval_loss"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorflow")
def test_metrics_are_in_the_history_and_in_tensorboards_event_files(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = flow_trainer(sure_model(), tmp_path, FlowConfig(), max_steps=10, report_to=["tensorboard"])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [5, 10]
    for name in ("flow/tau", "flow/ess", "flow/mean_weight", "flow/samples_seen", "flow/score_seconds"):
        assert all(math.isfinite(log[name]) for log in logs), name
    assert logs[1]["flow/samples_emitted"] == 40
    (events,) = {path.parent for path in Path(tmp_path).rglob("events.out.tfevents.*")}
    read = EventAccumulator(str(events)).Reload()
    for name in ("loss", "flow/tau", "flow/ess"):
        written = [(event.step, event.value) for event in read.Scalars(f"train/{name}")]
        assert written == [(log["step"], pytest.approx(log[name])) for log in logs], name
    assert trainer.num_examples(trainer.callback_handler.train_dataloader) == len(Texts())


# -- resuming --------------------------------------------------------------------------------------

DROPPING = {"attention_dropout": 0.1}


def resumable(folder, mode, accumulate, **settings):
    """Dropout in training, a running τ; saves only when it is stopped."""
    usual = {"gradient_accumulation_steps": accumulate, "save_strategy": "steps", "save_steps": 500}
    usual |= {"optim": "adamw_torch", "learning_rate": 1e-3}
    return flow_trainer(sure_model(**DROPPING), folder, FlowConfig(mode=mode), **(usual | settings))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(mode, accumulate) → the trainer after a run that nothing has stopped."""

    @functools.cache
    def run(mode, accumulate):
        trainer = resumable(tmp_path_factory.mktemp("whole"), mode, accumulate)
        trainer.train()
        return trainer

    return run


@pytest.mark.parametrize(
    ("mode", "accumulate", "stops"),
    [
        ("weight", 1, [7]),  # in an epoch of 11 steps
        ("weight", 1, [11]),  # at its end
        ("weight", 4, [2, 7]),  # in epochs of 3 steps, the last of 3 batches; resumed twice
        ("weight", 4, [6]),
        ("resample", 1, [1, 13]),
        ("resample", 4, [3]),
    ],
)
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, uninterrupted, mode, accumulate, stops):
    whole = uninterrupted(mode, accumulate)
    batches = []
    for stop, resume in zip([*stops, None], [None, *(True for _ in stops)], strict=True):
        trainer = resumable(tmp_path, mode, accumulate, stop=stop)
        trainer.train(resume_from_checkpoint=resume)
        batches += trainer.batches
    assert trainer.state.global_step == NUM_STEPS
    assert_same_batches(batches, whole.batches)
    assert_alike(trainer.model, whole.model, 1e-6)  # what is loaded lies elsewhere in memory, which rounds otherwise
    assert trainer.state.log_history[-2]["flow/tau"] == whole.state.log_history[-2]["flow/tau"]


@both_accumulations
def test_a_resume_where_the_drawn_epoch_ends_is_exact_too(tmp_path, accumulate):
    """The trainer takes back what the next epoch draws for its workers: nothing in training may depend on it."""
    whole = resumable(tmp_path / "whole", "resample", accumulate, max_steps=40 // accumulate)
    whole.train()
    ends = [step for step in whole.keeping.ends if step < whole.state.global_step]
    assert ends, "no step ends with an epoch"
    first = resumable(tmp_path, "resample", accumulate, max_steps=40 // accumulate, stop=ends[0])
    first.train()
    assert first.flow_stream.end_of_epoch or first.flow_stream.state_dict()["epoch"] > 0
    second = resumable(tmp_path, "resample", accumulate, max_steps=40 // accumulate)
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{ends[0]}"))
    assert_same_batches(first.batches + second.batches, whole.batches)
    assert_alike(second.model, whole.model, 1e-6)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, uninterrupted):
    """A checkpoint of step 5, with 4 batches a step."""
    folder = tmp_path_factory.mktemp("stopped")
    resumable(folder, "weight", 4, stop=5).train()
    return folder / "checkpoint-5"


def test_a_checkpoint_has_one_file_of_the_stream_and_a_path_resumes_it(tmp_path, stopped, uninterrupted):
    assert [path.name for path in stopped.glob("flowstream*")] == ["flowstream-0000000005-rank-00000-of-00001.pt"]
    trainer = resumable(tmp_path, "weight", 4)
    trainer.train(resume_from_checkpoint=str(stopped))
    assert_alike(trainer.model, uninterrupted("weight", 4).model, 1e-6)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"per_device_train_batch_size": 2}, "saved with batches of 4, and they are of 2 now.*ignore_data_skip=True"),
        ({"gradient_accumulation_steps": 2}, "accumulate"),
        ({"train_dataset": Texts(30)}, "the data, the batch size, .* has changed.*ignore_data_skip=True"),
    ],
)
def test_a_resume_of_another_configuration_is_refused(tmp_path, stopped, settings, found):
    with pytest.raises(ValueError, match=found):
        resumable(tmp_path, "weight", 4, **settings).train(resume_from_checkpoint=str(stopped))


def test_a_checkpoint_of_another_trainer_is_refused_or_begins_the_data_anew(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5}
    plain_trainer(sure_model(), tmp_path, max_steps=5, **settings).train()
    with pytest.raises(ValueError, match="has no state of flowstream.*ignore_data_skip=True"):
        flow_trainer(sure_model(), tmp_path, **settings).train(resume_from_checkpoint=True)
    anew = flow_trainer(sure_model(), tmp_path, ignore_data_skip=True, max_steps=9)
    anew.train(resume_from_checkpoint=True)
    begun = flow_trainer(sure_model(), tmp_path, max_steps=4)
    begun.train()
    assert [batch["input_ids"].tolist() for batch in anew.batches] == [b["input_ids"].tolist() for b in begun.batches]


def test_a_step_that_a_signal_cut_short_is_done_again(tmp_path, uninterrupted):
    """What transformers saves then is of the step before, though the stream has delivered the next one's batches."""

    class Asked(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            (watching,) = (one for one in trainer.callback_handler.callbacks if type(one).__name__.startswith("JIT"))
            watching.jit_manager.is_checkpoint_requested = state.global_step == 4

    trainer = resumable(tmp_path, "weight", 4, enable_jit_checkpoint=True, callbacks=[Asked()])
    trainer.train()
    assert (trainer.state.global_step, (tmp_path / "checkpoint-4").is_dir()) == (5, True)
    resumed = resumable(tmp_path, "weight", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_batches(resumed.batches, uninterrupted("weight", 4).batches[-len(resumed.batches) :])


# -- references ------------------------------------------------------------------------------------


def test_the_initial_reference_is_a_copy_and_the_model_keeps_its_flags(tmp_path):
    model = sure_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    weights = weights_by(model)
    trainer = flow_trainer(model, tmp_path, max_steps=11)
    trainer.train()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert places_of(model).isdisjoint(of_reference(trainer))
    for batch in trainer.batches:  # also the last, when training has gone on for 10 steps
        torch.testing.assert_close(batch["flow_weight"], weights(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("reference", ["initial", "base"])
def test_under_peft_the_base_is_shared(tmp_path, reference):
    bare = sure_model()
    weigh = weights_by(bare)
    model = with_lora(bare)
    trainer = flow_trainer(model, tmp_path, fixed(reference=reference), max_steps=11)
    trainer.train()
    assert of_reference(trainer) <= places_of(model)
    for batch in trainer.batches:
        torch.testing.assert_close(batch["flow_weight"], weigh(batch), rtol=0, atol=1e-5)


def test_a_reference_is_loaded_from_a_path(tmp_path):
    reference = sure_model(num_hidden_layers=1)
    reference.save_pretrained(tmp_path / "reference")
    trainer = flow_trainer(sure_model(), tmp_path, fixed(reference=tmp_path / "reference"), max_steps=3)
    trainer.train()
    weigh = weights_by(reference)
    for batch in trainer.batches:
        torch.testing.assert_close(batch["flow_weight"], weigh(batch), rtol=0, atol=1e-5)


def test_a_scorer_of_ones_own_takes_the_references_place(tmp_path):
    scorer = fs.FunctionScorer(lambda batch: batch["attention_mask"].sum(1).float(), name="length")
    trainer = flow_trainer(sure_model(), tmp_path, fixed(scorer=scorer), max_steps=3)
    trainer.train()
    for batch in trainer.batches:
        lengths = batch["attention_mask"].sum(1)
        torch.testing.assert_close(batch["flow_weight"], torch.exp(-lengths / TAU))


def test_references_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no adapters.*wrap it with PEFT first, or take reference=.initial"):
        flow_trainer(sure_model(), tmp_path, fixed(reference="base"))
    trained = with_lora(sure_model(), init_lora_weights=False)  # these adapters do something
    with pytest.raises(ValueError, match="trained_adapters=.ignore"):
        flow_trainer(trained, tmp_path)
    flow_trainer(trained, tmp_path, fixed(trained_adapters="ignore"), max_steps=2).train()


def test_a_model_made_anew_by_each_train_is_its_own_reference(tmp_path):
    made = []

    def model_init():
        made.append(with_lora(sure_model()))
        with torch.no_grad():
            made[-1].get_base_model().lm_head.weight *= 0.5 ** len(made)
        return made[-1]

    trainer = flow_trainer(None, tmp_path, model_init=model_init, max_steps=3)
    for number in (2, 3):
        trainer.batches.clear()
        trainer.train()
        assert (len(made), trainer.model) == (number, made[-1])
        assert of_reference(trainer) <= places_of(trainer.model)
        bare = sure_model()
        with torch.no_grad():
            bare.lm_head.weight *= 0.5**number
        weigh = weights_by(bare)
        for batch in trainer.batches:
            torch.testing.assert_close(batch["flow_weight"], weigh(batch), rtol=0, atol=1e-5)


# -- other loaders ---------------------------------------------------------------------------------


def test_a_stream_of_data_without_a_length_goes_round(tmp_path):
    import datasets

    rows = [{name: value.tolist() for name, value in row.items()} | {"name": "unused"} for row in Texts().rows]
    whole = datasets.Dataset.from_list(rows)
    streamed = whole.to_iterable_dataset()

    class Streamed(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Texts().rows)

    first_epoch = {}
    for name, dataset in {"whole": whole, "streamed": streamed, "torch": Streamed()}.items():
        trainer = flow_trainer(
            sure_model(), tmp_path, train_dataset=dataset, max_steps=13, train_sampling_strategy="sequential"
        )
        trainer.train()
        assert len(trainer.batches) == 13
        first_epoch[name] = [(batch["input_ids"].tolist(), batch["flow_weight"].tolist()) for batch in trainer.batches]
        assert first_epoch[name][11:] == first_epoch[name][:2], "the second epoch"
    assert first_epoch["whole"] == first_epoch["streamed"] == first_epoch["torch"]


def test_without_a_length_steps_must_be_counted(tmp_path):
    with pytest.raises(ValueError, match="max_steps must be set to a positive value"):
        flow_trainer(sure_model(), tmp_path, fixed(mode="resample"), max_steps=-1, num_train_epochs=1).train()


def test_epochs_are_counted_where_they_have_a_length(tmp_path):
    trainer = flow_trainer(sure_model(), tmp_path, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=4)
    trainer.train()
    assert (trainer.state.global_step, trainer.state.epoch, len(trainer.batches)) == (6, 2.0, 22)
    orders = [[batch["input_ids"].tolist() for batch in trainer.batches[at : at + 11]] for at in (0, 11)]
    assert orders[0] != orders[1], "each epoch is shuffled anew"


def test_workers_are_let_go_when_training_ends(tmp_path):
    trainer = flow_trainer(sure_model(), tmp_path, max_steps=2, dataloader_num_workers=1)
    trainer.train()
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(trainer.flow_stream))
    assert trainer.flow_stream.metrics()["flow/samples_emitted"] == 8
    trainer.train()  # and begins anew
    assert_same_batches(trainer.batches[:2], trainer.batches[2:])


def test_a_trainer_of_another_kind_takes_the_mixin(tmp_path):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    from flowstream.integrations.transformers import FlowTrainerMixin

    class FlowSeq2SeqTrainer(FlowTrainerMixin, Seq2SeqTrainer):
        pass

    assert issubclass(KeepingFlowTrainer, FlowTrainerMixin)
    model, other = sure_model(), sure_model()
    flow_trainer(other, tmp_path, max_steps=3).train()
    settings = flow_trainer(model, tmp_path, max_steps=3).args.to_dict()
    names = ("output_dir", "max_steps", "learning_rate", "per_device_train_batch_size", "use_cpu", "disable_tqdm")
    names += ("optim", "max_grad_norm")
    args = Seq2SeqTrainingArguments(**{name: settings[name] for name in names}, report_to=[], save_strategy="no")
    args.dataloader_pin_memory = False
    FlowSeq2SeqTrainer(model, args, train_dataset=Texts(), data_collator=collate, flow=fixed()).train()
    assert_alike(model, other, 1e-6)


class Looking(TrainerCallback):
    """Looks at the training loader in the midst of training."""

    def __init__(self, look: Callable[[Any], object]) -> None:
        self.look = look

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.look(kwargs["train_dataloader"])


def test_a_callback_may_ask_for_a_loader_of_its_own_and_training_goes_on(tmp_path):
    trainer = flow_trainer(model := sure_model(), tmp_path)
    trainer.add_callback(Looking(lambda _: len(list(trainer.get_train_dataloader()))))
    trainer.train()
    undisturbed = flow_trainer(other := sure_model(), tmp_path)
    undisturbed.train()
    assert len(trainer.batches) == len(undisturbed.batches) == NUM_STEPS
    assert_alike(model, other)


def test_a_callback_that_iterates_over_the_training_loader_does_not_end_training_without_a_word(tmp_path):
    trainer = flow_trainer(sure_model(), tmp_path)
    trainer.add_callback(Looking(lambda loader: next(iter(loader))))
    with pytest.raises(RuntimeError, match="iterated over again while they were trained on"):
        trainer.train()
