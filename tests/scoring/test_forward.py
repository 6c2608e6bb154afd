"""Packs, the fp32 head and the trials of both, against each sample alone through the model's own forward."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from allocations import peak_of
from texts import alone, check_samples, make_samples, num_labelled, padded, score
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from flowstream.scoring.causal_lm import CausalLMScorer
from flowstream.scoring.trial import Document

LENGTHS = (5, 11, 1, 8, 2, 14, 9, 6)


def make_documents() -> list[tuple[Tensor, Tensor]]:
    """With prompts masked and not, one of a single token, and one without labels."""
    samples = make_samples(LENGTHS)
    samples[4] = (samples[4][0], torch.full((2,), -100))
    return samples


@pytest.fixture
def llama(tiny: Any) -> Any:
    return tiny("llama").requires_grad_(False)


def described(scorer: CausalLMScorer) -> str:
    return scorer._forward.described


# Every family


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_families_score_samples_as_if_alone(tiny: Any, packed_family: str, side: str) -> None:
    model, samples = tiny(packed_family), make_documents()
    scorer = CausalLMScorer(model, token_budget=24)
    assert described(scorer) == "packed, the last layer on labelled rows, fp32 head"
    (scores,) = score(scorer, padded(samples, side))
    check_samples(model, samples, scores)


def test_families_that_cannot_be_packed_are_recognised_and_padded(tiny: Any, padded_family: str) -> None:
    model, samples = tiny(padded_family), make_documents()
    scorer = CausalLMScorer(model, token_budget=24)
    assert described(scorer).startswith("sorted by length and padded")
    for side in ("left", "right"):
        (scores,) = score(scorer, padded(samples, side))
        check_samples(model, samples, scores)


def test_token_losses_before_they_are_rounded_are_those_of_each_sample_alone(tiny: Any, causal_family: str) -> None:
    model, samples = tiny(causal_family), make_samples((9, 4, 14, 2, 11))
    documents = [Document(ids[:-1].numpy(), labels[1:].numpy()) for ids, labels in samples]
    losses = CausalLMScorer(model)._forward.losses(documents)
    expected = torch.cat([alone(model, ids, labels)[1:][labels[1:] != -100] for ids, labels in samples])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_losses_in_half_precision_are_taken_in_fp32(tiny: Any, name: str, dtype: torch.dtype) -> None:
    """From the hidden states of each sample alone, in the model's dtype, the head in fp32.

    The hidden states of a pack round otherwise than those of a sample alone: by some units in the last place, 2^-8 in
    bf16 and 2^-11 in fp16, which the head (logits up to about 4) carries on.
    """
    model, samples = tiny(name).to(dtype), make_documents()
    (scores,) = score(CausalLMScorer(model), padded(samples, "left"))
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for (ids, labels), loss in zip(samples, scores.loss, strict=True):
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
        logits = hidden.double() @ model.lm_head.weight.double().T * (3.0 if name == "cohere" else 1.0)
        if name == "gemma2":
            logits = 0.5 * torch.tanh(logits / 0.5)
        losses = F.cross_entropy(logits, labels[1:], reduction="none", ignore_index=-100)
        expected = losses.sum().item() / max(num_labelled(labels), 1)
        assert loss.item() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sample_that_is_alone_has_the_fp32_losses_of_its_own_hidden_states(tiny: Any, dtype: torch.dtype) -> None:
    model, (sample,) = tiny("llama").to(dtype), make_samples((11,))
    ids = sample[0]
    (scores,) = score(CausalLMScorer(model), {"input_ids": ids[None]})
    with torch.no_grad():
        # The scorer leaves out the last token, after which nothing is predicted.
        hidden = model.base_model(input_ids=ids[None, :-1], use_cache=False).last_hidden_state[0]
    expected = F.cross_entropy(hidden.float() @ model.lm_head.weight.float().T, ids[1:])
    assert scores.loss.item() == pytest.approx(expected.item(), abs={torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype])
    assert scores.loss.item() != scores.loss.to(dtype).item()  # no number of that dtype


def test_windows_that_are_only_in_masks_keep_a_model_from_being_packed(
    tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """They are longer than a trial, and attention over packs sees no masks."""
    windows = {"sliding_window": 20, "use_sliding_window": True, "max_window_layers": 2}
    samples = make_samples((40, 30, 50, 9))
    for model in (
        tiny("qwen2_moe", **windows, layer_types=["sliding_attention", "full_attention"]),
        tiny("phimoe", sliding_window=20),
    ):
        caplog.clear()
        scorer = CausalLMScorer(model)
        assert described(scorer) == "sorted by length and padded, fp32 head"
        assert "a mask that its attention is not told of" in caplog.text
        (scores,) = score(scorer, padded(samples, "left"))
        check_samples(model, samples, scores)


@pytest.mark.parametrize("name", ["mistral", "gemma3", "starcoder2"])
def test_windows_longer_than_a_trial_are_kept(tiny: Any, name: str) -> None:
    model, samples = tiny(name, sliding_window=20), make_samples((40, 30, 50, 9))
    scorer = CausalLMScorer(model)
    assert described(scorer).startswith("packed")
    (scores,) = score(scorer, padded(samples, "left"))
    check_samples(model, samples, scores)


@pytest.mark.parametrize("name", ["llama_dynamic", "phi3_longrope"])
def test_rotary_frequencies_follow_each_sample_and_nothing_that_was_read_before(tiny: Any, name: str) -> None:
    """Labels may end before the sample does: its length counts all the same, on both sides of the limit of 6."""
    model, unread, samples = tiny(name), tiny(name), make_samples((7, 9, 6, 5, 12, 8))
    for _, labels in samples[:2]:
        labels[5:] = -100
    scorer = CausalLMScorer(model, copy=False)
    for _ in range(2):
        (scores,) = score(scorer, padded(samples, "left"))
        check_samples(unread, samples, scores)
        with torch.no_grad():
            model(input_ids=torch.arange(3, 40)[None])  # the caller reads something long meanwhile


# The trial


class Scaled(LlamaForCausalLM):
    """The head's logits are changed in a way that no configuration names."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        use_cache: Any = None,
        logits_to_keep: Any = 0,
        **further: Any,
    ) -> Any:
        out = super().forward(
            input_ids, attention_mask, position_ids, use_cache=use_cache, logits_to_keep=logits_to_keep, **further
        )
        out.logits = 0.7 * out.logits + torch.linspace(0, 1, out.logits.shape[-1])
        return out


