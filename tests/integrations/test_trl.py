"""TRL's `SFTTrainer` with weights: a plain loop's parameters, whatever the batches look like."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")

from trl_trainers import (  # noqa: E402
    RATE,
    TEMPLATE,
    completions,
    conversations,
    distance,
    documents,
    flow,
    flow_token_weights,
    flow_weight,
    model,
    ones,
    tokenizer,
    trained_by_hand,
    trainer,
)

import flowstream as fs  # noqa: E402
from flowstream.integrations.config import FlowConfig  # noqa: E402
from flowstream.integrations.transformers import FlowTrainerMixin  # noqa: E402
from flowstream.integrations.trl import FlowSFTTrainer  # noqa: E402

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded completions": {},
    "assistant turns": {"assistant_only_loss": True, "train_dataset": conversations(), "template": TEMPLATE},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
}
TIMES = ("runtime", "per_second")
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def started(made: Any) -> Any:
    """The model that a trainer begins with, as a loop of one's own would have it."""
    start = copy.deepcopy(made.model)
    vars(start.get_base_model() if isinstance(start, peft.PeftModel) else start).pop("forward")
    return start


# -- a plain loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "accumulate"),
    [*((layout, 1) for layout in LAYOUTS), ("padded completions", 4), ("packed", 4)],
)
def test_twenty_steps_are_those_of_a_plain_loop(tmp_path: Path, layout: str, accumulate: int) -> None:
    start = model()
    made = trainer(
        tmp_path, base=copy.deepcopy(start), flow=flow(), gradient_accumulation_steps=accumulate, **LAYOUTS[layout]
    )
    made.train()
    assert len(made.steps) == 20
    assert ("attention_mask" in made.batches[0]) == (layout in ("padded completions", "assistant turns", "wrapped"))
    expected = trained_by_hand(start, made.steps)
    assert distance(made.model, expected) < 1e-5
    assert distance(expected, start) > 1e-3
    if layout != "wrapped":  # whose rows are long, and their weights alike
        assert distance(expected, trained_by_hand(start, made.steps, weigh=ones)) > 1e-3


def test_lora_is_weighted_by_its_base(tmp_path: Path) -> None:
    start = model()
    made = trainer(
        tmp_path,
        base=copy.deepcopy(start),
        flow=flow(reference="base"),
        peft_config=peft.LoraConfig(**LORA),
        learning_rate=0.5,
        gradient_accumulation_steps=2,
        activation_checkpointing=True,
        **LAYOUTS["packed"],
    )
    adapted = started(made)
    made.train()
    expected = trained_by_hand(adapted, made.steps, reference=start, rate=0.5)
    assert distance(made.model, expected) < 1e-5
    assert distance(adapted, expected) > 1e-3
    assert distance(made.model.unload(), start) == 0


def test_dft_is_weighted(tmp_path: Path) -> None:
    start = model()
    made = trainer(tmp_path, base=copy.deepcopy(start), flow=flow(), loss_type="dft", **LAYOUTS["packed"], max_steps=8)
    made.train()
    expected = trained_by_hand(start, made.steps, loss_type="dft")
    assert distance(made.model, expected) < 1e-5
    assert distance(expected, trained_by_hand(start, made.steps)) > 1e-4


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize("layout", ["padded completions", "packed"])
def test_label_smoothing_is_weighted_and_not_scored(tmp_path: Path, layout: str) -> None:
    start = model()
    given = LAYOUTS[layout] | {"label_smoothing_factor": 0.1, "max_steps": 8}
    made = trainer(tmp_path, base=copy.deepcopy(start), flow=flow(), **given)
    made.train()
    expected = trained_by_hand(start, made.steps, label_smoothing=0.1)
    assert distance(made.model, expected) < 1e-5
    assert distance(expected, trained_by_hand(start, made.steps)) > 1e-4


@pytest.mark.parametrize("layout", ["padded completions", "packed"])
def test_tokens_have_weights_of_their_own(tmp_path: Path, layout: str) -> None:
    start = model()
    made = trainer(tmp_path, base=copy.deepcopy(start), flow=flow(level="token"), **LAYOUTS[layout], max_steps=8)
    made.train()
    expected = trained_by_hand(start, made.steps, weigh=flow_token_weights)
    assert distance(made.model, expected) < 5e-5  # losses of tokens are kept in half precision
    assert distance(expected, trained_by_hand(start, made.steps)) > 1e-3


def test_resampled_batches_are_trained_as_any(tmp_path: Path) -> None:
    start = model()
    given = {"gradient_accumulation_steps": 4, "max_steps": 10}
    made = trainer(tmp_path, base=copy.deepcopy(start), flow=flow(mode="resample"), **given)
    made.train()
    assert [len(step) for step in made.steps] == [4] * 10
    assert all("flow_weight" not in batch for batch in made.batches)
    assert max(len(batch["labels"]) for batch in made.batches) == 2
    assert distance(made.model, trained_by_hand(start, made.steps, weigh=ones)) < 1e-5


