"""Mixed batches before the stream, against mixing by hand; and the frozen loss of what is trained on."""

from __future__ import annotations

import copy
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

import flowstream as fs
from flowstream.companions.mixup import mixup

NUM, CLASSES = 24, 3


def rows(num: int = NUM) -> TensorDataset:
    draws = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(num, 2, 6, 6, generator=draws), torch.arange(num) % CLASSES)


def batch(num: int = 8) -> tuple[Tensor, Tensor]:
    images, labels = rows().tensors
    return images[:num], labels[:num]


def small() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(72, CLASSES))


def shares(x: Tensor, mixed: Tensor) -> tuple[float, list[int]]:
    """λ and each row's partner, found from the images alone: x̃ - x' is λ(x - x')."""
    solved = torch.linalg.lstsq(x.flatten(1).T, mixed.flatten(1).T).solution.T  # rows of coefficients
    partners = []
    for i, row in enumerate(solved):
        rest = row.clone()
        rest[i] = 0
        partners.append(int(rest.abs().argmax()) if rest.abs().max() > 1e-3 else i)
    moved = [i for i, j in enumerate(partners) if i != j]
    return float(solved[moved[0], moved[0]]), partners


def test_images_and_labels_are_mixed_alike() -> None:
    x, y = batch()
    mixed, soft = mixup((x, y), alpha=0.8, num_classes=CLASSES)
    share, partners = shares(x, mixed)
    assert 0 < share < 1
    assert sorted(partners) == list(range(8))
    onehot = F.one_hot(y, CLASSES).float()
    torch.testing.assert_close(mixed, share * x + (1 - share) * x[partners], rtol=0, atol=1e-5)
    torch.testing.assert_close(soft, share * onehot + (1 - share) * onehot[partners], rtol=0, atol=1e-5)
    assert soft.dtype == torch.float32


def test_cutmix_cuts_a_box_and_counts_its_pixels() -> None:
    (x, _), y = batch(), torch.arange(8)
    num_cut = 0
    for seed in range(8):
        mixed, soft = mixup((x, y), alpha=1.0, num_classes=8, cutmix=True, seed=seed)
        for i in range(8):
            cut = (mixed[i] != x[i]).any(0)  # [H, W]: which pixels are another image's
            num = int(cut.sum())
            assert num == int(cut.any(0).sum() * cut.any(1).sum())  # a box
            assert float(soft[i, i]) == pytest.approx(1 - num / 36)
            if num:
                other = int((soft[i] * (y != i)).argmax())
                assert torch.equal(mixed[i][:, cut], x[other][:, cut])
                num_cut += 1
    assert num_cut > 20


