from __future__ import annotations

import copy
import itertools
import threading
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import build
from torch import Tensor, nn

import flowstream as fs
from flowstream.batch import leaves
from flowstream.padding_batches import LABEL_NAMES, from_portable, ignored, portable
from flowstream.scoring.base import Level, Scores
from flowstream.weighing import flatten, num_rows, place

B, T = 4, 9

Pair = namedtuple("Pair", ["input_ids", "labels"])


@dataclass
class Rows:
    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class FrozenRows:
    input_ids: Tensor
    labels: Tensor


def token_ids() -> Tensor:
    return torch.randint(3, 97, (B, T), generator=torch.Generator().manual_seed(0))


def text() -> dict[str, Any]:
    """A batch of a language model, padded on the left, with a prompt that is not predicted."""
    ids, mask = token_ids(), torch.ones(B, T, dtype=torch.int64)
    mask[0, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed_text() -> dict[str, Any]:
    positions = torch.cat([torch.arange(5), torch.arange(4)]).expand(B, T)
    return {"input_ids": token_ids(), "position_ids": positions, "labels": token_ids()}


def pair_of_texts() -> dict[str, Any]:
    return {"input_ids": token_ids(), "attention_mask": torch.ones(B, T), "labels": token_ids()[:, :6].clone()}


def images() -> dict[str, Any]:
    pixels = torch.randn(B, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 4, 2, 1])}


def tensors(batch: Any) -> Iterator[Tensor]:
    return (leaf for _, leaf in leaves(batch) if isinstance(leaf, Tensor))


# What it is made of


@pytest.mark.parametrize(
    "of",
    [
        lambda ids, labels: {"input_ids": ids, "labels": labels},
        lambda ids, labels: UserDict(input_ids=ids, labels=labels),
        lambda ids, labels: transformers.BatchEncoding({"input_ids": ids, "labels": labels}),
        lambda ids, labels: (ids, labels),
        lambda ids, labels: [ids, labels],
        lambda ids, labels: ({"input_ids": ids}, labels),
        lambda ids, labels: ({"input_ids": ids, "labels": labels},),
        lambda ids, labels: {"inputs": {"input_ids": ids, "labels": labels}},
        Pair,
        Rows,
        FrozenRows,
    ],
    ids=[
        "dict",
        "userdict",
        "encoding",
        "tuple",
        "list",
        "inputs",
        "lone",
        "nested",
        "namedtuple",
        "dataclass",
        "frozen",
    ],
)
def test_of_any_batch_all_is_kept_but_the_labels(of):
    batch = of(token_ids(), token_ids())
    before = copy.deepcopy(batch)
    result = ignored(batch)
    assert type(result) is type(batch)
    assert [path for path, _ in leaves(result)] == [path for path, _ in leaves(batch)]
    kept, labels = tensors(result)
    assert torch.equal(kept, token_ids())
    assert labels.dtype == torch.int64
    assert torch.equal(labels, torch.full((B, T), -100))
    assert all(torch.equal(now, then) for now, then in zip(tensors(batch), tensors(before), strict=True))


def test_it_shares_nothing_with_the_batch():
    ids = token_ids()
    batch = {"input_ids": ids, "labels": ids, "view": ids[:, 2:], "array": ids.numpy(), "boxes": [[ids[0]], [ids[1]]]}
    batch |= {"scalar": torch.tensor(3.0), "__key__": ["a", "b", "c", "d"], "lone": [torch.tensor(1)]}
    result = ignored(batch)
    ids.zero_()
    batch["scalar"].zero_()
    batch["__key__"].clear()
    batch["lone"][0].zero_()
    assert torch.equal(result["input_ids"], token_ids())
    assert torch.equal(result["view"], token_ids()[:, 2:])
    assert np.array_equal(result["array"], token_ids().numpy())
    assert torch.equal(result["boxes"][1][0], token_ids()[1])
    assert (result["scalar"], result["__key__"], result["lone"]) == (3.0, ["a", "b", "c", "d"], [1])
    assert (result["labels"] == -100).all()


def test_labels_that_are_one_row_expanded_are_ignored_in_every_row():
    batch = {"labels": torch.arange(T).expand(B, T)}
    assert (ignored(batch)["labels"] == -100).all()
    assert torch.equal(batch["labels"], torch.arange(T).expand(B, T))