def test_a_data_set_that_streams_is_weighted(tmp_path: Path) -> None:
    start = model()
    streamed = completions().to_iterable_dataset()
    made = trainer(
        tmp_path, base=copy.deepcopy(start), flow=flow(), train_dataset=streamed, gradient_accumulation_steps=2
    )
    made.train()
    assert [len(step) for step in made.steps] == [2] * 20
    assert distance(made.model, trained_by_hand(start, made.steps)) < 1e-5


# -- weights -----------------------------------------------------------------------------------------


def test_a_document_weighs_the_same_padded_and_packed(tmp_path: Path) -> None:
    base, found = model(), {}
    for layout in ("padded completions", "packed"):
        made = trainer(tmp_path, base=copy.deepcopy(base), flow=flow(cache=None), **LAYOUTS[layout], max_steps=15)
        made.train()
        told = [document for batch in made.batches for document in documents(batch)]
        assert all(document.weight.unique().numel() == 1 for document in told)
        found[layout] = {document.key: float(document.weight[0]) for document in told}
    padded, packed = found.values()
    assert len(padded) == 30
    assert packed == pytest.approx(padded, abs=1e-6)


def test_the_reference_stays_the_model_as_it_was(tmp_path: Path) -> None:
    base = model()
    made = trainer(tmp_path, base=copy.deepcopy(base), flow=flow(cache=None, window=2), **LAYOUTS["packed"])
    made.train()
    assert distance(made.model, base) > 1e-3
    for document in documents(made.batches[-1]):
        assert float(document.weight[0]) == pytest.approx(float(flow_weight(base, document)), abs=1e-6)


def test_packed_batches_pass_through_small_windows_and_a_cache_on_disk(tmp_path: Path) -> None:
    start, trained = model(), []
    for _ in range(2):
        given = flow(window=2, cache=tmp_path / "losses", temperature=fs.RunningMedian(warmup_samples=8))
        made = trainer(tmp_path, base=copy.deepcopy(start), flow=given, **LAYOUTS["packed"])
        made.train()
        trained.append(made)
    one, other = trained
    assert one.flow_stream.metrics()["flow/cache_hit_rate"] < other.flow_stream.metrics()["flow/cache_hit_rate"] == 1
    assert distance(one.model, other.model) == 0
    for batch, again in zip(one.batches, other.batches, strict=True):
        assert batch.keys() == again.keys() >= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "seq_idx"}
        assert batch["cu_seq_lens_q"][-1] == batch["flow_weight"].shape[1]
        assert batch["flow_weight"].equal(again["flow_weight"])


def test_packed_rows_are_not_resampled(tmp_path: Path) -> None:
    made = trainer(tmp_path, flow=flow(mode="resample"), **LAYOUTS["packed"])
    with pytest.raises(ValueError, match=r"packed.*mode=.weight."):
        made.train()