Named = namedtuple("Named", ["image", "target"])
FORMS: dict[str, Any] = {
    "list": lambda x, y: [x, y],
    "mapping": lambda x, y: {"image": x, "labels": y, "__key__": ["a"] * 8, "id": torch.arange(8)},
    "namedtuple": Named,
    "mapping and labels": lambda x, y: ({"pixel_values": x, "mask": torch.ones(8, 3).long()}, y),
    "soft already": lambda x, y: (x, F.one_hot(y, CLASSES).double()),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_form_keep_it(form: str) -> None:
    given = FORMS[form](*batch())
    before = copy.deepcopy(given)
    generator = torch.Generator().manual_seed(3)
    expected = mixup(batch(), alpha=0.5, num_classes=CLASSES, generator=generator)
    found = mixup(given, alpha=0.5, num_classes=CLASSES, generator=torch.Generator().manual_seed(3))
    assert type(found) is type(given)
    assert str(given) == str(before)
    values = list(found.values()) if isinstance(found, dict) else list(found)
    image = values[0]["pixel_values"] if isinstance(values[0], dict) else values[0]
    torch.testing.assert_close(image, expected[0])
    torch.testing.assert_close(values[1], expected[1])
    if form == "mapping":
        assert found["__key__"] == ["a"] * 8
        assert found["id"].equal(torch.arange(8))


def test_the_draw_follows_from_the_seed_and_the_batch_or_from_the_generator() -> None:
    def one(num: int = 8, **options: Any) -> Tensor:
        return mixup(batch(num), **({"alpha": 1.0, "num_classes": CLASSES} | options))[0]

    torch.manual_seed(0)
    first = one()
    torch.manual_seed(1)
    assert one().equal(first)
    assert not one(seed=1).equal(first)
    assert not one(7).equal(first[:7])
    draws = [torch.Generator().manual_seed(5) for _ in range(2)]
    pairs = [(one(generator=draws[0]), one(generator=draws[1])) for _ in range(3)]
    assert all(a.equal(b) for a, b in pairs)
    assert not pairs[0][0].equal(pairs[1][0])


@pytest.mark.parametrize("kind", ["mixup", "cutmix", "torchvision's rule", "torchvision"])
def test_what_is_scored_is_what_is_trained_on(kind: str) -> None:
    def mix(samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        if kind == "torchvision":
            pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
            return pytest.importorskip("torchvision.transforms.v2").MixUp(alpha=0.4, num_classes=CLASSES)(x, y)
        if kind == "torchvision's rule":  # one λ, and the neighbour as the partner
            onehot = F.one_hot(y, CLASSES).float()
            return 0.7 * x + 0.3 * x.roll(1, 0), 0.7 * onehot + 0.3 * onehot.roll(1, 0)
        return mixup((x, y), alpha=0.4, num_classes=CLASSES, cutmix=kind == "cutmix")

    model = small()
    loader = DataLoader(rows(), batch_size=8, collate_fn=mix)
    stream = fs.FlowStream(loader, fs.ClassifierScorer(model), temperature=fs.FixedTemperature(0.9), include=("loss",))
    for _ in range(2):  # an epoch's mixtures are scored anew where they differ
        for x, soft, weight, loss in stream:
            frozen = -(soft * model(x).log_softmax(1)).sum(1)
            torch.testing.assert_close(loss, frozen.detach(), rtol=0, atol=1e-5)
            torch.testing.assert_close(weight, torch.exp(-frozen.detach() / 0.9), rtol=0, atol=1e-5)
            own = fs.weighted_cross_entropy(model(x), soft, weight)
            torch.testing.assert_close(own, (weight * frozen).mean())


def test_a_resumed_stream_gives_the_same_mixtures() -> None:
    def stream() -> fs.FlowStream:
        loader = DataLoader(
            rows(), batch_size=4, collate_fn=lambda s: mixup(default_collate(s), alpha=0.4, num_classes=CLASSES)
        )
        return fs.FlowStream(loader, fs.ClassifierScorer(small()))

    whole, half = list(stream()), stream()
    batches = iter(half)
    for _ in range(2):
        next(batches)
    resumed = stream()
    resumed.load_state_dict(half.state_dict())
    for found, expected in zip(resumed, whole[2:], strict=True):
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


class Augmented(torch.utils.data.Dataset[Any]):
    """Images with noise that is another in each epoch."""

    def __init__(self) -> None:
        self.noise = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> Any:
        image, label = rows()[index]
        noisy = image + torch.randn(image.shape, generator=self.noise)
        return {"image": noisy, "labels": label, "__key__": str(index)}


@pytest.mark.parametrize("cache_key", ["__key__", None])
def test_an_augmented_image_keeps_the_weight_of_its_first_epoch_where_it_has_a_name(cache_key: str | None) -> None:
    model = small()
    loader = DataLoader(Augmented(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0))
    stream = fs.FlowStream(
        loader, fs.ClassifierScorer(model), temperature=fs.FixedTemperature(1.0), cache_key=cache_key, include=("loss",)
    )
    epochs: list[dict[str, float]] = []
    images: list[dict[str, Tensor]] = []
    for _ in range(2):
        losses, seen = {}, {}
        for found in stream:
            losses |= dict(zip(found["__key__"], found["flow_loss"].tolist(), strict=True))
            seen |= dict(zip(found["__key__"], found["image"], strict=True))
            if not epochs or cache_key is None:  # scored as it came
                own = F.cross_entropy(model(found["image"]), found["labels"], reduction="none")
                torch.testing.assert_close(found["flow_loss"], own.detach(), rtol=0, atol=1e-5)
        epochs.append(losses)
        images.append(seen)
    assert len(epochs[0]) == NUM
    assert not any(images[0][name].equal(images[1][name]) for name in images[0])
    assert (epochs[0] == epochs[1]) == (cache_key is not None)


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "alpha": (batch(), {"alpha": 0.0}, r"mixup\(alpha=0.0\): give a finite number above 0"),
    "bare": (batch()[0], {}, r"mixup got a Tensor of \[\]: it takes \(x, labels\)"),
    "no labels": ({"image": batch()[0]}, {}, r"a dict of \['image'\]: it takes one of labels"),
    "bytes": ((batch()[0].to(torch.uint8), batch()[1]), {}, "0 is uint8, and mixtures of bytes would be rounded"),
    "nothing": (({"id": batch()[1]}, batch()[1]), {}, "no floating tensor of 8 rows to mix"),
    "classes": (batch(), {"num_classes": 2}, "labels from 0 to 2, and there are 2 classes"),
    "ignored": ((batch()[0], batch()[1] - 100), {}, "leave out samples without a label"),
    "soft": ((batch()[0], torch.ones(8, 2)), {}, r"soft labels of shape \[8, 2\]: give \[B, 3\]"),
    "columns": ((batch()[0], batch()[1][:, None]), {}, r"labels of shape \[8, 1\]: give classes \[B\]"),
    "flat": ((torch.randn(8, 5), batch()[1]), {"cutmix": True}, r"cutmix cuts images \[B, …, H, W\], and 0 has shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    given, options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        mixup(given, **({"alpha": 0.2, "num_classes": CLASSES} | options))