class WithoutLogitsToKeep(Scaled):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None) -> Any:
        return super().forward(input_ids, attention_mask, position_ids, use_cache=False)


class Shifting(nn.Module):
    """Embeddings to which each token's predecessor is added."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed, self.weight = embed, embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.embed(ids)
        return embedded + F.pad(embedded[:, :-1], (0, 0, 1, 0))


class Convolving(nn.Module):
    """A causal convolution over the sequence before the MLP."""

    def __init__(self, mlp: nn.Module, width: int) -> None:
        super().__init__()
        self.mlp, self.conv = mlp, nn.Conv1d(width, width, 3, groups=width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(self.conv(F.pad(hidden.transpose(1, 2), (2, 0))).transpose(1, 2))


class Averaging(nn.Module):
    """A causal running mean over the row in place of attention, whatever the configuration says."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.o_proj = attention.o_proj

    def forward(self, hidden_states: Tensor, **further: Any) -> Any:
        counts = torch.arange(1, hidden_states.shape[1] + 1)[:, None]
        return self.o_proj(hidden_states.cumsum(1) / counts), None


class Mixing(nn.Module):
    """Adds the mean over all rows, padding and all: no sample is scored beside another."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden) + hidden.mean((0, 1))


def rebuilt(model: Any, kind: type[nn.Module]) -> Any:
    model.__class__ = kind
    return model


def shifting(model: Any) -> Any:
    model.model.embed_tokens = Shifting(model.model.embed_tokens)
    return model


def convolving(model: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.model.layers[0].mlp = Convolving(model.model.layers[0].mlp, 32).requires_grad_(False)
    return model


def averaging(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn = Averaging(layer.self_attn)
    return model


def mixing(model: Any) -> Any:
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp)
    return model


def reading_ahead(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return model


ODD: dict[str, tuple[Any, str, str]] = {
    "an unknown transform of the logits": (
        lambda model: rebuilt(model, Scaled),
        "packed, the last layer on labelled rows, the logits of the model",
        "a trial is off by",
    ),
    "and no choice of logits": (
        lambda model: rebuilt(model, WithoutLogitsToKeep),
        "packed, the last layer on labelled rows, the logits of the model",
        "a trial is off by",
    ),
    "a token shift": (shifting, "sorted by length and padded, fp32 head", "a trial is off by"),
    "a convolution": (convolving, "sorted by length and padded, fp32 head", "it has convolutions"),
    "attention of its own": (averaging, "sorted by length and padded, fp32 head", "a trial is off by"),
    "rows that mix": (mixing, "one at a time, the logits of the model", "a trial is off by"),
    "attention that reads ahead": (reading_ahead, "one at a time, the logits of the model", "no causal attention"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_model_for_which_a_shortcut_is_wrong_goes_the_way_around_it_and_says_so(
    llama: Any, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, way, reason = ODD[case]
    model = make(llama)
    with caplog.at_level(logging.INFO, "flowstream"):
        scorer = CausalLMScorer(model)
    assert described(scorer) == way
    assert reason in caplog.text
    assert f"{type(model).__name__} is scored {way}" in caplog.text
    samples = make_samples((9, 5, 14, 2))
    (scores,) = score(scorer, padded(samples, "right"))
    for (ids, labels), loss in zip(samples, scores.loss, strict=True):
        with torch.no_grad():
            logits = model(input_ids=ids[None, :-1]).logits[0]  # what reads ahead is not to read what it predicts
        expected = F.cross_entropy(logits, labels[1:], ignore_index=-100)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5, rel=1e-5)


def test_a_model_that_reads_ahead_is_told_of(llama: Any, tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("llama", "gemma2", "mamba", "bloom", "llama_dynamic"):
        CausalLMScorer(tiny(name))
    assert not [record for record in caplog.records if record.name == "flowstream"]  # transformers' own come once
    CausalLMScorer(reading_ahead(llama))
    assert "LlamaForCausalLM reads ahead of the token that it predicts from" in caplog.text


def test_tied_heads_and_heads_with_a_bias_are_known(tiny: Any) -> None:
    samples = make_samples()
    for model in (tiny("llama", tie_word_embeddings=True), tiny("phi")):
        if model.lm_head.bias is not None:
            nn.init.normal_(model.lm_head.bias)
        scorer = CausalLMScorer(model)
        assert described(scorer) == "packed, the last layer on labelled rows, fp32 head"
        (scores,) = score(scorer, padded(samples, "left"))
        check_samples(model, samples, scores)


def test_lora_models_are_packed_with_the_adapters_off(tiny: Any) -> None:
    peft = pytest.importorskip("peft")
    base, samples = tiny("llama"), make_samples()
    plain = copy.deepcopy(base)
    targets = ["q_proj", "o_proj", "up_proj", "lm_head"]
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    scorer = CausalLMScorer(model, trained_adapters="ignore")
    assert described(scorer) == "packed, the last layer on labelled rows, fp32 head"
    (scores,) = score(scorer, padded(samples, "left"))
    check_samples(plain, samples, scores)


def test_a_model_without_room_for_a_trial_is_scored_plainly(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, samples = tiny("gpt2", n_positions=8), make_samples((5, 8, 1))
    with caplog.at_level(logging.INFO, "flowstream"):
        scorer = CausalLMScorer(model)
    record = caplog.records[0]
    assert (record.levelname, "untried: it has 8 positions only" in record.message) == ("INFO", True)
    assert described(scorer) == "sorted by length and padded, the logits of the model"
    (scores,) = score(scorer, padded(samples, "left"))
    check_samples(model, samples, scores)


class Demanding(LlamaForCausalLM):
    """Asks for a mask that the trial does not give."""

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        return super().forward(input_ids, attention_mask, use_cache=False)


def test_a_model_that_fails_on_a_trial_says_why(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    samples = make_samples((9, 5, 14, 2))
    (expected,) = score(CausalLMScorer(llama), padded(samples, "left"))
    scorer = CausalLMScorer(rebuilt(llama, Demanding))
    assert described(scorer) == "sorted by length and padded, the logits of the model"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "untried: it fails on plain tokens (TypeError: " in record.message
    (scores,) = score(scorer, padded(samples, "left"))
    torch.testing.assert_close(scores.loss, expected.loss)


FULL = {
    "the trial itself": (0, torch.OutOfMemoryError("full")),
    "its mask question": (5, torch.OutOfMemoryError("full")),
    "a shortcut": (6, torch.OutOfMemoryError("full")),
    "a plain error": (0, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")),
}


@pytest.mark.parametrize("case", FULL)
def test_memory_that_runs_out_on_a_trial_is_told_and_degrades_nothing(llama: Any, case: str) -> None:
    after, error = FULL[case]
    calls = []

    def fail(*args: Any) -> None:
        calls.append(1)
        if len(calls) == after + 1:
            raise error

    handle = llama.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="not enough memory to try the reference") as caught:
        CausalLMScorer(llama)
    assert caught.value.__cause__ is error
    assert len(calls) == after + 1
    assert described(CausalLMScorer(llama)) == "packed, the last layer on labelled rows, fp32 head"
    handle.remove()


# The caller's world


def implementations(config: Any) -> list[Any]:
    return [config._attn_implementation, *(implementations(getattr(config, name)) for name in config.sub_configs)]


def hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "llama_dynamic", "phi3_longrope"])
def test_the_callers_forward_of_a_shared_model_gives_the_same_bits_as_before(tiny: Any, name: str) -> None:
    model = tiny(name).train()
    ids = torch.arange(3, 33).reshape(3, 10)
    model(input_ids=torch.arange(3, 23)[None])
    before = model(input_ids=ids).logits
    had = implementations(model.config), hooks(model), [module.training for module in model.modules()]
    scorer = CausalLMScorer(model, copy=False)
    job = scorer.begin([padded(make_samples(LENGTHS), "left")], level="sample")
    while job.num_steps:
        job.step()
        assert (implementations(model.config), hooks(model), [m.training for m in model.modules()]) == had
        assert model(input_ids=ids).logits.equal(before)
    job.finish()


def test_a_config_within_a_config_keeps_an_attention_of_its_own(tiny: Any) -> None:
    model = tiny("gemma3_multimodal")
    model.config._attn_implementation = "sdpa"
    model.config.vision_config._attn_implementation = "eager"
    had = implementations(model.config)
    scorer = CausalLMScorer(model, copy=False)
    samples = make_samples()
    (scores,) = score(scorer, padded(samples, "left"))
    check_samples(model, samples, scores)
    assert described(scorer).startswith("packed")
    assert implementations(model.config) == had == ["sdpa", ["sdpa"], ["eager"]]


def test_a_forward_that_raises_within_a_pack_leaves_no_trace(tiny: Any) -> None:
    model = tiny("llama").train()
    batch = padded(make_samples(LENGTHS), "left")
    scorer = CausalLMScorer(model, copy=False)
    (expected,) = score(scorer, batch)
    had = implementations(model.config), hooks(model)

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].self_attn.o_proj.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        score(scorer, batch)
    handle.remove()
    assert (implementations(model.config), hooks(model)) == had
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    (again,) = score(scorer, batch)
    assert again.loss.equal(expected.loss)


def test_making_a_scorer_and_scoring_leave_generators_and_defaults_alone(tiny: Any) -> None:
    model, batch = tiny("llama"), padded(make_samples(), "left")
    (expected,) = score(CausalLMScorer(model), batch)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        (scores,) = score(CausalLMScorer(model), batch)
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert scores.loss.equal(expected.loss)
    assert torch.get_rng_state().equal(torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


# Memory


def test_the_peak_of_scoring_does_not_follow_the_loaders_batches(tiny: Any) -> None:
    model = tiny("llama", vocab_size=10_000).requires_grad_(False)
    samples = make_samples(tuple(8 + 7 * i % 40 for i in range(64)))
    peaks = []
    for size in (4, 64):
        batches = [padded(samples[i : i + size], "left") for i in range(0, 64, size)]
        scorer = CausalLMScorer(model, token_budget=512, max_head_bytes=2**21)
        peaks.append(peak_of(lambda scorer=scorer, batches=batches: score(scorer, *batches)))  # type: ignore[misc]
    assert max(peaks) <= 1.02 * min(peaks)
    assert max(peaks) < 512 * 10_000 * 4 / 3  # far from the logits of a micro-batch


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_packs_halve_too_when_memory_runs_out(tiny: Any, error: RuntimeError) -> None:
    model, samples = tiny("llama").requires_grad_(False), make_samples((9, 11, 12, 8, 10, 3, 4, 29))
    scorer = CausalLMScorer(model, token_budget=200)
    sizes = []

    def bounded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sizes.append(kwargs["hidden_states"].shape[1])
        if sizes[-1] > 30:
            raise error

    handle = model.model.layers[0].self_attn.register_forward_pre_hook(bounded, with_kwargs=True)
    job = scorer.begin([padded(samples, "left")], level="sample")
    assert job.num_steps == 1
    (scores,) = job.finish()
    handle.remove()
    assert sizes[0] == sum(len(ids) - 1 for ids, _ in samples)
    assert scorer.state_dict()["token_budget"] <= 30
    assert job.cost.num_padded == sum(size for size in sizes if size <= 30)
    check_samples(model, samples, scores)


# Compiled


@pytest.fixture
def bounded_recompiles() -> Iterator[None]:
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", pytest.param("gemma2", marks=pytest.mark.soak)])
def test_a_compiled_body_gives_the_same_losses_and_is_compiled_once(
    tiny: Any, name: str, bounded_recompiles: None
) -> None:
    model = tiny(name).requires_grad_(False)
    plain, compiled = CausalLMScorer(model, token_budget=300), CausalLMScorer(model, token_budget=300, compile=True)
    assert described(compiled) == "packed, fp32 head, compiled"
    for seed in range(6):
        lengths = tuple(3 + (7 * i + 5 * seed) % 29 for i in range(4 + 5 * seed))
        batch = padded(make_samples(lengths, seed=seed), "left")
        (expected,), (found,) = score(plain, batch), score(compiled, batch)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


class DroppingWhenCompiled(nn.Module):
    """Half of what it is around, where torch.compile looks."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden) * (-5.0 if torch.compiler.is_compiling() else 1.0)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_body_that_says_something_else_is_not_used(
    llama: Any, bounded_recompiles: None, caplog: pytest.LogCaptureFixture
) -> None:
    llama.model.layers[1].mlp = DroppingWhenCompiled(llama.model.layers[1].mlp)
    scorer, plain = CausalLMScorer(llama, compile=True), CausalLMScorer(llama)
    assert described(scorer) == "packed, fp32 head"
    assert "LlamaForCausalLM is not scored compiled: a trial is off by" in caplog.text
    batch = padded(make_samples(LENGTHS), "left")
    torch.testing.assert_close(score(scorer, batch)[0].loss, score(plain, batch)[0].loss)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_a_body_that_cannot_be_compiled_is_scored_uncompiled_and_says_why(
    llama: Any, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        caplog.at_level(logging.INFO, "flowstream"),
    ):
        scorer = CausalLMScorer(llama, compile=True)
    torch._dynamo.reset()
    assert described(scorer) == "packed, fp32 head"
    assert "LlamaForCausalLM is compiled, and tried" in caplog.text
    assert "LlamaForCausalLM is not scored compiled: " in caplog.text
    samples = make_samples(LENGTHS)
    (scores,) = score(scorer, padded(samples, "left"))
    check_samples(llama, samples, scores)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_the_first_window_after_a_compiled_trial_compiles_nothing(tiny: Any, bounded_recompiles: None) -> None:
    scorer = CausalLMScorer(tiny("llama"), compile=True)
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counted == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        score(scorer, padded(make_samples((3,)), "left"), padded(make_samples(LENGTHS * 9), "left"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted


def test_a_model_without_an_fp32_head_is_not_compiled_and_told_why(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"the logits of the model \(.* a Linear in torch.float64, not .*leave it out"):
        CausalLMScorer(tiny("llama").double(), compile=True)
    with pytest.raises(ValueError, match=r"could not be tried: it has 8 positions only\): leave it out"):
        CausalLMScorer(tiny("gpt2", n_positions=8), compile=True)


def test_what_has_no_head_of_its_own_is_not_compiled(llama: Any) -> None:
    with pytest.raises(
        ValueError, match=r"compile=True compiles the body .* Scaled is scored packed.* a trial is off by .*: leave"
    ):
        CausalLMScorer(rebuilt(llama, Scaled), compile=True)