# -- beside TRL's own --------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "accumulate"), [("assistant turns", 1), ("packed", 4)])
def test_uniform_weights_change_nothing_and_count_nothing(tmp_path: Path, layout: str, accumulate: int) -> None:
    given: dict[str, Any] = LAYOUTS[layout] | {"gradient_accumulation_steps": accumulate, "max_steps": 10}
    given |= {"logging_strategy": "steps", "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 5}
    given |= {"eval_dataset": conversations(6) if layout == "assistant turns" else completions(6)}
    ours = trainer(tmp_path / "ours", flow=flow(policy=fs.Uniform()), **given)
    theirs = trainer(tmp_path / "theirs", kind=trl.SFTTrainer, **given)
    for made in (ours, theirs):
        made.train()
    assert distance(ours.model, theirs.model) <= 1e-6
    logs, plain = ours.state.log_history, theirs.state.log_history
    assert len(logs) == len(plain) == 10 + 2 + 1
    for told, wanted in zip(logs, plain, strict=True):
        told = {name: value for name, value in told.items() if name in wanted and not name.endswith(TIMES)}
        wanted = {name: value for name, value in wanted.items() if not name.endswith(TIMES)}
        assert told == pytest.approx(wanted, abs=1e-5)
    assert {"loss", "mean_token_accuracy", "entropy", "num_tokens", "flow/mean_weight"} <= logs[0].keys()
    assert {"eval_loss", "eval_mean_token_accuracy"} <= plain[5].keys()


def test_what_a_mixture_adds_to_balance_its_experts_is_not_weighted(tmp_path: Path, tiny: Any) -> None:
    start = tiny("mixtral")
    made = trainer(tmp_path, base=copy.deepcopy(start), flow=flow(), router_aux_loss_coef=0.5, max_steps=5)
    made.train()
    by_hand, unbalanced = (trained_with_balance(start, made.batches, coefficient) for coefficient in (0.5, 0.0))
    assert distance(made.model, by_hand) < 1e-5
    assert distance(by_hand, unbalanced) > 1e-4


def trained_with_balance(start: Any, batches: list[dict[str, Any]], coefficient: float) -> Any:
    """Plain descent on Σ w·nll / N, and the unweighted balance of experts."""
    trained = copy.deepcopy(start).train()
    descent = torch.optim.SGD(trained.parameters(), lr=RATE)
    for batch in batches:
        labels = batch["labels"][:, 1:]
        out = trained(batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
        losses = F.cross_entropy(out.logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100)
        loss = (batch["flow_weight"][:, None] * losses).sum() / (labels != -100).sum()
        (loss + coefficient * out.aux_loss).backward()
        descent.step()
        descent.zero_grad()
    return trained


# -- refusals ----------------------------------------------------------------------------------------


def test_weights_that_a_subclass_drops_are_told_at_the_first_step(tmp_path: Path) -> None:
    class Forgetful(FlowSFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):  # type: ignore[no-untyped-def] # fmt: skip
            return trl.SFTTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    made = trainer(tmp_path, kind=Forgetful, flow=flow())
    with pytest.raises(ValueError, match=r"Forgetful.compute_loss does not use the weights"):
        made.train()
    assert made.state.global_step == 0
    with pytest.raises(ValueError, match=r"Forgetful.compute_loss does not use the weights"):
        trainer(tmp_path, kind=Forgetful, flow=flow(), **LAYOUTS["packed"]).train()


def test_weights_that_a_subclass_takes_out_are_missed(tmp_path: Path) -> None:
    class Tidy(FlowSFTTrainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            known = {name: value for name, value in inputs.items() if not name.startswith("flow_")}
            return super()._prepare_inputs(known)

    made = trainer(tmp_path, kind=Tidy, flow=flow())
    with pytest.raises(ValueError, match=r"flow_weight.*Tidy"):
        made.train()
    assert made.state.global_step == 0


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize(("smoothing", "name"), [(0.0, "log_probs"), (0.1, "logits")])
def test_a_model_that_shows_its_loss_only_is_refused(tmp_path: Path, smoothing: float, name: str) -> None:
    made = trainer(tmp_path, flow=flow(), label_smoothing_factor=smoothing)
    made.model.forward = lambda **inputs: ModelOutput(loss=torch.ones((), requires_grad=True))
    with pytest.raises(ValueError, match=rf'shows no {name} .* \(only loss\).* mode="resample"'):
        made.train()


def test_prompt_tuning_is_refused(tmp_path: Path) -> None:
    def prompt() -> Any:
        return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)

    with pytest.raises(ValueError, match=r"learns a prompt"):
        trainer(tmp_path, flow=flow(), peft_config=prompt())
    made = trainer(tmp_path, flow=flow(trained_adapters="ignore"), peft_config=prompt())
    with pytest.raises(ValueError, match=r"prompt tuning lengthens the rows.*Take LoRA"):
        made.train()


def test_a_trainer_of_another_loss_is_refused_by_name(tmp_path: Path) -> None:
    class FlowDPOTrainer(FlowTrainerMixin, trl.DPOTrainer):
        pass

    row = {"prompt": "w6 w7", "chosen": " w8 w9", "rejected": " w10 w11"}
    given: dict[str, Any] = {
        "args": trl.DPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], activation_checkpointing=False
        ),
        "train_dataset": datasets.Dataset.from_list([row]),
        "processing_class": tokenizer(),
        "ref_model": model(),
    }
    with pytest.raises(ValueError, match=r"DPOTrainer forms a loss of its own.*mode=.resample."):
        FlowDPOTrainer(model(), **given)


# -- resume ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["packed", "streamed"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, layout: str) -> None:
    given: dict[str, Any] = {"save_strategy": "steps", "save_steps": 8, "optim": "adamw_torch", "max_steps": 16}
    given |= {"max_grad_norm": 1.0, "gradient_accumulation_steps": 2}
    given |= {"flow": FlowConfig(temperature=fs.RunningMedian(warmup_samples=16))}
    streamed = {"train_dataset": completions().to_iterable_dataset()}
    whole, resumed = (
        trainer(tmp_path / name, **given, **(LAYOUTS["packed"] if layout == "packed" else streamed))
        for name in ("whole", "resumed")
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert len(resumed.steps) == 8
    for step, again in zip(whole.steps[8:], resumed.steps, strict=True):
        for batch, other in zip(step, again, strict=True):
            assert batch["input_ids"].equal(other["input_ids"])
            assert batch["flow_weight"].equal(other["flow_weight"])
    assert distance(whole.model, resumed.model) == 0
