"""The frozen reference: drift is found, and fingerprints tell references apart."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from flowstream.scoring.causal_lm import CausalLMScorer
from flowstream.scoring.classifier import ClassifierScorer
from flowstream.scoring.reference import Reference

OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
    "foreach AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, foreach=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
}


def train(model: Any, optimiser: torch.optim.Optimizer) -> None:
    ids = torch.arange(3, 35).reshape(2, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    optimiser.zero_grad()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_training_a_shared_reference_is_found(tiny: Any, name: str) -> None:
    model = tiny("llama")
    scorer = CausalLMScorer(model, copy=False)
    scorer.check()
    train(model, OPTIMISERS[name](model.parameters()))
    with pytest.raises(RuntimeError, match=r"the reference has changed .* being trained.*copy=True"):
        scorer.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_trained_layer_is_found_and_named(tiny: Any, dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype).requires_grad_(False)
    norm = model.model.layers[1].input_layernorm.weight.requires_grad_()
    scorer = CausalLMScorer(model, copy=False)
    train(model, torch.optim.AdamW([norm], lr=1e-2))
    with pytest.raises(RuntimeError, match=r"'model.layers.1.input_layernorm.weight', 1 of \d+ tensors"):
        scorer.check()


@pytest.mark.parametrize("sharing", ["auto", True])
def test_training_a_copied_reference_changes_nothing(tiny: Any, sharing: Any) -> None:
    model, batch = tiny("llama"), {"input_ids": torch.arange(3, 35).reshape(2, 16)}
    scorer = CausalLMScorer(model, copy=sharing)
    (before,) = scorer.begin([batch], level="sample").finish()
    train(model, OPTIMISERS["fused AdamW"](model.parameters()))
    scorer.check()
    (after,) = scorer.begin([batch], level="sample").finish()
    assert after.loss.equal(before.loss)


def test_drifting_batch_norm_statistics_are_found() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).requires_grad_(False).train()
    scorer = ClassifierScorer(model)
    scorer.begin([(torch.randn(8, 4), torch.zeros(8).long())], level="sample").finish()
    scorer.check()
    model(torch.randn(8, 4))
    with pytest.raises(RuntimeError, match=r"'1\.running_mean'"):
        scorer.check()


def test_nan_parameters_do_not_look_like_drift() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    model.weight.fill_(float("nan"))
    Reference(model).check()


def test_swapped_and_resized_parameters_are_found(tiny: Any) -> None:
    model = tiny("llama").requires_grad_(False)
    reference = Reference(model)
    model.resize_token_embeddings(101, mean_resizing=False)
    with pytest.raises(RuntimeError, match="changed"):
        reference.check()
    reference = Reference(model)
    model.extra = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"'extra\.weight'"):
        reference.check()


def test_any_layout_and_dtype_can_be_sampled() -> None:
    model = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last).requires_grad_(False)
    model.register_buffer("steps", torch.tensor(3))
    model.register_buffer("flag", torch.tensor([True, False]))
    model.register_buffer("empty", torch.zeros(0))
    model.register_buffer("eight", torch.zeros(9).to(torch.float8_e4m3fn))
    model.register_buffer("complex", torch.zeros(3, dtype=torch.complex64))
    reference = Reference(model)
    reference.check()
    model.eight.copy_(torch.ones(9))
    with pytest.raises(RuntimeError, match="'eight', 1 of"):
        reference.check()


def test_fingerprints_tell_references_apart(tiny: Any) -> None:
    model = tiny("llama")
    base = CausalLMScorer(model).fingerprint()
    assert CausalLMScorer(tiny("llama")).fingerprint() == base
    assert CausalLMScorer(model, copy=False, token_budget=7).fingerprint() == base
    train_one = copy.deepcopy(model)
    train_one.model.norm.weight.data[:] += 1e-3
    others = [
        train_one,
        copy.deepcopy(model).bfloat16(),
        tiny("llama", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
        tiny("mistral"),
    ]
    prints = [CausalLMScorer(other).fingerprint() for other in others]
    assert len({base, *prints}) == 5
    assert Reference(model).fingerprint("a") != Reference(model).fingerprint("b")


def losses(scorer: CausalLMScorer) -> torch.Tensor:
    (scores,) = scorer.begin([{"input_ids": torch.arange(3, 35).reshape(2, 16)}], level="sample").finish()
    return scores.loss


@pytest.mark.parametrize("sharing", [False, True])
def test_what_a_trainer_put_over_the_forward_is_not_followed(tiny: Any, sharing: bool) -> None:
    model = tiny("llama").requires_grad_(False)
    wanted = losses(CausalLMScorer(model))

    def patch(input_ids: torch.Tensor, fused: bool = False) -> Any:
        raise AssertionError("followed")

    model.forward = patch
    names = list(vars(model))
    scorer = CausalLMScorer(model, copy=sharing)
    assert losses(scorer).equal(wanted)
    model.forward = patch  # a trainer made after the scorer
    assert losses(scorer).equal(wanted)
    assert model.forward is patch
    assert list(vars(model)) == names


def test_a_forward_that_only_the_instance_has_is_the_models() -> None:
    model = nn.Module()
    model.layer = nn.Linear(4, 3).requires_grad_(False)
    model.forward = lambda x: model.layer(x)
    batch = (torch.ones(2, 4), torch.tensor([0, 1]))
    for sharing in (False, True):
        scorer = ClassifierScorer(model, copy=sharing)
        (scores,) = scorer.begin([batch], level="sample").finish()
        wanted = nn.functional.cross_entropy(model.layer(batch[0]), batch[1], reduction="none")
        torch.testing.assert_close(scores.loss, wanted)


def test_a_forward_under_autocast_is_scored_in_full_precision(tiny: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny("llama").requires_grad_(False), torch.arange(3, 35).reshape(2, 16)
    wanted, logits = losses(CausalLMScorer(model)), model(input_ids=ids).logits
    accelerate.state.AcceleratorState._reset_state(True)
    try:
        prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
        assert not prepared(input_ids=ids).logits.equal(logits)
        assert losses(CausalLMScorer(prepared)).equal(wanted)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.parametrize("sharing", [False, True])
def test_hooks_that_spread_a_model_over_devices_stay_in_the_way(tiny: Any, sharing: bool) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    calls = []

    class Hook(hooks.ModelHook):  # type: ignore[misc, name-defined]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append("before")
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            calls.append("after")
            return output

    model, ids = tiny("llama").requires_grad_(False), torch.arange(3, 35).reshape(2, 16)
    wanted = model(input_ids=ids).logits
    hooks.add_hook_to_module(model, Hook())
    reference = Reference(model, copy=sharing)
    reference.model.forward = lambda **_: None  # a trainer's, over the hook
    with reference.frozen() as frozen:
        assert frozen(input_ids=ids).logits.equal(wanted)
    assert calls == ["before", "after"]


def test_partitioned_parameters_are_refused(tiny: Any) -> None:
    model = tiny("llama").requires_grad_(False)
    scorer = CausalLMScorer(model)
    next(model.parameters()).ds_id = 0  # as DeepSpeed marks what it took apart
    with pytest.raises(ValueError, match=r"partitioned by DeepSpeed ZeRO-3.*from_pretrained"):
        CausalLMScorer(model)
    with pytest.raises(ValueError, match="ZeRO-3"):
        losses(scorer)


def test_plain_models_do_not_load_peft() -> None:
    """In a process of its own: the tests load it."""
    code = (
        "import sys, torch; from flowstream.scoring.reference import Reference; "
        "reference = Reference(torch.nn.Linear(2, 2)); reference.check(); "
        "reference.frozen().__enter__(); assert 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wrappers_are_looked_through(tiny: Any) -> None:
    model = tiny("llama").requires_grad_(False)
    assert Reference(nn.DataParallel(model)).model is model
    assert Reference(torch.compile(model, backend="eager")).model is model


def test_what_cannot_be_copied_says_what_to_do() -> None:
    model = nn.Linear(2, 2)
    model.handle = (i for i in range(3))
    with pytest.raises(RuntimeError, match=r"Linear cannot be copied .*generator.*from_pretrained, or freeze"):
        Reference(model)


def test_sharing_never_moves_the_callers_model() -> None:
    with pytest.raises(ValueError, match=r"copy=False shares the model, which is on cpu, and would move it to meta"):
        Reference(nn.Linear(2, 2), copy=False, device=torch.device("meta"))
    assert Reference(nn.Linear(2, 2), copy=False, device="cpu").model.weight.device.type == "cpu"


def test_a_copy_keeps_tied_weights_tied(tiny: Any) -> None:
    model = tiny("gpt2")
    clone = Reference(model).model
    assert clone.lm_head.weight is clone.transformer.wte.weight
    assert clone.lm_head.weight is not model.lm_head.weight
    assert clone.lm_head.weight.grad is None


# Threads


def elsewhere(run: Callable[[], Any]) -> Any:
    """What it gives in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result(timeout=60)


