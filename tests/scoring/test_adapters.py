"""A reference under PEFT adapters: the losses of the base, to the bit, and no trace of having been there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowstream.scoring.causal_lm import CausalLMScorer
from flowstream.scoring.classifier import ClassifierScorer
from flowstream.scoring.reference import Reference
from flowstream.scoring.seq2seq import Seq2SeqLMScorer

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "down_proj"]
BATCH = {"input_ids": torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(0))}
TOKENS = BATCH["input_ids"][0, :3].unique().tolist()


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**({"r": 4, "target_modules": TARGETS, "lora_dropout": 0.3} | settings))


KINDS: dict[str, Callable[[], Any]] = {
    "LoRA": lora,
    "rsLoRA": lambda: lora(use_rslora=True),
    "DoRA": lambda: lora(use_dora=True),
    "LoRA on embedding and head": lambda: lora(target_modules=["embed_tokens", "lm_head"]),
    "LoRA on parameters": lambda: lora(target_modules=[], target_parameters=["mlp.up_proj.weight"], lora_dropout=0.0),
    "modules_to_save": lambda: lora(modules_to_save=["lm_head", "norm"]),
    "LoRA and trained tokens": lambda: lora(trainable_token_indices=TOKENS),
    "trained tokens": lambda: peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens"]),
    "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "LoHa": lambda: peft.LoHaConfig(target_modules=TARGETS),
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=TARGETS, total_step=100),
    "OFT": lambda: peft.OFTConfig(target_modules=TARGETS, oft_block_size=8),
}


def losses(scorer: Any, batch: Any = BATCH) -> Tensor:
    (scores,) = scorer.begin([batch], level="sample").finish()
    found: Tensor = scores.loss
    return found


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model: Any, steps: int = 2, batch: Any = BATCH) -> None:
    step = optimiser(model)
    for _ in range(steps):
        model(**({"labels": batch["input_ids"]} | batch)).loss.backward()
        step.step()
        step.zero_grad()


def traces(model: nn.Module) -> list[Any]:
    """All that scoring may not change, other than the weights."""
    modules = [
        {name: (id(v), v) if isinstance(v, bool | str | int) else id(v) for name, v in vars(module).items()}
        for module in model.modules()
    ]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    flags = [(p.requires_grad, p._version, id(p.grad)) for p in model.parameters()]
    return [modules, hooks, flags]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_bases_to_the_bit_while_adapters_train(tiny: Any, kind: str) -> None:
    base = tiny("llama")
    alone = CausalLMScorer(copy.deepcopy(base))
    model = peft.get_peft_model(base, KINDS[kind]())
    scorer, step, wanted = CausalLMScorer(model), optimiser(model), losses(alone)
    assert scorer.fingerprint() == alone.fingerprint()
    model.train()
    for _ in range(20):
        loss = model(**BATCH, labels=BATCH["input_ids"]).loss
        assert losses(scorer).equal(wanted)
        loss.backward()
        step.step()
        step.zero_grad()
        scorer.check()
    assert losses(scorer).equal(wanted)
    assert not torch.allclose(model.eval()(**BATCH).logits, tiny("llama")(**BATCH).logits, atol=1e-3)
    with pytest.raises(ValueError, match='they were trained.*trained_adapters="ignore"'):
        CausalLMScorer(model)
    for sharing in ("auto", True):
        resumed = CausalLMScorer(model, copy=sharing, trained_adapters="ignore")
        assert losses(resumed).equal(wanted)
        assert resumed.fingerprint() == alone.fingerprint()


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "modules_to_save", "LoRA and trained tokens"])
def test_a_base_in_half_precision_is_exact_under_adapters_in_full(tiny: Any, kind: str) -> None:
    alone = CausalLMScorer(tiny("llama").bfloat16())
    model = peft.get_peft_model(tiny("llama").bfloat16(), KINDS[kind]())
    assert {p.dtype for p in model.parameters() if p.requires_grad} >= {torch.float32}
    scorer = CausalLMScorer(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    assert losses(scorer).equal(losses(alone))
    assert scorer.fingerprint() == alone.fingerprint()


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_scoring_between_forward_and_backward_changes_no_gradient(tiny: Any, checkpointing: bool | None) -> None:
    def gradients(score: bool) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny("llama", attention_dropout=0.2), lora(modules_to_save=["lm_head"]))
        if checkpointing is not None:
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        model.train()
        scorer = CausalLMScorer(model) if score else None
        step = optimiser(model)
        for _ in range(3):
            loss = model(**BATCH, labels=BATCH["input_ids"], use_cache=False).loss
            if scorer is not None:
                losses(scorer)
                scorer.check()
            loss.backward()
            found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            step.step()
            step.zero_grad()
        return found, torch.get_rng_state()

    (with_, state), (without, wanted_state) = gradients(True), gradients(False)
    assert len(with_) == len(without) > 0
    assert all(a.equal(b) for a, b in zip(with_, without, strict=True))
    assert state.equal(wanted_state)


def test_nothing_but_adapters_is_allocated(tiny: Any) -> None:
    model = peft.get_peft_model(tiny("llama"), lora())
    reference = Reference(model)
    assert reference.model is model.get_base_model()
    assert not reference.copied
    held = {id(p) for p in model.parameters()}
    assert all(id(p) in held for p in reference.model.parameters())


@pytest.mark.parametrize("kind", ["LoRA", "modules_to_save", "LoRA and trained tokens", "IA3"])
def test_everything_is_put_back_even_when_the_forward_raises(tiny: Any, kind: str) -> None:
    model = peft.get_peft_model(tiny("llama"), KINDS[kind]())
    model.train()
    model.base_model.model.model.layers[1].eval()
    model.base_model.model.model.layers[0].self_attn.q_proj.requires_grad_(False)
    vars(model.base_model.model.model.layers[0].mlp.down_proj)["_disable_adapters"] = True
    before = traces(model)
    scorer = CausalLMScorer(model)
    assert traces(model) == before
    losses(scorer)
    assert traces(model) == before
    with pytest.raises(ZeroDivisionError), Reference(model).frozen():
        raise ZeroDivisionError
    assert traces(model) == before


def test_adapters_added_switched_and_disabled_later_are_off_too(tiny: Any) -> None:
    base = tiny("llama").requires_grad_(False)
    scorer = CausalLMScorer(base)  # shares it: nothing requires a gradient
    wanted = losses(scorer)
    model = peft.get_peft_model(base, lora(init_lora_weights=False))
    assert losses(scorer).equal(wanted)
    model.add_adapter("other", lora(init_lora_weights=False, target_modules=["o_proj"], modules_to_save=["lm_head"]))
    model.set_adapter("other")
    assert losses(scorer).equal(wanted)
    scorer.check()
    model.base_model.disable_adapter_layers()
    assert losses(scorer).equal(wanted)
    assert model.get_model_status().enabled is False


def test_rows_with_adapters_of_their_own_are_left_alone(tiny: Any) -> None:
    model = peft.get_peft_model(tiny("llama"), lora(init_lora_weights=False))
    model.add_adapter("other", lora(init_lora_weights=False))
    mixed = BATCH | {"adapter_names": ["default", "other", "__base__", "other"]}
    before = model.eval()(**mixed).logits
    scorer = CausalLMScorer(model, trained_adapters="ignore")
    assert losses(scorer).equal(losses(CausalLMScorer(tiny("llama"))))
    assert model(**mixed).logits.equal(before)


def test_adapters_that_are_not_active_need_no_word(tiny: Any) -> None:
    model = peft.get_peft_model(tiny("llama"), lora(init_lora_weights=False), adapter_name="old")
    model.add_adapter("new", lora())
    with pytest.raises(ValueError, match="they were trained"):
        CausalLMScorer(model)
    model.set_adapter("new")
    CausalLMScorer(model)


@pytest.mark.parametrize("way", ["inject_adapter_in_model", "add_adapter"])
def test_injected_adapters_are_set_aside(tiny: Any, way: str) -> None:
    model = tiny("llama")
    wanted = losses(CausalLMScorer(model))
    if way == "add_adapter":
        model.add_adapter(lora())
    else:
        peft.inject_adapter_in_model(lora(), model)
    scorer = CausalLMScorer(model)
    train(model)
    assert losses(scorer).equal(wanted)
    with pytest.raises(ValueError, match=r"of 'model\.layers\.0\.self_attn\.q_proj' change what the model says"):
        CausalLMScorer(model)


def test_a_trained_adapter_from_disk_is_refused_and_its_base_can_be_meant(tiny: Any, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    wanted = CausalLMScorer.from_pretrained(str(tmp_path / "base"))
    model = peft.get_peft_model(tiny("llama"), lora(task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="they were trained"):
        CausalLMScorer.from_pretrained(str(tmp_path / "adapter"))
    resumed = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter", is_trainable=True)
    with pytest.raises(ValueError, match="they were trained"):
        CausalLMScorer(resumed)
    scorer = CausalLMScorer(resumed, trained_adapters="ignore")
    assert losses(scorer).equal(losses(wanted))
    assert scorer.fingerprint() == wanted.fingerprint()


def test_a_single_trained_row_of_an_embedding_is_found(tiny: Any) -> None:
    model = peft.get_peft_model(tiny("llama"), lora(target_modules=["embed_tokens"]))
    CausalLMScorer(model)
    (factor,) = [p for name, p in model.named_parameters() if "lora_embedding_A" in name]
    factor.data[:, 41] = 1e-6
    with pytest.raises(ValueError, match=r"of 'model\.embed_tokens' change"):
        CausalLMScorer(model)


def test_base_parameters_that_train_beside_the_adapter_are_found(tiny: Any) -> None:
    model = peft.get_peft_model(tiny("qwen2"), lora(bias="all"))
    shared, copied = CausalLMScorer(model), CausalLMScorer(model, copy=True)
    wanted = losses(copied)
    train(model)
    with pytest.raises(RuntimeError, match=r"'model\.layers\.0\.self_attn\.q_proj\.bias', 6 of .*copy=True"):
        shared.check()
    copied.check()
    assert losses(copied).equal(wanted)


def test_merged_adapters_are_refused(tiny: Any) -> None:
    model = peft.get_peft_model(tiny("llama"), lora(init_lora_weights=False))
    scorer = CausalLMScorer(model, trained_adapters="ignore")
    model.merge_adapter()
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    with pytest.raises(ValueError, match=r"merged into the reference \(\['default'\] in a Linear\).*unmerge_adapter"):
        losses(scorer)
    with pytest.raises(ValueError, match="merged"):
        CausalLMScorer(model, copy=True, trained_adapters="ignore")
    assert model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.equal(weight)


@pytest.mark.parametrize("ignored", ["refuse", "ignore"])
def test_initialisations_that_move_the_base_are_refused(tiny: Any, ignored: Any) -> None:
    model = peft.get_peft_model(tiny("llama"), lora(init_lora_weights="olora"))
    with pytest.raises(ValueError, match=r"'default' was initialised with 'olora'.* no longer the pre-trained model"):
        CausalLMScorer(model, trained_adapters=ignored)


def test_learned_prompts_must_be_ignored_on_purpose(tiny: Any) -> None:
    wanted = losses(CausalLMScorer(tiny("llama")))
    for config in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        model = peft.get_peft_model(tiny("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
        with pytest.raises(ValueError, match=rf"'default' \({config.__name__}\) learns a prompt.*\"ignore\""):
            CausalLMScorer(model)
        scorer = CausalLMScorer(model, trained_adapters="ignore")
        train(model)
        assert losses(scorer).equal(wanted)


def test_what_cannot_be_set_aside_is_refused(tiny: Any) -> None:
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "adapter_len": 3, "adapter_layers": 1}
    model = peft.get_peft_model(tiny("llama"), peft.AdaptionPromptConfig(**settings))
    with pytest.raises(ValueError, match=r"adaption_prompt.* cannot set aside.*from_pretrained"):
        CausalLMScorer(model, trained_adapters="ignore")
    model = peft.get_peft_model(tiny("llama"), lora())
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    layer.forward = lambda x: x
    with pytest.raises(ValueError, match="cannot set aside"):
        CausalLMScorer(model)
    attention = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(ValueError, match=r"MultiheadAttention\) which this scorer cannot set aside"):
        Reference(peft.get_peft_model(attention, lora(target_modules=["0"], lora_dropout=0.0)))
    with pytest.raises(ValueError, match="'refuse' or 'ignore', not 'maybe'"):
        CausalLMScorer(tiny("llama"), trained_adapters="maybe")  # type: ignore[arg-type]


def test_adapters_of_which_nothing_tells_must_be_ignored_on_purpose() -> None:
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 3)), peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    )
    with pytest.raises(ValueError, match=r"ia3\.layer\.Linear\) of which nothing tells whether they were trained"):
        Reference(model)
    Reference(model, trained_adapters="ignore")
    Reference(peft.get_peft_model(nn.Sequential(nn.Linear(4, 3)), lora(target_modules=["0"])))


def test_a_model_with_adapters_is_never_moved(tiny: Any) -> None:
    model = peft.get_peft_model(tiny("llama"), lora())
    with pytest.raises(
        ValueError, match=r"adapters is shared, which is on cpu, and would move it to meta: .*copy=True"
    ):
        CausalLMScorer(model, device="meta")


def test_a_copy_has_no_adapters(tiny: Any) -> None:
    model = peft.get_peft_model(
        tiny("gpt2"), lora(target_modules=["c_attn"], modules_to_save=["ln_f"], fan_in_fan_out=True)
    )
    before = traces(model)
    clone = Reference(model, copy=True).model
    assert {type(module) for module in clone.modules()} == {type(module) for module in tiny("gpt2").modules()}
    assert clone.lm_head.weight is clone.transformer.wte.weight
    assert traces(model) == before


def test_wrappers_around_adapters_are_looked_through(tiny: Any) -> None:
    model = peft.get_peft_model(tiny("llama"), lora())
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    assert Reference(wrapped).model is model.get_base_model()
    assert Reference(peft.PeftMixedModel(tiny("llama"), lora())).model.__class__.__name__ == "LlamaForCausalLM"


def test_a_classifier_is_scored_with_its_original_head(tiny: Any) -> None:
    base = tiny("llama_classifier")
    batch = BATCH | {"labels": torch.tensor([0, 1, 2, 0])}
    wanted = ClassifierScorer(copy.deepcopy(base))
    model = peft.get_peft_model(base, lora(task_type="SEQ_CLS"))
    assert type(model.get_base_model().score).__name__ == "ModulesToSaveWrapper"
    scorer = ClassifierScorer(model)
    assert scorer.fingerprint() == wanted.fingerprint()
    train(model, batch=batch)
    scorer.check()
    assert losses(scorer, batch).equal(losses(wanted, batch))
    with pytest.raises(ValueError, match="they were trained"):
        ClassifierScorer(model)


def test_an_encoder_decoder_is_scored_without_adapters(tiny: Any) -> None:
    base = tiny("t5")
    batch = BATCH | {"labels": BATCH["input_ids"][:, :7].contiguous()}
    wanted = Seq2SeqLMScorer(copy.deepcopy(base))
    model = peft.get_peft_model(base, lora(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v", "wo"]))
    scorer = Seq2SeqLMScorer(model)
    assert scorer.fingerprint() == wanted.fingerprint()
    train(model, batch=batch)
    assert losses(scorer, batch).equal(losses(wanted, batch))


def test_limits_are_read_through_adapters(tiny: Any) -> None:
    model = peft.get_peft_model(tiny("gpt2"), lora(target_modules=["wpe", "wte"]))
    with pytest.raises(ValueError, match="has 65 tokens, and the reference positions for 64"):
        losses(CausalLMScorer(model), {"input_ids": torch.ones(1, 66, dtype=torch.long)})
    with pytest.raises(ValueError, match="id 97 .* a vocabulary of 97"):
        losses(CausalLMScorer(model), {"input_ids": torch.tensor([[1, 97]])})


def test_rounding_left_by_merging_is_named_as_a_cause_of_drift(tiny: Any) -> None:
    model = peft.get_peft_model(tiny("llama"), lora())
    scorer = CausalLMScorer(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    model.merge_adapter()
    model.unmerge_adapter()
    with pytest.raises(RuntimeError, match=r"being trained, or adapters were merged .*unmerge_adapter\(\).*copy=True"):
        scorer.check()


def test_memory_that_runs_out_on_adapters_is_not_taken_for_an_answer(tiny: Any) -> None:
    model = peft.get_peft_model(tiny("llama"), lora(use_dora=True))

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("full")

    handle = model.base_model.model.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="not enough memory to try the reference"):
        CausalLMScorer(model)
    handle.remove()
    CausalLMScorer(model)
