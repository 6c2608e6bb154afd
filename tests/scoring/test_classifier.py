"""Losses of classifiers, against each sample alone in a plain loop."""

from __future__ import annotations

import copy
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowstream.scoring.classifier import ClassifierScorer
from flowstream.scoring.memory_cache import MemoryCache

LENGTHS = (5, 11, 2, 8)


def score(scorer: ClassifierScorer, *batches: Any, **kwargs: Any) -> list[Any]:
    return scorer.begin(batches, level="sample", **kwargs).finish()


class ResNetish(nn.Module):
    """A convolution, a normalisation that must not learn from scoring, and dropout that must not act."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Any:
        return self.head(self.dropout(self.norm(self.conv(image)).relu().mean((2, 3))))


@pytest.fixture
def resnet() -> ResNetish:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNetish()
        model(torch.randn(16, 3, 16, 16))
    return model.train()


def images(num: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 3, 16, 16, generator=generator), torch.arange(num) % 5


def alone(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """[B] losses, sample by sample."""
    model = copy.deepcopy(model).eval()
    losses = []
    for row, target in zip(x, y, strict=True):
        with torch.no_grad():
            output = model(row[None])
        logits = getattr(output, "logits", output)
        losses.append(F.cross_entropy(logits.float(), target[None]))
    return torch.stack(losses)


# Images


@pytest.mark.parametrize("sharing", ["auto", True, False])
def test_a_plain_module_in_train_mode_is_scored_in_eval_mode_and_stays_untouched(
    resnet: ResNetish, sharing: Any
) -> None:
    x, y = images()
    before = copy.deepcopy(resnet.state_dict())
    rng = torch.get_rng_state()
    scorer = ClassifierScorer(resnet, copy=sharing)
    (scores,) = score(scorer, (x, y))
    torch.testing.assert_close(scores.loss, alone(resnet, x, y))
    assert scores.count.tolist() == [1] * 6
    assert scores.segment is None
    assert all(module.training for module in resnet.modules())
    assert all(parameter.requires_grad for parameter in resnet.parameters())
    assert all(before[name].equal(value) for name, value in resnet.state_dict().items())
    assert torch.get_rng_state().equal(rng)
    scorer.check()


Named = namedtuple("Named", ["image", "target"])
FORMS: dict[str, Any] = {
    "list": lambda x, y: [x, y],
    "mapping": lambda x, y: {"image": x, "labels": y, "__key__": ["a"] * 6, "id": torch.arange(6)},
    "one other array": lambda x, y: {"picture": x, "label": y, "__key__": ["a"] * 6},
    "namedtuple": Named,
    "mapping and labels": lambda x, y: ({"image": x}, y),
    "numpy": lambda x, y: (x.numpy(), y.numpy()),
    "read-only": lambda x, y: (np.broadcast_to(x.numpy(), x.shape), y.numpy().astype(np.int32)),
    "double": lambda x, y: (x.double(), y.to(torch.uint8)),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_form(resnet: ResNetish, form: str) -> None:
    x, y = images()
    expected, found = score(ClassifierScorer(resnet), (x, y), FORMS[form](x, y))
    torch.testing.assert_close(found.loss, expected.loss)


def test_image_models_of_transformers(tiny: Any) -> None:
    model, (x, y) = tiny("vit"), images()
    (pair, mapping) = score(ClassifierScorer(model, token_budget=3), (x, y), {"pixel_values": x, "labels": y})
    torch.testing.assert_close(pair.loss, alone(model, x, y))
    torch.testing.assert_close(mapping.loss, pair.loss)


def test_rows_of_a_window_share_micro_batches_and_shapes_do_not_mix(resnet: ResNetish) -> None:
    scorer = ClassifierScorer(resnet, token_budget=8)  # a token for an image of 16 x 16
    small, large = images(), (torch.randn(3, 3, 32, 32), torch.arange(3))
    job = scorer.begin([small, large, images(seed=1)], level="sample")
    assert job.num_steps == 2 + 2
    for scores, (x, y) in zip(job.finish(), (small, large, images(seed=1)), strict=True):
        torch.testing.assert_close(scores.loss, alone(resnet, x, y))
    assert job.cost.num_tokens == job.cost.num_padded == 15


def test_no_label_is_empty(resnet: ResNetish) -> None:
    x, y = images()
    y[2] = -100
    (scores,) = score(ClassifierScorer(resnet), (x, y))
    assert scores.count.tolist() == [1, 1, 0, 1, 1, 1]
    assert scores.loss[2] == 0
    (zeros,) = score(ClassifierScorer(resnet), (x, y), needs_loss=False)
    assert zeros.count.equal(scores.count)
    assert not zeros.loss.any()


def test_soft_targets(resnet: ResNetish) -> None:
    x, y = images()
    soft = torch.full((6, 5), 0.02) + 0.9 * F.one_hot(y, 5)
    (scores,) = score(ClassifierScorer(resnet), (x, soft))
    torch.testing.assert_close(scores.loss, alone(resnet, x, soft))
    hard, onehot, half = score(ClassifierScorer(resnet), (x, y), (x, F.one_hot(y, 5).float()), (x, soft.bfloat16()))
    torch.testing.assert_close(hard.loss, onehot.loss)
    torch.testing.assert_close(half.loss, scores.loss, rtol=1e-2, atol=1e-2)


def test_a_bf16_reference_takes_fp32_images(resnet: ResNetish) -> None:
    x, y = images()
    (scores,) = score(ClassifierScorer(resnet.bfloat16()), (x, y))
    torch.testing.assert_close(scores.loss, alone(resnet, x.bfloat16(), y), rtol=1e-2, atol=1e-2)


def test_the_callers_autocast_does_not_leak_in(resnet: ResNetish) -> None:
    (expected,) = score(ClassifierScorer(resnet), images())
    for context in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
        with context:
            (scores,) = score(ClassifierScorer(resnet), images())
        assert scores.loss.equal(expected.loss)
        assert not scores.loss.is_inference()


def test_cached_by_content_or_by_name(resnet: ResNetish) -> None:
    scorer, cache, (x, y) = ClassifierScorer(resnet), MemoryCache(), images()
    (plain,) = score(scorer, (x, y))
    (first,) = score(scorer, (x, y), cache=cache)
    assert first.loss.equal(plain.loss)
    job = scorer.begin([(x.flip(0), y.flip(0)), (x, y.roll(2))], level="sample", cache=cache)
    again, _ = job.finish()
    assert job.cost.num_hits == 6
    assert again.loss.equal(first.loss.flip(0))
    names = [[f"{i}.jpg" for i in range(6)]]
    (named,) = score(scorer, (x, y), cache=cache, row_keys=names)
    (augmented,) = score(scorer, (x + 1, y), cache=cache, row_keys=names)
    assert augmented.loss.equal(named.loss)
    with pytest.raises(ValueError, match="1 cache keys for 6 rows"):
        score(scorer, (x, y), cache=cache, row_keys=[["a"]])


def test_running_out_of_memory_halves_the_budget(resnet: ResNetish) -> None:
    def bounded(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("full")

    x, y = images(16)
    (expected,) = score(ClassifierScorer(resnet), (x, y))
    resnet.register_forward_pre_hook(bounded)
    scorer = ClassifierScorer(resnet, token_budget=100)
    (scores,) = score(scorer, (x, y))
    torch.testing.assert_close(scores.loss, expected.loss)
    assert scorer.state_dict()["token_budget"] <= 2


# Text


def texts(side: str, pad: int = 0) -> tuple[dict[str, Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 97, (n,), generator=generator) for n in LENGTHS]
    width = max(LENGTHS) + 1
    batch = {"input_ids": torch.full((4, width), pad), "attention_mask": torch.zeros(4, width, dtype=torch.long)}
    for row, ids in enumerate(rows):
        where = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        batch["input_ids"][row, where], batch["attention_mask"][row, where] = ids, 1
    return batch | {"labels": torch.tensor([0, 2, 1, 2])}, rows


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "overrides"), [("bert", {}), ("llama_classifier", {}), ("llama_classifier", {"pad_token_id": None})]
)
def test_texts_score_as_if_alone(tiny: Any, name: str, overrides: dict[str, Any], side: str) -> None:
    model, (batch, rows) = tiny(name, **overrides), texts(side)
    batch |= {"text": ["a"] * 4, "id": torch.arange(4)}
    (scores,) = score(ClassifierScorer(model, token_budget=24), batch)
    expected = torch.cat([alone(model, ids[None], y[None]) for ids, y in zip(rows, batch["labels"], strict=True)])
    torch.testing.assert_close(scores.loss, expected, rtol=1e-4, atol=2e-5)


def test_token_types_go_with_their_tokens(tiny: Any) -> None:
    model, (batch, rows) = tiny("bert"), texts("left")
    batch["token_type_ids"] = batch["input_ids"] % 2
    (scores,) = score(ClassifierScorer(model), batch)
    for row, ids in enumerate(rows):
        logits = model(input_ids=ids[None], token_type_ids=ids[None] % 2).logits
        expected = F.cross_entropy(logits, batch["labels"][row, None]).item()
        assert scores.loss[row].item() == pytest.approx(expected, abs=2e-5)


def test_text_modules_without_a_mask_get_rows_as_they_are() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(97, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.bag(input_ids)

    model, (batch, _) = Bag(), texts("right")
    (scores,) = score(ClassifierScorer(model), batch)
    torch.testing.assert_close(scores.loss, alone(model, batch["input_ids"], batch["labels"]))


def test_several_labels_a_sample(tiny: Any) -> None:
    model, (batch, rows) = tiny("bert", problem_type="multi_label_classification"), texts("right")
    batch["labels"] = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    (scores,) = score(ClassifierScorer(model), batch)
    for row, ids in enumerate(rows):
        expected = model(input_ids=ids[None], labels=batch["labels"][row, None]).loss.item()
        assert scores.loss[row].item() == pytest.approx(expected, abs=2e-5)


# What is refused

X, Y = images(3)
BAD: dict[str, tuple[Any, str]] = {
    "no labels": (X, r"batch 1 of the window is a Tensor of 1: a classifier takes \(x, labels\)"),
    "triple": ((X, Y, Y), r"tuple of 3: .* FunctionScorer"),
    "mapping without labels": ({"image": X}, r"no labels \(labels, label, targets, target\), only \['image'\]"),
    "unknown keys": (
        {"a": X, "b": X, "labels": Y},
        r"fields \['a', 'b'\], and the forward of the reference takes \['image'\]",
    ),
    "a list of images": (([1, 2, 3], Y), "the inputs of batch 1 of the window are a list: stack them"),
    "other rows": ((X[:2], Y), r"x of batch 1 of the window has shape \[2, 3, 16, 16\] beside 3 labels"),
    "regression": ((X, Y.float()), r"labels .* shape \[3\] and torch.float32: .*regression write FunctionScorer"),
    "segmentation": ((X, Y[:, None, None]), r"shape \[3, 1, 1\] and torch.int64"),
    "column": ((X, Y[:, None]), r"shape \[3, 1\] and torch.int64"),
    "negative": ((X, Y - 1), r"the label of batch 1 of the window, row 0 is -1"),
    "several labels": ((X, torch.ones(3, 5)), r"row 0 lie between 1 and 1 and sum to 5: .*problem_type"),
    "logits as labels": ((X, torch.randn(3, 5) * 9), "soft targets are distributions"),
    "label list": ((X, [0, 1, 2]), "labels of batch 1 of the window are a list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_runs(resnet: ResNetish, case: str) -> None:
    batch, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        ClassifierScorer(resnet).begin([(X, Y), batch], level="sample")


def test_a_class_that_the_reference_lacks_is_refused(tiny: Any, resnet: ResNetish) -> None:
    with pytest.raises(ValueError, match="row 2 is 7, and the reference has 5 classes"):
        ClassifierScorer(tiny("vit")).begin([(X, torch.tensor([0, 1, 7]))], level="sample")
    with pytest.raises(ValueError, match="is 7, and the reference has 5 classes"):
        score(ClassifierScorer(resnet), (X, torch.tensor([0, 1, 7])))
    with pytest.raises(ValueError, match=r"shape \[3, 4\], and the reference 5 classes"):
        score(ClassifierScorer(tiny("vit")), (X, torch.full((3, 4), 0.25)))
    with pytest.raises(ValueError, match=r"logits of shape \[3, 5\] for 3 samples with targets of shape \[4\]"):
        score(ClassifierScorer(resnet), (X, torch.full((3, 4), 0.25)))


def test_regressions_and_token_losses_are_refused(tiny: Any, resnet: ResNetish) -> None:
    with pytest.raises(ValueError, match=r"regression \(config.problem_type\): write FunctionScorer"):
        ClassifierScorer(tiny("bert", problem_type="regression"))
    with pytest.raises(ValueError, match="a single output"):
        ClassifierScorer(tiny("bert", num_labels=1))
    with pytest.raises(ValueError, match="a single output"):
        score(ClassifierScorer(nn.Sequential(nn.Flatten(), nn.Linear(768, 1))), (X, Y))
    with pytest.raises(ValueError, match="one loss a sample"):
        ClassifierScorer(resnet).begin([(X, Y)], level="token")
    with pytest.raises(ValueError, match="without logits"):
        score(ClassifierScorer(type("Odd", (nn.Module,), {"forward": lambda self, x: {"a": x}})()), (X, Y))


def test_texts_are_checked(tiny: Any) -> None:
    scorer, (batch, _) = ClassifierScorer(tiny("bert").requires_grad_(False)), texts("right")
    with pytest.raises(ValueError, match="has the id 100 at position"):
        score(scorer, batch | {"input_ids": batch["input_ids"].clamp(max=0) + 100})
    with pytest.raises(ValueError, match="row 0 has no token"):
        score(scorer, batch | {"attention_mask": batch["attention_mask"] * 0})
    with pytest.raises(ValueError, match="row 0 has 80 tokens, and the reference positions for 64"):
        score(scorer, {"input_ids": torch.full((2, 80), 5), "labels": torch.zeros(2).long()})


@pytest.mark.parametrize(("name", "is_image"), [("bert", False), ("vit", True)])
def test_from_pretrained_loads_a_frozen_model(tiny: Any, tmp_path: Any, name: str, is_image: bool) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path)
    scorer = ClassifierScorer.from_pretrained(str(tmp_path), images=is_image)
    batch = images(3) if is_image else texts("left")[0]
    assert score(scorer, batch)[0].loss.equal(score(ClassifierScorer(model), batch)[0].loss)
    assert scorer.fingerprint() == ClassifierScorer(model).fingerprint()
    scorer.load_state_dict(scorer.state_dict())


def test_names_that_begin_anew_in_each_shard_are_told_of_and_labels_keep_them_apart(
    resnet: ResNetish, caplog: pytest.LogCaptureFixture
) -> None:
    scorer, cache = ClassifierScorer(resnet), MemoryCache()
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    names = [["0", "1", "2", "0", "1", "2"]]

    def losses(labels: Tensor) -> Tensor:
        job = scorer.begin([(images, labels)], level="sample", cache=cache, row_keys=names)
        return job.finish()[0].loss

    apart = losses(torch.tensor([0, 1, 2, 3, 4, 3]))
    assert "gives 6 samples of a window 3 names" in caplog.text
    (alone,) = scorer.begin([(images, torch.tensor([0, 1, 2, 3, 4, 3]))], level="sample").finish()
    torch.testing.assert_close(apart, alone.loss)
    again = losses(torch.tensor([1, 1, 2, 3, 4, 3]))  # labelled anew
    assert again[0] != apart[0]
    assert torch.equal(again[1:], apart[1:])
    assert caplog.text.count("names: samples of one name") == 1
