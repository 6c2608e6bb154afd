"""The loss without logits: against the plain way in fp64, and what it holds in memory while it runs."""

import doctest
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from allocations import peak_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flowstream import linear_cross_entropy, weighted_linear_cross_entropy, weighted_lm_loss

B, T, D, V = 4, 9, 16, 77
MANY_CHUNKS = 6000
"""Bytes: a few rows of a few columns each."""

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make(seed=0, *, dtype=torch.float32, shape=(B, T), width=D, vocabulary=V, bias=True):
    """hidden [*shape, D], a head, labels with a third ignored, weight [B]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=generator).to(dtype).requires_grad_()
    head = nn.Linear(width, vocabulary, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    labels = torch.randint(vocabulary, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.33] = -100
    return hidden, head.to(dtype), labels, torch.rand(shape[0], generator=generator)


def plain(hidden, head, labels, weight, *, denominator="tokens", softcap=None, scale=1.0):
    """The definition in fp64, with logits."""
    logits = scale * F.linear(hidden.double(), head.weight.double(), None if head.bias is None else head.bias.double())
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    following, labelled = labels[:, 1:], labels[:, 1:] != -100
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), following, reduction="none", ignore_index=-100)
    weight = weight.double()
    weight = (weight[:, None].expand(labels.shape) if weight.ndim == 1 else weight)[:, 1:]
    named = {"tokens": labelled.sum(), "samples": labelled.any(1).sum(), "weights": weight[labelled].sum()}
    divisor = named[denominator] if isinstance(denominator, str) else torch.as_tensor(denominator)
    return (weight * nll)[labelled].sum() / divisor.double().clamp(min=torch.finfo(torch.float32).tiny)


def gradients(loss, hidden, head):
    return torch.autograd.grad(loss, [hidden, *head.parameters()])


def distance(found, expected):
    """Relative, by norm."""
    size = expected.double().norm()
    return float((found.double() - expected.double()).norm() / size) if size > 0 else float(found.double().norm())


def check(inputs, rtol=1e-5, max_bytes=2**28, **options):
    hidden, head, labels, weight = inputs
    loss = weighted_linear_cross_entropy(hidden, head, labels, weight, max_bytes=max_bytes, **options)
    expected = plain(hidden, head, labels, weight, **options)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-6)
    for ours, theirs in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        assert ours.dtype == hidden.dtype
        assert distance(ours, theirs) < rtol


def test_docstring_examples_run():
    assert doctest.testmod(linear_cross_entropy).failed == 0


@pytest.mark.parametrize("denominator", ["tokens", "weights", "samples", 7.5, torch.tensor(7.5)], ids=str)
@pytest.mark.parametrize("max_bytes", [MANY_CHUNKS, 2**28])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_loss_and_gradients_equal_the_plain_way(denominator, max_bytes, softcap):
    check(make(), denominator=denominator, softcap=softcap, max_bytes=max_bytes)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(draw=st.data())
def test_whatever_the_shapes_and_options_it_equals_the_plain_way(draw):
    shape = draw.draw(st.tuples(st.integers(1, 4), st.integers(1, 7)), "shape")
    width, vocabulary = draw.draw(st.integers(1, 9), "width"), draw.draw(st.integers(1, 150), "vocabulary")
    hidden, head, labels, weight = make(
        draw.draw(st.integers(0, 99), "seed"),
        dtype=draw.draw(st.sampled_from([torch.float32, torch.float64]), "dtype"),
        shape=shape,
        width=width,
        vocabulary=vocabulary,
        bias=draw.draw(st.booleans(), "bias"),
    )
    zeros = draw.draw(st.lists(st.booleans(), min_size=shape[0], max_size=shape[0]), "zeros")
    weight = weight.masked_fill(torch.tensor(zeros), 0.0)
    if draw.draw(st.booleans(), "per token"):
        weight = weight[:, None] * torch.linspace(0, 2, shape[1])
    check(
        (hidden, head, labels, weight),
        denominator=draw.draw(st.sampled_from(["tokens", "weights", "samples", 3.5, torch.tensor(2)]), "denominator"),
        softcap=draw.draw(st.sampled_from([None, 0.5, 30.0]), "softcap"),
        scale=draw.draw(st.sampled_from([1.0, 0.0625, 3.0]), "scale"),
        max_bytes=draw.draw(st.sampled_from([1500, 4000, 20000, 2**28]), "max_bytes"),
    )


def test_it_is_weighted_lm_loss_of_the_logits():
    hidden, head, labels, weight = make()
    ours = weighted_linear_cross_entropy(hidden, head, labels, weight)
    torch.testing.assert_close(ours, weighted_lm_loss(head(hidden), labels, weight))
    without = weighted_linear_cross_entropy(hidden, head.weight, labels, weight)
    torch.testing.assert_close(without, weighted_lm_loss(hidden @ head.weight.T, labels, weight))


def test_negative_weights_and_heads_that_never_say_a_token():
    hidden, head, labels, weight = make()
    with torch.no_grad():
        labels[labels > 2] -= 3
        head.bias[-3:] = -math.inf
    check((hidden, head, labels, weight - 0.5), max_bytes=MANY_CHUNKS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_bytes", [MANY_CHUNKS, 2**28])
def test_half_precision_is_closer_to_the_exact_loss_than_half_precision_logits(dtype, max_bytes):
    hidden, head, labels, weight = make(dtype=dtype)
    exact = plain(hidden, head, labels, weight)
    ours = weighted_linear_cross_entropy(hidden, head, labels, weight, max_bytes=max_bytes)
    rough = weighted_lm_loss(head(hidden), labels, weight)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=0)
    wanted = gradients(exact, hidden, head)
    for found, worse, best in zip(gradients(ours, hidden, head), gradients(rough, hidden, head), wanted, strict=True):
        assert found.dtype == dtype
        assert distance(found, best) < torch.finfo(dtype).eps / 2
        assert distance(found, best) <= distance(worse, best)


def test_confident_tokens_keep_their_small_gradients_in_half_precision():
    """Theirs is p - 1: in bf16, which knows nothing between .996 and 1, it must not come from a rounded p."""
    hidden, head, labels, weight = make(dtype=torch.bfloat16, bias=False)
    labels = labels.clamp(min=0)
    with torch.no_grad():
        hidden[:, :-1] = 1.2 * head.weight[labels[:, 1:]]
    exact = plain(hidden, head, labels, weight)
    assert exact < 0.2
    ours = weighted_linear_cross_entropy(hidden, head, labels, weight)
    for found, best in zip(gradients(ours, hidden, head), gradients(exact, hidden, head), strict=True):
        assert distance(found, best) < 4e-3


def test_fp16_gradients_survive_a_small_loss_and_a_scaler():
    hidden, head, labels, weight = make(dtype=torch.float16)
    scaled = weighted_linear_cross_entropy(hidden, head, labels, weight * 1e-6) * 2.0**20
    exact = plain(hidden, head, labels, weight * 1e-6) * 2.0**20
    for found, best in zip(gradients(scaled, hidden, head), gradients(exact, hidden, head), strict=True):
        assert distance(found, best) < 1e-3


def test_autocast_of_forward_or_backward_changes_nothing_on_a_cpu():
    hidden, head, labels, weight = make()
    outside = gradients(weighted_linear_cross_entropy(hidden, head, labels, weight), hidden, head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradients(weighted_linear_cross_entropy(hidden, head, labels, weight), hidden, head)
        low = weighted_linear_cross_entropy(hidden.bfloat16(), head, labels, weight)
    for one, other in zip(inside, outside, strict=True):
        assert one.equal(other)
    torch.testing.assert_close(low.double(), plain(hidden.bfloat16(), head, labels, weight), rtol=2e-6, atol=0)


def test_micro_batches_with_a_given_denominator_sum_to_the_gradient_of_one_batch():
    hidden, head, labels, weight = make()
    count = (labels[:, 1:] != -100).sum()
    whole = weighted_linear_cross_entropy(hidden, head, labels, weight)
    parts = zip(hidden.split([1, 3]), labels.split([1, 3]), weight.split([1, 3]), strict=True)
    summed = sum(weighted_linear_cross_entropy(h, head, y, w, denominator=count) for h, y, w in parts)
    for one, other in zip(gradients(summed, hidden, head), gradients(whole, hidden, head), strict=True):
        torch.testing.assert_close(one, other)


def test_backward_scales_with_the_upstream_gradient_and_can_be_repeated():
    hidden, head, labels, weight = make()
    loss = weighted_linear_cross_entropy(hidden, head, labels, weight)
    parameters = [hidden, *head.parameters()]
    once = torch.autograd.grad(loss, parameters, retain_graph=True)
    scaled = torch.autograd.grad(1024 * loss / 8, parameters, retain_graph=True)
    again = torch.autograd.grad(loss, parameters)
    for first, large, last in zip(once, scaled, again, strict=True):
        assert last.equal(first)
        assert large.equal(128 * first)


def test_tied_embeddings_and_two_uses_of_a_head_add_their_gradients():
    hidden, head, labels, weight = make(bias=False)
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))

    def both(loss):
        embedded = F.embedding(ids, head.weight)
        return loss(embedded, labels) + loss(hidden + embedded, labels.flip(0))

    ours = both(lambda h, y: weighted_linear_cross_entropy(h, head, y, weight))
    exact = both(lambda h, y: plain(h, head, y, weight))
    for found, best in zip(gradients(ours, hidden, head), gradients(exact, hidden, head), strict=True):
        assert distance(found, best) < 1e-5


@pytest.mark.parametrize("trained", ["hidden", "head", "bias", "nothing"])
def test_only_what_requires_a_gradient_gets_one(trained):
    hidden, head, labels, weight = make()
    exact = gradients(plain(hidden, head, labels, weight), hidden, head)
    expected = dict(zip(("hidden", "weight", "bias"), exact, strict=True))
    wanted = {"hidden": {"hidden"}, "head": {"weight", "bias"}, "bias": {"bias"}, "nothing": set()}[trained]
    leaves = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
    loss = weighted_linear_cross_entropy(hidden, head, labels, weight)
    assert loss.requires_grad == bool(wanted)
    if wanted:
        loss.backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted)
        assert leaf.grad is None or distance(leaf.grad, expected[name]) < 1e-5


def test_without_gradients_the_loss_is_the_same():
    hidden, head, labels, weight = make()
    loss = weighted_linear_cross_entropy(hidden, head, labels, weight)
    with torch.no_grad():
        quiet = weighted_linear_cross_entropy(hidden, head, labels, weight)
    with torch.inference_mode():
        assert weighted_linear_cross_entropy(hidden, head, labels, weight).equal(quiet)
    assert not quiet.requires_grad
    assert quiet.equal(loss)


def test_a_frozen_head_is_not_kept_for_the_backward_pass():
    hidden, head, labels, weight = make()
    head.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        weighted_linear_cross_entropy(hidden, head, labels, weight)
    rows = int((labels[:, 1:] != -100).sum())
    assert sorted(saved) == [rows, rows, rows, rows * D]


def test_hidden_states_may_lie_anyhow_in_memory():
    hidden, head, labels, weight = make()
    laid = hidden.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    assert not laid.is_contiguous()
    ours = weighted_linear_cross_entropy(laid, head, labels, weight)
    exact = plain(hidden, head, labels, weight)
    assert distance(gradients(ours, laid, head)[0], gradients(exact, hidden, head)[0]) < 1e-5
    turned = head.weight.detach().T.contiguous().T.requires_grad_()
    loss = weighted_linear_cross_entropy(hidden, turned, labels, weight, max_bytes=MANY_CHUNKS)
    torch.testing.assert_close(loss, weighted_lm_loss(hidden @ turned.T, labels, weight))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_ignored_or_weightless_cannot_spoil_loss_or_gradients(poison):
    hidden, head, labels, weight = make()
    weight[2] = 0.0
    clean = weighted_linear_cross_entropy(hidden, head, labels, weight)
    wanted = gradients(clean, hidden, head)
    unread = F.pad((labels[:, 1:] == -100) | (weight[:, None] == 0), (0, 1), value=True)
    spoilt = hidden.detach().masked_fill(unread[..., None], poison).requires_grad_()
    loss = weighted_linear_cross_entropy(spoilt, head, labels, weight)
    assert loss.equal(clean)
    found = gradients(loss, spoilt, head)
    for one, other in zip(found, wanted, strict=True):
        assert one.equal(other)
    assert not found[0][unread].any()


def test_a_loss_that_is_not_finite_is_shown():
    hidden, head, labels, weight = make()
    labels[1] = 0
    with torch.no_grad():
        hidden[1] = math.nan
    assert weighted_linear_cross_entropy(hidden, head, labels, weight).isnan()
    weight[1] = math.nan
    assert weighted_linear_cross_entropy(make()[0], head, labels, weight).isnan()


@pytest.mark.parametrize("shape", [(B, T), (B, 1), (B, 0), (0, T)])
@pytest.mark.parametrize("poison", [0.0, math.nan])
@pytest.mark.parametrize("denominator", ["tokens", "weights", 0.0], ids=str)
def test_no_label_is_zero_with_gradients_of_zero(shape, poison, denominator):
    _, head, _, _ = make()
    hidden = torch.full((*shape, D), poison, requires_grad=True)
    labels = torch.full(shape, -100)
    loss = weighted_linear_cross_entropy(hidden, head, labels, torch.ones(shape[0]), denominator=denominator)
    assert loss.item() == 0.0
    loss.backward()
    for leaf in (hidden, *head.parameters()):
        assert leaf.grad.equal(torch.zeros_like(leaf))


def test_arguments_are_left_as_they_were():
    hidden, head, labels, weight = make()
    arguments = (hidden, *head.parameters(), labels, weight)
    copies = [argument.detach().clone() for argument in arguments]
    weighted_linear_cross_entropy(hidden, head, labels, weight, softcap=3.0, scale=2.0).backward()
    for argument, copy in zip(arguments, copies, strict=True):
        assert argument.detach().equal(copy)


def test_a_head_that_changed_before_backward_is_an_error_not_a_wrong_gradient():
    hidden, head, labels, weight = make()
    loss = weighted_linear_cross_entropy(hidden, head, labels, weight)
    with torch.no_grad():
        head.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_are_refused():
    hidden, head, labels, weight = make()
    loss = weighted_linear_cross_entropy(hidden, head, labels, weight)
    with pytest.raises(RuntimeError, match=r"differentiated once, not with create_graph=True: .* weighted_lm_loss"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda h: weighted_linear_cross_entropy(h, head, labels, weight))(hidden.detach())


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_calls_it_as_it_is():
    hidden, head, labels, weight = make()

    def step(hidden, labels, weight):
        return weighted_linear_cross_entropy(2 * hidden, head, labels, weight, max_bytes=MANY_CHUNKS) + 1

    compiled = torch.compile(step, backend="aot_eager")(hidden, labels, weight)
    assert compiled.equal(step(hidden, labels, weight))
    expected = gradients(step(hidden, labels, weight), hidden, head)
    for one, other in zip(gradients(compiled, hidden, head), expected, strict=True):
        assert one.equal(other)


MEASURED = """
import re, torch
from pathlib import Path
from flowstream import weighted_linear_cross_entropy

