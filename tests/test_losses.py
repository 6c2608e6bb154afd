"""Losses: against a plain loop over samples and tokens in fp64, and what must hold for odd batches."""

import doctest
import math

import pytest
import torch
import torch.nn.functional as F

from flowstream import losses
from flowstream.losses import weighted_cross_entropy, weighted_lm_loss

B, T, V = 5, 9, 13
DENOMINATORS = ["tokens", "weights", "samples", 7.5, torch.tensor(7.5)]


def make(seed=0, dtype=torch.float32, shape=(B, T)):
    """logits [*shape, V], labels [*shape] with a third ignored, weight [B]."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(*shape, V, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(V, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.33] = -100
    return logits, labels, torch.rand(shape[0], generator=generator)


def loop(logits, labels, weight, denominator, *, shift):
    """The definition, a sample and a token at a time, in fp64. Targets may be probabilities."""
    logits, total = logits.double(), torch.zeros((), dtype=torch.float64)
    tokens, samples, weights = 0, 0, 0.0
    for i in range(len(logits)):
        counted = 0
        for t in range(logits.shape[1]):
            here = t + 1 if shift else t
            if here >= logits.shape[1] or (labels.ndim == 2 and labels[i, here] == -100):
                continue
            w = float(weight[i] if weight.ndim == 1 else weight[i, here])
            log_p = logits[i, t] - torch.logsumexp(logits[i, t], 0)
            nll = -log_p[labels[i, here]] if labels.ndim == 2 else -(labels[i, here].double() * log_p).sum()
            total = total + w * nll
            weights, counted = weights + w, counted + 1
        tokens, samples = tokens + counted, samples + (counted > 0)
    named = {"tokens": tokens, "samples": samples, "weights": weights}
    return total / (named[denominator] if isinstance(denominator, str) else float(denominator))


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def check(loss, expected, logits, rtol=2e-6):
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=1e-6)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits), rtol=rtol, atol=1e-6)


def test_docstring_examples_run():
    assert doctest.testmod(losses).failed == 0


@pytest.mark.parametrize("denominator", DENOMINATORS, ids=str)
@pytest.mark.parametrize("per_token", [False, True])
def test_lm_loss_and_its_gradient_equal_the_plain_loop(denominator, per_token):
    logits, labels, weight = make()
    weight = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) if per_token else weight
    loss = weighted_lm_loss(logits, labels, weight, denominator=denominator)
    check(loss, loop(logits, labels, weight, denominator, shift=True), logits)


@pytest.mark.parametrize("denominator", DENOMINATORS, ids=str)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_of_sequences_equals_the_plain_loop(denominator, per_token, soft):
    logits, target, weight = make()
    if soft:
        target = torch.rand(B, T, V, generator=torch.Generator().manual_seed(2)).softmax(-1)
    weight = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) if per_token else weight
    loss = weighted_cross_entropy(logits, target, weight, denominator=denominator)
    check(loss, loop(logits, target, weight, denominator, shift=False), logits)


@pytest.mark.parametrize("denominator", DENOMINATORS, ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_of_samples_equals_the_plain_loop(denominator, soft):
    logits, target, weight = make(shape=(B,))
    assert (target == -100).any()
    if soft:
        target = torch.rand(B, V, generator=torch.Generator().manual_seed(2)).softmax(-1)
    loss = weighted_cross_entropy(logits, target, weight, denominator=denominator)
    check(loss, loop(logits[:, None], target[:, None], weight, denominator, shift=False), logits)


def test_the_defaults_are_the_official_denominators():
    logits, labels, weight = make()
    assert weighted_lm_loss(logits, labels, weight).equal(
        weighted_lm_loss(logits, labels, weight, denominator=int((labels[:, 1:] != -100).sum()))
    )
    classes = torch.arange(B)
    ours = weighted_cross_entropy(logits[:, 0], classes, weight)
    torch.testing.assert_close(ours, (weight * F.cross_entropy(logits[:, 0], classes, reduction="none")).mean())


def test_weights_of_one_give_plain_cross_entropy():
    logits, labels, _ = make()
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    for weight in (torch.ones(B), torch.ones(B, T)):
        for denominator in ("tokens", "weights"):
            torch.testing.assert_close(weighted_lm_loss(logits, labels, weight, denominator=denominator), plain)
    unshifted = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(weighted_cross_entropy(logits, labels, torch.ones(B), denominator="tokens"), unshifted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_losses_are_fp32_whatever_the_dtype_of_the_logits(dtype):
    logits, labels, weight = make(dtype=dtype)
    for loss, shift in (
        (weighted_lm_loss(logits, labels, weight), True),
        (weighted_cross_entropy(logits, labels, weight, denominator="tokens"), False),
    ):
        assert loss.dtype == torch.float32
        exact = loop(logits, labels, weight, "tokens", shift=shift)
        torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
        ours, theirs = gradient(loss, logits), gradient(exact, logits)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("denominator", DENOMINATORS, ids=str)
def test_label_smoothing_equals_torchs(smoothing, denominator):
    logits, labels, weight = make()
    for shift in (True, False):
        loss_of = weighted_lm_loss if shift else weighted_cross_entropy
        loss = loss_of(logits, labels, weight, denominator=denominator, label_smoothing=smoothing)
        ends = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
        nll = F.cross_entropy(ends[0].double().transpose(1, 2), ends[1], reduction="none", label_smoothing=smoothing)
        weights, labelled = weight[:, None].double().expand_as(ends[1]), ends[1] != -100
        named = {"tokens": labelled.sum(), "samples": labelled.any(1).sum(), "weights": (weights * labelled).sum()}
        divisor = named[denominator] if isinstance(denominator, str) else denominator
        check(loss, (nll * weights).sum() / divisor, logits)
    one = weighted_cross_entropy(logits[:, 0], labels[:, 0].clamp(min=0), weight, label_smoothing=smoothing)
    nll = F.cross_entropy(logits[:, 0], labels[:, 0].clamp(min=0), reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(one, (nll * weight).mean())


@pytest.mark.parametrize("num_items", [None, torch.tensor(31)], ids=str)
def test_label_smoothing_equals_that_of_transformers_trainer(num_items):
    from transformers.trainer_pt_utils import LabelSmoother

    logits, labels, _ = make()
    smoother, outputs = LabelSmoother(epsilon=0.1), {"logits": logits}
    denominator = "tokens" if num_items is None else num_items
    options = {"denominator": denominator, "label_smoothing": 0.1}
    expected = smoother(outputs, labels, shift_labels=True, num_items_in_batch=num_items)
    torch.testing.assert_close(weighted_lm_loss(logits, labels, torch.ones(B), **options), expected)
    expected = smoother(outputs, labels, num_items_in_batch=num_items)
    torch.testing.assert_close(weighted_cross_entropy(logits, labels, torch.ones(B), **options), expected)


def test_autocast_changes_nothing():
    logits, labels, weight = make(dtype=torch.bfloat16)
    plain = weighted_lm_loss(logits, labels, weight), weighted_cross_entropy(logits, labels, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = weighted_lm_loss(logits, labels, weight), weighted_cross_entropy(logits, labels, weight)
    assert plain[0].equal(inside[0])
    assert plain[1].equal(inside[1])
    assert gradient(plain[0], logits).equal(gradient(inside[0], logits))


def test_micro_batches_with_a_given_denominator_sum_to_the_gradient_of_one_batch():
    generator = torch.Generator().manual_seed(0)
    head = (torch.randn(6, V, generator=generator)).requires_grad_()
    hidden = torch.randn(8, T, 6, generator=generator)
    labels, weight = torch.randint(V, (8, T), generator=generator), torch.rand(8, generator=generator)
    for row, length in enumerate([9, 2, 5, 3, 9, 1, 4, 7]):
        labels[row, length:] = -100
    num_tokens = torch.tensor(float((labels[:, 1:] != -100).sum()))
    whole = gradient(weighted_lm_loss(hidden @ head, labels, weight), head)

    def summed(denominator):
        parts = zip(hidden.split([1, 3, 2, 2]), labels.split([1, 3, 2, 2]), weight.split([1, 3, 2, 2]), strict=True)
        return sum(gradient(weighted_lm_loss(h @ head, y, w, denominator=denominator), head) for h, y, w in parts)

    torch.testing.assert_close(summed(num_tokens), whole, rtol=0, atol=1e-6)
    assert not torch.allclose(summed("tokens") / 4, whole, atol=1e-3), "their own counts would do as well"


def call_all(logits, labels, weight, denominator):
    """Both losses of the same tokens, and cross-entropy by sample and by probabilities where that is possible."""
    yield weighted_lm_loss(logits, labels, weight, denominator=denominator)
    yield weighted_cross_entropy(logits, labels, weight, denominator=denominator)
    yield weighted_cross_entropy(logits[:, 0], labels[:, 0], weight, denominator=denominator)


@pytest.mark.parametrize("denominator", [*DENOMINATORS, 0.0, torch.tensor(0)], ids=str)
@pytest.mark.parametrize("poison", [0.0, math.nan, math.inf])
def test_all_ignored_is_zero_with_a_zero_gradient(denominator, poison):
    logits = torch.full((B, T, V), poison, requires_grad=True)
    for loss in call_all(logits, torch.full((B, T), -100), torch.rand(B), denominator):
        assert loss.item() == 0.0
        assert gradient(loss, logits).equal(torch.zeros(B, T, V))


@pytest.mark.parametrize("denominator", DENOMINATORS, ids=str)
def test_weights_of_zero_contribute_nothing(denominator):
    logits, labels, _ = make()
    for loss in call_all(logits, labels, torch.zeros(B), denominator):
        assert loss.item() == 0.0
        assert gradient(loss, logits).equal(torch.zeros(B, T, V))
    soft = weighted_cross_entropy(logits, logits.detach().softmax(-1), torch.zeros(B), denominator=denominator)
    assert soft.item() == 0.0


def test_what_is_ignored_or_weightless_cannot_spoil_the_rest():
    logits, labels, weight = make()
    weight[2], labels[3] = 0.0, -100
    clean = weighted_lm_loss(logits, labels, weight)
    with torch.no_grad():
        logits[2], logits[3], logits[:, -1] = math.nan, math.inf, math.nan
    spoilt = weighted_lm_loss(logits, labels, weight)
    assert spoilt.equal(clean)
    assert gradient(spoilt, logits).isfinite().all()


def test_a_weightless_sample_still_counts_in_the_unweighted_denominators():
    logits, labels, _ = make()
    labels[:] = labels.clamp(min=0)
    weight = torch.tensor([1.0, 0, 0, 0, 0])
    alone = weighted_lm_loss(logits[:1], labels[:1], weight[:1])
    torch.testing.assert_close(weighted_lm_loss(logits, labels, weight), alone / B)
    torch.testing.assert_close(weighted_lm_loss(logits, labels, weight, denominator="weights"), alone)


def test_a_loss_that_is_not_finite_is_shown():
    logits, labels, weight = make()
    labels[1] = 0
    with torch.no_grad():
        logits[1] = math.nan
    assert weighted_lm_loss(logits, labels, weight).isnan()
    weight[1] = math.nan
    assert weighted_lm_loss(make()[0], labels, weight).isnan()


def test_the_weight_gets_no_gradient_and_any_dtype_will_do():
    logits, labels, weight = make()
    trained = weight.clone().requires_grad_()
    loss = weighted_lm_loss(logits, labels, trained, denominator="weights")
    assert torch.autograd.grad(loss, trained, allow_unused=True)[0] is None
    as_double = weighted_lm_loss(logits, labels.int(), weight.double(), denominator="weights")
    assert as_double.equal(loss)


@pytest.mark.parametrize("shape", [(B, 1), (B, 0), (0, T)])
def test_batches_without_a_next_token_give_zero(shape):
    logits = torch.zeros(*shape, V, requires_grad=True)
    loss = weighted_lm_loss(logits, torch.zeros(shape, dtype=torch.long), torch.ones(shape[0]))
    assert loss.item() == 0.0
    assert gradient(loss, logits).shape == logits.shape


def test_arguments_are_left_as_they_were():
    logits, labels, weight = make()
    copies = logits.detach().clone(), labels.clone(), weight.clone()
    weighted_lm_loss(logits, labels, weight)
    for argument, copy in zip((logits.detach(), labels, weight), copies, strict=True):
        assert argument.equal(copy)


def test_unreduced_memory_is_that_of_the_labelled_rows():
    """Nothing of fp32 and of the size of the logits is kept for the backward pass."""
    logits, labels, weight = make(dtype=torch.bfloat16, shape=(4, 64))
    labels[:, 8:] = -100
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        weighted_lm_loss(logits, labels, weight)
    assert max(saved) <= 4 * 8 * V


@pytest.mark.parametrize(
    ("logits", "labels", "weight", "found"),
    [
        ((B, V), (B,), (B,), r"logits have shape \[5, 13\] and labels \[5\]"),
        ((B, T, V), (B, T - 1), (B,), r"labels \[5, 8\]; give \[B, T, V\] and \[B, T\]"),
        ((B, T, V), (B, T), (B, 1), r"weight has shape \[5, 1\] for targets of \[5, 9\]; give \[B\] or \[B, T\]"),
        ((B, T, V), (B, T), (B, T - 1), r"weight has shape \[5, 8\]"),
        ((B, T, V), (B, T), (), r"weight has shape \[\]"),
        ((B, T, V), (B, T), (T,), r"weight has shape \[9\]"),
    ],
)
def test_lm_loss_refuses_shapes_that_do_not_fit(logits, labels, weight, found):
    with pytest.raises(ValueError, match=found):
        weighted_lm_loss(torch.zeros(logits), torch.zeros(labels, dtype=torch.long), torch.ones(weight))


@pytest.mark.parametrize(
    ("logits", "target", "weight", "found"),
    [
        ((V,), torch.tensor(1), (1,), r"logits have shape \[13\]"),
        ((B, T, V), torch.zeros(B, dtype=torch.long), (B,), r"target \[5\]"),
        ((B, V), torch.zeros(B, T, dtype=torch.long), (B,), r"target \[5, 9\]"),
        ((B, V), torch.zeros(B, V, dtype=torch.long), (B,), "dtype torch.int64 for logits"),
        ((B, V), torch.zeros(B), (B,), "dtype torch.float32 for logits"),
        (
            (B, V),
            torch.zeros(B, dtype=torch.long),
            (B, V),
            r"weight has shape \[5, 13\] for targets of \[5\]; give \[B\]",
        ),
    ],
)
def test_cross_entropy_refuses_shapes_that_do_not_fit(logits, target, weight, found):
    with pytest.raises(ValueError, match=found):
        weighted_cross_entropy(torch.zeros(logits), target, torch.ones(weight))


def test_labels_must_be_integers():
    with pytest.raises(ValueError, match=r"dtype torch.float32; give integer"):
        weighted_lm_loss(torch.zeros(B, T, V), torch.zeros(B, T), torch.ones(B))


@pytest.mark.parametrize("label", [V, -1, -101])
def test_labels_outside_the_vocabulary_are_refused(label):
    logits, labels, weight = make()
    labels[1, 2] = label
    for loss in (weighted_lm_loss, weighted_cross_entropy):
        with pytest.raises(ValueError, match=rf"label {label} is outside the 13 classes of the logits \(1 such\)"):
            loss(logits, labels, weight)


def test_denominators_that_are_no_numbers_are_refused():
    logits, labels, weight = make()
    with pytest.raises(ValueError, match="denominator 'mean'; give 'tokens'"):
        weighted_lm_loss(logits, labels, weight, denominator="mean")
    with pytest.raises(ValueError, match=r"denominator has shape \[2\]"):
        weighted_lm_loss(logits, labels, weight, denominator=torch.ones(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loss", [weighted_lm_loss, weighted_cross_entropy])
def test_on_a_gpu_losses_are_the_same_and_labels_left_on_the_cpu_cost_no_synchronisation(loss):
    logits, labels, weight = make()
    expected = loss(logits, labels, weight)
    on_gpu = logits.detach().cuda().requires_grad_()
    moved = loss(on_gpu, labels.cuda(), weight.cuda())
    torch.testing.assert_close(moved.cpu(), expected)
    torch.testing.assert_close(gradient(moved, on_gpu).cpu(), gradient(expected, logits))
    torch.cuda.set_sync_debug_mode("error")
    try:
        without = loss(on_gpu, labels, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(without, moved)  # dividing by a number on the CPU rounds differently
