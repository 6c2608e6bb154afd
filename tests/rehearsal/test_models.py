"""Rehearsal with real models: the prior model is asked once, the tuned one no more than it is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rehearsals import is_rehearsed
from texts import make_samples
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import flowstream as fs
from flowstream.rehearsal import Rehearsal


class Counted:
    """Counts the tokens that a language model reads, padding included: a pass an entry."""

    def __init__(self, model: nn.Module) -> None:
        self.tokens: list[int] = []
        model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, _: nn.Module, args: Any, __: Any) -> None:
        self.tokens.append(args[0].numel())


def texts_of(num: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = tuple(torch.randint(3, 14, (num,), generator=generator).tolist())
    return make_samples(lengths, seed)


def padded(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    ids, labels = zip(*samples, strict=True)
    pad = nn.utils.rnn.pad_sequence
    mask = [torch.ones_like(one) for one in ids]
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad(mask, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def packed(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    ids, labels = zip(*samples, strict=True)
    positions = [torch.arange(len(one)) for one in ids]
    columns = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.cat(list(column))[None] for name, column in columns.items()}


def right_alone(model: nn.Module, ids: Tensor, labels: Tensor, threshold: float) -> bool:
    with torch.no_grad():
        likeliest = model(input_ids=ids[None]).logits[0].argmax(-1)
    hits = [bool(likeliest[t - 1] == labels[t]) for t in range(1, len(ids)) if labels[t] != -100]
    return bool(hits) and sum(hits) / len(hits) >= threshold


@pytest.fixture(scope="module")
def knowing(tiny):
    """A tiny Llama that has learned some of the prior texts by heart, and those texts."""
    torch.manual_seed(0)
    model, prior = tiny("llama"), texts_of(40, 1)
    batch = padded(prior[:20])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval(), prior


def test_the_prior_model_is_asked_once(knowing, tmp_path):
    model, prior = knowing
    scorer = fs.CausalLMScorer(model)
    counted = Counted(scorer._reference.model)
    loader = [padded(texts_of(8, seed)) for seed in range(10, 16)]

    def passed(rehearsal: Rehearsal) -> Any:
        counted.tokens.clear()
        stream = fs.FlowStream(loader, scorer, rehearsal=rehearsal, cache=None, policy=fs.Uniform())
        next(iter(stream))
        assert stream.rehearsal is not None
        return stream.rehearsal.prior, sum(counted.tokens)

    def new() -> Rehearsal:
        return Rehearsal(prior, scorer, bins=4, collate_fn=padded, cache=tmp_path / "asked", threshold=0.4)

    first = new()
    asked, num = passed(first)
    answers = sum(padded(prior[i : i + 8])["labels"].numel() for i in range(0, 40, 8))
    losses_alone = sum(len(ids) for ids, _ in prior)
    assert answers < num <= answers + losses_alone
    expected = [right_alone(scorer._reference.model, *sample, 0.4) for sample in prior]
    assert asked.was_correct.tolist() == expected
    assert 10 < sum(expected) < 35
    losses = scorer.begin([padded(prior)], level="sample").finish()[0].loss
    assert torch.allclose(torch.from_numpy(asked.loss), losses, atol=1e-5)
    assert asked.width.tolist() == [len(ids) for ids, _ in prior]
    for again in (first, new()):
        found, num = passed(again)
        assert num == 0
        assert (found.bins.of == asked.bins.of).all()
        assert (found.was_correct == asked.was_correct).all()
    other = Rehearsal(prior, scorer, bins=4, collate_fn=padded, cache=tmp_path / "asked", threshold=0.9)
    assert passed(other)[1] > 0  # another question
    for file in (tmp_path / "asked").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert passed(new())[1] > 0  # damaged files are no answer


@pytest.mark.parametrize("collate", [padded, packed])
@pytest.mark.parametrize("level", ["sample", "token"])
def test_training_a_language_model(knowing, tiny, collate, level):
    """No pass of the tuned model but its training's; feedback from logits; a share counted in padded tokens."""
    model, prior = knowing
    scorer = fs.CausalLMScorer(model)
    tuned = tiny("llama")
    tuned.load_state_dict(model.state_dict())
    counted = Counted(tuned)
    loader = [collate(texts_of(8, seed)) for seed in range(10, 30)]
    rehearsal = Rehearsal(prior, scorer, bins=3, ratio=0.4, collate_fn=collate, threshold=0.4, half_life=None)
    policy: Any = fs.Threshold(max_loss=9.0)
    stream = fs.FlowStream(
        loader, scorer, rehearsal=rehearsal, window=4, level=level, policy=policy, include=("denominator",)
    )
    cost = {True: 0, False: 0}
    largest, tokens = max(batch["labels"].numel() for batch in loader), []
    num = 0
    for batch in stream:
        rehearsed, weight = batch.pop("flow_rehearsed"), batch.pop("flow_weight")
        denominator, labels = batch.pop("flow_denominator"), batch.pop("labels")
        is_prior = bool((rehearsed >= 0).any())
        cost[is_prior] += labels.numel()
        tokens.append(labels.numel())
        if is_prior:
            assert labels.numel() <= largest
            assert set(weight.flatten().tolist()) <= {0.0, 1.0}
        else:
            assert (rehearsed == -1).all()
        assert denominator == (labels[:, 1:] != -100).sum()
        assert weight.shape == (labels.shape if level == "token" or collate is packed else labels.shape[:1])
        with torch.no_grad():
            logits = tuned(**batch, use_cache=False).logits
        if not is_prior:
            stream.feedback(rehearsed)
            continue
        assert torch.isfinite(fs.weighted_lm_loss(logits, labels, weight, denominator=denominator))
        stream.feedback(rehearsed, logits=logits, labels=labels)
        which = dict.fromkeys(rehearsed[rehearsed >= 0].tolist())
        num += len(rehearsed) if rehearsed.ndim == 1 else len(which)
    assert counted.tokens == tokens
    # The tuned model is the prior model still: nothing is damaged.
    next(iter(stream))
    assert stream.rehearsal is not None
    assert stream.rehearsal.counts().sum() == num > 50
    assert stream.rehearsal.rates() * (2 + stream.rehearsal.counts()) == pytest.approx([1] * 3)
    late = cost[False] * 0.4 / 0.6 - cost[True]
    assert abs(late) <= 2 * largest
    stream.close()