def high_water():  # ru_maxrss would begin with that of the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def run(num_tokens, vocabulary):
    hidden = torch.randn(2, num_tokens // 2, 64, requires_grad=True)
    head = torch.nn.Linear(64, vocabulary, bias=False)
    labels = torch.randint(vocabulary, (2, num_tokens // 2))
    before = high_water()
    weighted_linear_cross_entropy(hidden, head, labels, torch.ones(2), max_bytes=2**24).backward()
    gradients = hidden.grad.nbytes + head.weight.grad.nbytes
    return high_water() - before - gradients

torch.set_num_threads(1)
run(512, 9000)  # what libraries set up on first use
print(run(512, 262144))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_beyond_the_gradients_stays_within_max_bytes():
    """512 tokens of 262,144 words: fp32 logits would be 512 MB; here 16 MB, and 32 for what the system rounds up.

    What is allocated is bounded to the byte in the test below.
    """
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**24 + 2**25


@pytest.mark.parametrize("max_bytes", [2**19, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_allocations_stay_within_max_bytes(max_bytes, dtype, softcap):
    hidden, head, labels, weight = make(dtype=dtype, shape=(2, 300), width=64, vocabulary=5000)
    rows = int((labels[:, 1:] != -100).sum())

    def step():
        loss = weighted_linear_cross_entropy(hidden, head, labels, weight, softcap=softcap, max_bytes=max_bytes)
        return loss, gradients(loss, hidden, head)

    kept_for_backward = rows * 64 * dtype.itemsize
    results = sum(leaf.nbytes for leaf in (hidden, *head.parameters()))
    assert peak_of(step) <= max_bytes + results + kept_for_backward + 100 * rows + 40 * labels.numel()


@pytest.mark.parametrize(
    ("hidden", "head", "labels", "found"),
    [
        ((B, D), (V, D), (B,), r"hidden has shape \[4, 16\], labels \[4\] and the head's weight \[77, 16\]; give"),
        ((B, T, D), (V, D), (B, T - 1), r"labels \[4, 8\]"),
        ((B, T, D), (V, D + 1), (B, T), r"weight \[77, 17\]; give \[B, T, D\], \[B, T\] and \[V, D\]"),
        ((B, T, D), (V,), (B, T), r"head's weight has shape \[77\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(hidden, head, labels, found):
    with pytest.raises(ValueError, match=found):
        weighted_linear_cross_entropy(
            torch.zeros(hidden), torch.zeros(head), torch.zeros(labels, dtype=torch.long), torch.ones(B)
        )


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"softcap": 0.0}, r"softcap 0.0; give a finite number above 0, or None"),
        ({"softcap": -30.0}, r"softcap -30.0"),
        ({"softcap": math.nan}, r"softcap nan"),
        ({"scale": math.inf}, r"scale inf; give a finite number"),
        ({"denominator": "mean"}, r"denominator 'mean'; give 'tokens'"),
        ({"denominator": torch.ones(2)}, r"denominator has shape \[2\]"),
        ({"max_bytes": 100}, r"max_bytes 100 is too small for one row and one column; give \d+ or more"),
        ({"max_bytes": 0}, r"max_bytes 0"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options, found):
    with pytest.raises(ValueError, match=found):
        weighted_linear_cross_entropy(*make(), **options)


def test_the_least_max_bytes_that_an_error_names_will_do():
    inputs = make(vocabulary=5, shape=(2, 3))
    with pytest.raises(ValueError, match="too small") as error:
        weighted_linear_cross_entropy(*inputs, max_bytes=1)
    least = int(str(error.value).split("give ")[1].split()[0])
    check(inputs, max_bytes=least)
    with pytest.raises(ValueError, match="too small"):
        weighted_linear_cross_entropy(*inputs, max_bytes=least - 1)


@pytest.mark.parametrize("label", [V, -1, -101])
def test_labels_outside_the_vocabulary_are_refused(label):
    hidden, head, labels, weight = make()
    labels[1, 2] = label
    with pytest.raises(ValueError, match=rf"label {label} is outside the 77 classes"):
        weighted_linear_cross_entropy(hidden, head, labels, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_and_hidden_of_another_kind_are_refused(dtype):
    hidden, head, labels, weight = make()
    with pytest.raises(ValueError, match=rf"labels have dtype {dtype}; give integer"):
        weighted_linear_cross_entropy(hidden, head, labels.to(dtype), weight)
    with pytest.raises(ValueError, match=r"hidden has dtype torch.int64"):
        weighted_linear_cross_entropy(hidden.long(), head, labels, weight)
    with pytest.raises(ValueError, match=r"weight has shape \[4, 1\]"):
        weighted_linear_cross_entropy(hidden, head, labels, weight[:, None])


class Quantised(nn.Linear):
    def forward(self, input):
        return super().forward(input).round()


class Sharded(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (Quantised(D, V), r"the head is a Quantised, quantised or otherwise .*; give a torch.nn.Linear"),
        (nn.Sequential(nn.Linear(D, V)), r"the head is a torch.nn.modules.container.Sequential; .* adapter merged"),
        (torch.zeros(V, D).as_subclass(Sharded), r"head's weight is a Sharded, sharded or quantised; .*full_tensor"),
        (torch.zeros(V, D, dtype=torch.int8), r"dtype torch.int8"),
        (nn.Linear(D, V, device="meta"), r"on meta"),
    ],
    ids=["quantised", "module", "sharded", "int8", "meta"],
)
def test_heads_that_are_no_plain_linear_layer_are_refused(head, found):
    hidden, _, labels, weight = make()
    with pytest.raises(ValueError, match=found):
        weighted_linear_cross_entropy(hidden, head, labels, weight)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite"])
def test_options_are_those_of_real_heads(tiny, family):
    model = tiny(family)
    ids = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(0))
    weight, config = torch.tensor([0.3, 0.9]), model.config
    ours = weighted_linear_cross_entropy(
        model.base_model(ids).last_hidden_state,
        model.get_output_embeddings(),
        ids,
        weight,
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0),
    )
    theirs = weighted_lm_loss(model(ids).logits, ids, weight)
    torch.testing.assert_close(ours, theirs)
    parameters = list(model.parameters())
    for found, best in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_it_is_the_same_and_labels_left_on_the_cpu_cost_no_synchronisation(dtype, softcap):
    hidden, head, labels, weight = make(dtype=dtype, shape=(8, 64), width=64, vocabulary=1000)
    wanted = gradients(plain(hidden, head, labels, weight, softcap=softcap), hidden, head)
    on_gpu, head = hidden.detach().cuda().requires_grad_(), head.cuda()

    def step(labels, weight):
        loss = weighted_linear_cross_entropy(on_gpu, head, labels, weight, softcap=softcap, max_bytes=2**20)
        return loss, gradients(loss * 8, on_gpu, head)

    moved, found = step(labels.cuda(), weight.cuda())
    for one, best in zip(found, wanted, strict=True):
        assert distance(one.cpu() / 8, best) < {torch.float32: 1e-3}.get(dtype, 2 * torch.finfo(dtype).eps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        without, _ = step(labels, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(without, moved)


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_autocast_chooses_what_is_multiplied():
    hidden, head, labels, weight = make()
    half = make(dtype=torch.bfloat16)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = weighted_linear_cross_entropy(hidden.cuda(), head.cuda(), labels, weight)
    torch.testing.assert_close(loss.cpu().double(), plain(*half), rtol=1e-4, atol=0)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_on_a_gpu_memory_beyond_the_gradients_stays_within_max_bytes(softcap):
    hidden, head, labels, weight = make(dtype=torch.bfloat16, shape=(4, 1024), width=256, vocabulary=131072)
    hidden, head = hidden.detach().cuda().requires_grad_(), head.cuda()

    def step():
        loss = weighted_linear_cross_entropy(hidden, head, labels, weight, softcap=softcap, max_bytes=2**27)
        return gradients(loss, hidden, head)

    step()  # what libraries set up on first use
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = sum(gradient.nbytes for gradient in step())
    grown = torch.cuda.max_memory_allocated() - before
    assert grown <= 2**27 + results + hidden.nbytes + 100 * labels.numel() + 2**20