def shared(model: Any, kind: str) -> CausalLMScorer:
    if kind == "adapters":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).requires_grad_(False).eval()
    elif kind == "train mode":
        model.requires_grad_(False).train()
    return CausalLMScorer(model, copy=False)


@pytest.mark.parametrize("kind", ["adapters", "gradients", "train mode"])
def test_a_shared_model_that_may_be_in_training_is_scored_in_its_own_thread_only(tiny: Any, kind: str) -> None:
    scorer = shared(tiny("llama"), kind)
    wanted = losses(scorer)
    with pytest.raises(RuntimeError, match=r"another thread than the one that made its scorer.*pass copy=True"):
        elsewhere(lambda: losses(scorer))
    assert losses(scorer).equal(wanted)


@pytest.mark.parametrize("sharing", [False, True])
def test_a_copy_and_a_frozen_model_are_scored_in_any_thread(tiny: Any, sharing: bool) -> None:
    model = tiny("llama").requires_grad_(sharing)
    scorer = CausalLMScorer(model, copy=sharing)
    assert elsewhere(lambda: losses(scorer)).equal(losses(scorer))


def held(model: nn.Module, run: Callable[[], Any], meanwhile: Callable[[], Any]) -> Any:
    """What `run` gives in another thread, with `meanwhile` run here while the model is in it."""
    inside, leave = threading.Event(), threading.Event()

    def wait(*args: Any) -> None:
        inside.set()
        leave.wait(60)

    handle = model.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        try:
            assert inside.wait(60)
            handle.remove()
            meanwhile()
        finally:
            handle.remove()
            leave.set()
        return running.result(timeout=60)