@pytest.mark.parametrize("name", LABEL_NAMES)
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (torch.tensor([1, 2], dtype=torch.int32), torch.tensor([-100, -100], dtype=torch.int32)),
        (torch.tensor([1, 2], dtype=torch.int8), torch.tensor([-100, -100], dtype=torch.int8)),
        (np.array([1, 2]), np.array([-100, -100])),
        ([5, 3], [-100, -100]),
        ([[5, 3], [1]], [[-100, -100], [-100]]),
        ([torch.tensor([1, 2]), torch.tensor([3])], [torch.tensor([-100, -100]), torch.tensor([-100])]),
        ([np.int64(3), np.int64(4)], [np.int64(-100), np.int64(-100)]),
    ],
)
def test_integer_labels_are_minus_100(name, labels, expected):
    found = ignored({"x": torch.ones(2, 3), name: labels})[name]
    assert type(found) is type(expected)
    assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([[0.5, 0.5], [0.0, 1.0]]),
        torch.tensor([True, False]),
        torch.tensor([1, 2], dtype=torch.uint8),
        np.array([1, 2], dtype=np.uint16),
        np.array([0.5, 1.5]),
        [True, False],
        ["cat", "dog"],
        [{"boxes": torch.ones(2, 4), "labels": torch.tensor([1, 2])}, {"boxes": torch.ones(0, 4)}],
    ],
)
def test_labels_that_cannot_say_it_stay_as_they_are(labels):
    for batch in ({"x": torch.ones(2, 3), "labels": labels}, (torch.ones(2, 3), labels)):
        assert repr(ignored(batch)) == repr(batch)


def test_only_what_scorers_read_as_labels_is_ignored():
    ids = torch.arange(6).reshape(2, 3)
    for batch in ({"input_ids": ids, "label_ids": ids}, (ids,), (ids, ids, ids), ids, {"meta": {"labels": ids}}):
        assert repr(ignored(batch)) == repr(batch)


def test_a_second_element_that_no_scorer_reads_stays_as_it_is():
    ids, mask = token_ids(), torch.ones(B, T, dtype=torch.int64)
    assert torch.equal(ignored((ids, mask), by_position=False)[1], mask)
    assert (ignored(({"labels": ids}, mask), by_position=False)[0]["labels"] == -100).all()


def test_no_nan_is_left_and_masks_of_minus_infinity_are():
    values = torch.tensor([1.0, torch.nan, -torch.inf])
    batch = {"x": values, "half": values.bfloat16(), "array": values.numpy().copy(), "labels": values.clone()}
    result = ignored(batch)
    for name in batch:
        assert np.array_equal(torch.as_tensor(result[name]).float(), [1, 0, -np.inf])
    assert values.isnan().any()


def test_a_nan_in_the_batch_that_it_is_made_from_does_not_reach_the_gradients():
    model = nn.Linear(3, 5)
    batch = {"x": torch.tensor([[1.0, 2.0, torch.nan]]), "labels": torch.tensor([2])}
    for found, is_nan in ((batch, True), (ignored(batch), False)):
        loss = fs.weighted_cross_entropy(model(found["x"]), found["labels"], torch.zeros(1))
        assert any(gradient.isnan().any() for gradient in gradients(model, loss)) == is_nan


def test_one_made_in_inference_mode_can_be_trained_on():
    with torch.inference_mode():
        result = ignored({"x": torch.randn(B, 3)})
    nn.Linear(3, 1)(result["x"]).sum().backward()


def test_it_is_made_on_the_device_that_is_named():
    result = ignored(images(), device="meta")
    assert {leaf.device.type for leaf in tensors(result)} == {"meta"}


def test_what_is_no_batch_is_refused():
    with pytest.raises(ValueError, match="a str is no batch"):
        ignored("cat")


# Travelling


@pytest.mark.parametrize(
    "of", [dict, UserDict, transformers.BatchEncoding, lambda x: Rows(x["input_ids"], x["labels"])]
)
def test_a_batch_arrives_as_it_was_sent(of):
    batch = of(text())
    result = from_portable(portable(batch))
    assert type(result) is type(batch)
    assert all(torch.equal(now, then) for now, then in zip(tensors(result), tensors(batch), strict=True))


def test_any_leaf_travels_and_of_a_view_only_what_is_seen():
    batch = {"half": torch.randn(10_000, 2).bfloat16()[:3], "array": np.arange(3), "__key__": ["a", "b", "c"], "n": 3}
    sent = portable(batch)
    assert len(sent) < 4000
    assert repr(from_portable(sent)) == repr(batch)


def test_what_cannot_travel_is_named():
    with pytest.raises(ValueError, match=r"batch\['meta'\]\['lock'\] cannot be sent .* on_uneven='stop'"):
        portable({"x": torch.ones(2), "meta": {"lock": threading.Lock()}})
    local = namedtuple("local", ["x"])
    with pytest.raises(ValueError, match="a batch of type local cannot be sent"):
        portable(local(torch.ones(2)))