def test_training_a_classifier_with_soft_labels_and_batchnorm():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(60, 1, 6, 6)
    y = net.eval()(x).argmax(-1).detach()  # all right at first
    y[:6] = (y[:6] + 1) % 3
    soft = nn.functional.one_hot(y, 3).float() * 0.8 + 0.2 / 3
    scorer = fs.ClassifierScorer(net)
    before = {name: value.clone() for name, value in scorer._reference.model.state_dict().items()}
    rehearsal = Rehearsal(TensorDataset(x, soft), scorer, bins=2, ratio=0.5, criterion="class")
    loader = DataLoader(TensorDataset(torch.randn(80, 1, 6, 6), soft[:1].expand(80, 3)), batch_size=8)
    net.train()
    with fs.FlowStream(loader, scorer, rehearsal=rehearsal, window=2, temperature=fs.FixedTemperature(1.0)) as stream:
        for images, labels, weight, rehearsed in stream:
            logits = net(images)
            fs.weighted_cross_entropy(logits, labels, weight).backward()
            stream.feedback(rehearsed, logits=-logits, labels=labels)  # as if all were wrong now
        next(iter(stream))
        assert stream.rehearsal is not None
        assert stream.rehearsal.prior.was_correct.tolist() == [False] * 6 + [True] * 54
        assert stream.rehearsal.counts().sum() > 60
        assert stream.rehearsal.rates().min() > 0.3
    for name, value in scorer._reference.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_frozen_model_reads_the_prior_data_twice_and_what_is_rehearsed_no_more():
    torch.manual_seed(0)
    scorer = fs.ClassifierScorer(nn.Linear(4, 3))
    rows: list[int] = []
    scorer._reference.model.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    prior = TensorDataset(torch.randn(30, 4), torch.arange(30) % 3)
    loader = DataLoader(TensorDataset(torch.randn(80, 4), torch.arange(80) % 3), batch_size=8)
    rehearsal = Rehearsal(prior, scorer, bins=2, ratio=0.5, criterion="class")
    with fs.FlowStream(loader, scorer, rehearsal=rehearsal, window=2, cache=None) as stream:
        num = sum(int((rehearsed >= 0).sum()) for *_, rehearsed in stream)
    assert num > 60
    assert sum(rows) == 80 + 2 * 30  # the prior's losses, then its answers


def test_an_encoder_decoder(tiny):
    model = tiny("t5")
    scorer = fs.Seq2SeqLMScorer(model)
    pairs = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(3, 9)}
        for ids in torch.randint(3, 90, (12, 7), generator=torch.Generator().manual_seed(0))
    ]
    rehearsal = Rehearsal(pairs, scorer, bins=2, threshold=0.01, ratio=0.5)
    stream = fs.FlowStream([default_collate(pairs[:4])] * 4, scorer, rehearsal=rehearsal)
    batch = next(batch for batch in stream if is_rehearsed(batch))
    assert stream.rehearsal is not None
    with torch.no_grad():
        likeliest = model(**default_collate(pairs)).logits.argmax(-1)
    expected = (likeliest == default_collate(pairs)["labels"]).any(1)
    assert stream.rehearsal.prior.was_correct.tolist() == expected.tolist()
    stream.feedback(batch, logits=torch.zeros(*batch["labels"].shape, 97))