def test_a_shared_model_is_scored_by_one_thread_at_a_time(tiny: Any) -> None:
    model = tiny("llama").requires_grad_(False)
    first, second = CausalLMScorer(model, copy=False), CausalLMScorer(model, copy=False)
    had, wanted = model.config._attn_implementation, losses(first)

    def intrude() -> None:
        for run in (lambda: losses(second), lambda: CausalLMScorer(model, copy=False)):
            with pytest.raises(RuntimeError, match=r"being scored in another thread.*copy=True"):
                run()

    assert held(model.model, lambda: losses(first), intrude).equal(wanted)
    assert model.config._attn_implementation == had
    assert losses(second).equal(wanted)
    assert described(second).startswith("packed")


def test_a_copy_is_made_and_used_when_the_other_thread_has_left(tiny: Any) -> None:
    model = tiny("llama").requires_grad_(False)
    scorer, found = CausalLMScorer(model, copy=False), []
    wanted = losses(scorer)
    third = threading.Thread(target=lambda: found.append(CausalLMScorer(model, copy=True)))
    held(model.model, lambda: losses(scorer), third.start)
    third.join(60)
    (copied,) = found
    assert losses(copied).equal(wanted)
    assert described(copied).startswith("packed")
    waiting = threading.Thread(target=lambda: found.append(losses(copied)))
    held(copied._runtime.reference.model.model, lambda: losses(copied), waiting.start)
    waiting.join(60)
    assert found[1].equal(wanted)


def test_scoring_within_a_models_own_forward_is_refused(tiny: Any) -> None:
    reference = Reference(tiny("llama"))
    with reference.frozen(), pytest.raises(RuntimeError, match="scored by this thread already"):
        reference.frozen().__enter__()
    with reference.frozen():
        pass


# Compiled in place


def described(scorer: CausalLMScorer) -> str:
    return scorer._forward.described


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", [False, True])
def test_what_the_caller_compiled_in_place_is_neither_run_nor_compiled_anew(tiny: Any, layers: bool) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, ids = tiny("llama").train(), torch.arange(3, 35).reshape(2, 16)
    plain = CausalLMScorer(model, copy=True)
    torch._dynamo.reset()
    try:
        for module in model.model.layers if layers else [model]:
            module.compile(backend=backend)
        calls = [vars(module).get("_compiled_call_impl") for module in model.modules()]
        model(input_ids=ids)
        num_graphs = len(graphs)
        assert num_graphs > 0
        scorer = CausalLMScorer(model, copy=False)
        assert described(scorer) == described(plain)
        assert losses(scorer).equal(losses(plain))
        model(input_ids=ids)
        assert len(graphs) == num_graphs
        assert [vars(module).get("_compiled_call_impl") for module in model.modules()] == calls
    finally:
        torch._dynamo.reset()