@pytest.mark.skipif(torch.xpu.is_available(), reason="there is such a device")
def test_a_rank_without_such_a_device_says_so():
    sent = portable({"x": torch.ones(2)}).replace(b"\x03cpu", b"\x03xpu", 1)
    with pytest.raises(RuntimeError, match="on a device of type 'xpu', and this rank cannot put it there"):
        from_portable(sent)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_on_a_gpu_arrives_on_a_gpu():
    batch = {"x": torch.ones(2, device="cuda"), "lengths": torch.ones(2)}
    result = from_portable(portable(batch))
    assert (result["x"].device.type, result["lengths"].device.type) == ("cuda", "cpu")


# What it teaches


def resnet() -> nn.Module:
    settings = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 5}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**settings))


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """Of all parameters; the graph is kept."""
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def losses_of(model: nn.Module, batch: dict[str, Any]) -> Iterator[Callable[..., Tensor]]:
    """Functions (weight, denominator=) → loss of a batch: each of ours that fits the model. One forward."""
    labels = batch["labels"]
    output = model(**batch, **({"output_hidden_states": True} if labels.ndim == 2 else {}))
    shifted = not hasattr(output, "encoder_last_hidden_state") and labels.ndim == 2
    if not shifted:
        yield lambda weight, **kwargs: fs.weighted_cross_entropy(output.logits, labels, weight, **kwargs)
        return
    yield lambda weight, **kwargs: fs.weighted_lm_loss(output.logits, labels, weight, **kwargs)
    hidden, head = output.hidden_states[-1], model.get_output_embeddings()
    yield lambda weight, **kwargs: fs.weighted_linear_cross_entropy(hidden, head, labels, weight, **kwargs)


DENOMINATORS = ("tokens", "samples", "weights", 7.5, torch.tensor(7.5), torch.tensor(0.0))

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "llama": (lambda: build("llama"), text),
    "llama, packed": (lambda: build("llama"), packed_text),
    "llama in bf16": (lambda: build("llama").bfloat16(), text),
    "gpt2": (lambda: build("gpt2"), text),
    "mixtral": (lambda: build("mixtral"), text),
    "t5": (lambda: build("t5"), pair_of_texts),
    "bart": (lambda: build("bart"), pair_of_texts),
    "vit": (lambda: build("vit"), images),
    "resnet": (resnet, images),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_on_it_is_finite_and_of_exactly_no_gradient(name):
    make, batch = MODELS[name]
    model = make().train()
    weights = [torch.zeros(batch()["labels"].shape[:axes]) for axes in range(1, batch()["labels"].ndim + 1)]
    for given in (ignored(batch()), batch()):  # also with labels: those of some batches stay as they are
        for loss_of in losses_of(model, given):
            for weight, denominator in itertools.product(weights, DENOMINATORS):
                loss = loss_of(weight, denominator=denominator)
                found = gradients(model, loss * 2.0**16)  # as under a gradient scaler
                assert loss.item() == 0
                assert not any(gradient.any() for gradient in found)
            trained = gradients(model, loss_of(torch.ones(B)))
            assert len(found) == len(trained) > 0  # DDP waits for a gradient of every parameter
            assert any(gradient.any() for gradient in trained) == (given["labels"] != -100).any()


# What models keep and add of themselves


def test_running_statistics_take_it_for_data_unless_they_are_frozen():
    model, last = resnet().train(), images()
    kept = copy.deepcopy(model.state_dict())
    batch = ignored(last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model(**batch)
    assert all(torch.equal(now, kept[name]) for name, now in model.state_dict().items())
    model.train()(**batch)
    again = resnet()
    again.load_state_dict(kept)
    again.train()(**last)
    assert all(torch.equal(now, again.state_dict()[name]) for name, now in model.state_dict().items())
    assert not all(torch.equal(now, kept[name]) for name, now in model.state_dict().items())


def test_a_routers_loss_has_a_gradient_on_it_unless_it_is_weighted_too():
    model = build("mixtral", output_router_logits=True).train()
    batch, weight = ignored(text()), torch.zeros(B)
    output = model(**batch)
    ours = fs.weighted_lm_loss(output.logits, batch["labels"], weight)
    assert output.loss.isnan()  # the model's own mean, of nothing
    assert any(gradient.any() for gradient in gradients(model, ours + output.aux_loss))
    counts = (weight > 0).any()
    assert not any(gradient.any() for gradient in gradients(model, ours + counts * output.aux_loss))


# What scorers say of it


def typed_text() -> dict[str, Any]:
    """With an input that is not taken apart by rows: such a batch is scored as it is."""
    return text() | {"token_type_ids": torch.zeros(B, T, dtype=torch.int64)}


def pair_with_embeddings() -> dict[str, Any]:
    batch = pair_of_texts()
    return {"inputs_embeds": torch.randn(B, T, 32), "labels": batch["labels"]}


def labelled_text() -> dict[str, Any]:
    return text() | {"labels": torch.tensor([0, 2, 1, 1])}


def scored_rows() -> dict[str, Any]:
    return images() | {"flow_loss": torch.ones(B)}


SCORED: dict[str, tuple[Callable[[], fs.Scorer], Callable[[], dict[str, Any]], tuple[Level, ...], int]] = {
    "function": (lambda: fs.FunctionScorer(lambda batch: batch["flow_loss"]), scored_rows, ("sample",), B),
    "prescored": (fs.Prescored, scored_rows, ("sample",), B),
    "classifier of images": (lambda: fs.ClassifierScorer(build("vit")), images, ("sample",), B),
    "classifier of texts": (lambda: fs.ClassifierScorer(build("bert")), labelled_text, ("sample",), B),
    "causal": (lambda: fs.CausalLMScorer(build("llama")), text, ("sample", "token"), B),
    "causal, packed": (lambda: fs.CausalLMScorer(build("llama")), packed_text, ("sample", "token"), 2 * B),
    "causal, as it is": (lambda: fs.CausalLMScorer(build("gpt2")), typed_text, ("sample", "token"), B),
    "seq2seq": (lambda: fs.Seq2SeqLMScorer(build("t5")), pair_of_texts, ("sample", "token"), B),
    "seq2seq, as it is": (lambda: fs.Seq2SeqLMScorer(build("bart")), pair_with_embeddings, ("sample", "token"), B),
}


def scores_of(scorer: fs.Scorer, batch: Any, level: Level) -> Scores:
    job = scorer.begin([batch], level=level, cache=None, row_keys=None, needs_loss=False)
    assert job.num_steps == 0
    (scores,) = job.finish()
    return scores


def zeros_for(scores: Scores, level: Level) -> Tensor:
    """Weights of 0, as the stream would shape those of this batch."""
    return place(torch.zeros(flatten([scores], level).sizes[0]), scores, level)


@pytest.mark.parametrize("name", SCORED)
def test_scorers_read_it_as_a_batch_of_the_same_samples_without_labels(name):
    make, batch, levels, num_samples = SCORED[name]
    scorer = make()
    for level in levels:
        real, scores = (scores_of(scorer, found, level) for found in (batch(), ignored(batch())))
        assert torch.equal(scores.loss, torch.zeros(num_samples))
        assert num_rows(scores) == B
        assert (scores.segment is None) == (real.segment is None)
        if scores.segment is not None:
            assert torch.equal(scores.segment, real.segment)
        if level == "token":
            assert scores.token_mask.shape == batch()["labels"].shape
            assert not scores.token_mask.any()
        expected = zeros_for(real, level)
        assert torch.equal(zeros_for(scores, level), expected)
        assert expected.shape in (batch()["labels"].shape[:1], batch()["labels"].shape)
        # A function does not say what is labelled: whoever counts must know that this batch counts for nothing.
        assert scores.count.tolist() == [int(name in ("function", "prescored"))] * num_samples


def test_where_nothing_can_be_ignored_scorers_count_it_and_its_weights_still_fit():
    ids = {"input_ids": token_ids()}
    soft = {"pixel_values": images()["pixel_values"], "labels": torch.full((B, 5), 0.2)}
    cases: list[tuple[fs.Scorer, Any, list[Level]]] = [
        (fs.CausalLMScorer(build("llama")), ids, ["sample", "token"]),
        (fs.ClassifierScorer(build("vit")), soft, ["sample"]),
    ]
    for scorer, batch, levels in cases:
        for level in levels:
            scores = scores_of(scorer, ignored(batch), level)
            assert scores.count.min() > 0
            weight = zeros_for(scores, level)
            assert weight.shape == ((B, T) if level == "token" else (B,))
            assert not weight.any()


@pytest.mark.parametrize("name", LABEL_NAMES)
def test_the_names_of_labels_are_those_that_a_classifier_reads(name):
    batch = {"pixel_values": images()["pixel_values"], name: images()["labels"]}
    assert not scores_of(fs.ClassifierScorer(build("vit")), ignored(batch), "sample").count.any()
