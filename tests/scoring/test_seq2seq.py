"""Losses of encoder-decoder models, against each sample alone, unpadded, in a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flowstream.scoring.memory_cache import MemoryCache
from flowstream.scoring.seq2seq import Seq2SeqLMScorer

SIZES = ((5, 3), (9, 7), (2, 1), (7, 4))
FAMILIES = ("t5", "bart")


def make_samples(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, 97, (n,), generator=generator) for n in size) for size in SIZES]  # type: ignore[misc]


def alone(model: Any, ids: Tensor, labels: Tensor, **inputs: Any) -> Tensor:
    """[U] losses of a sample without neighbours; 0 where nothing is labelled."""
    with torch.no_grad():
        inputs = inputs or {"labels": labels[None]}
        logits = model(input_ids=ids[None], use_cache=False, **inputs).logits[0].float()
    return torch.stack(
        [F.cross_entropy(row, y) if y != -100 else torch.tensor(0.0) for row, y in zip(logits, labels, strict=True)]
    )


def padded(samples: list[tuple[Tensor, Tensor]], side: str) -> dict[str, Tensor]:
    n, u = max(len(ids) for ids, _ in samples) + 1, max(len(labels) for _, labels in samples) + 1
    batch = {
        "input_ids": torch.full((len(samples), n), 1),
        "attention_mask": torch.zeros(len(samples), n, dtype=torch.long),
        "labels": torch.full((len(samples), u), -100),
    }
    for row, (ids, labels) in enumerate(samples):
        where = slice(0, len(ids)) if side == "right" else slice(n - len(ids), n)
        batch["input_ids"][row, where], batch["attention_mask"][row, where] = ids, 1
        batch["labels"][row, slice(0, len(labels)) if side == "right" else slice(u - len(labels), u)] = labels
    return batch


def score(scorer: Any, *batches: Any, **kwargs: Any) -> list[Any]:
    return scorer.begin(batches, **({"level": "sample"} | kwargs)).finish()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_scores_as_if_alone(tiny: Any, family: str, side: str) -> None:
    model, samples = tiny(family), make_samples()
    batch = padded(samples, side)
    (scores,) = score(Seq2SeqLMScorer(model, token_budget=20), batch)
    for (ids, labels), loss, count in zip(samples, scores.loss, scores.count, strict=True):
        assert count == len(labels)
        assert loss.item() == pytest.approx(alone(model, ids, labels).mean().item(), abs=2e-5)
    (tokens,) = score(Seq2SeqLMScorer(model), batch, level="token")
    assert tokens.token_mask.equal(batch["labels"] != -100)
    expected = torch.cat([alone(model, ids, labels) for ids, labels in samples])
    torch.testing.assert_close(tokens.token_loss[tokens.token_mask].float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_ignored_labels_within_a_sample_are_read_as_the_model_reads_them(tiny: Any, family: str) -> None:
    model, (ids, labels) = tiny(family), make_samples()[1]
    labels = labels.clone()
    labels[3] = -100
    (scores,) = score(Seq2SeqLMScorer(model), {"input_ids": ids[None], "labels": labels[None]})
    assert scores.count.tolist() == [6]
    assert scores.loss.item() == pytest.approx(alone(model, ids, labels).sum().item() / 6, abs=2e-5)


def test_decoder_inputs_may_be_given(tiny: Any) -> None:
    model, samples = tiny("bart"), make_samples()
    batch = padded(samples, "right")
    given = torch.randint(3, 97, batch["labels"].shape, generator=torch.Generator().manual_seed(1))
    labels = batch["labels"].clone()
    labels[1, :2] = -100  # a prompt of the decoder
    scorer = Seq2SeqLMScorer(model)
    (scores,) = score(scorer, batch | {"decoder_input_ids": given, "labels": labels})
    for row, (ids, target) in enumerate(samples):
        n = len(target)
        losses = alone(model, ids, labels[row, :n], decoder_input_ids=given[row, None, :n])
        assert scores.loss[row].item() == pytest.approx(losses.sum().item() / (losses != 0).sum().item(), abs=2e-5)
    masked, plain = score(
        scorer,
        batch
        | {
            "decoder_input_ids": given.roll(1, 1),
            "labels": labels.roll(1, 1),
            "decoder_attention_mask": (labels != -100).long().roll(1, 1),
        },
        batch | {"decoder_input_ids": given, "labels": labels, "decoder_attention_mask": (labels != -100).long()},
    )
    torch.testing.assert_close(masked.loss, plain.loss)


def test_further_inputs_are_passed_on(tiny: Any) -> None:
    model, samples = tiny("bart"), make_samples()
    batch = padded(samples, "right")
    embedded = {k: v for k, v in batch.items() if k != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])
    whole, plain = score(Seq2SeqLMScorer(model), embedded, batch, level="token")
    assert whole.token_mask.equal(plain.token_mask)
    torch.testing.assert_close(whole.token_loss, plain.token_loss, rtol=2e-3, atol=2e-3)
    whole, plain = score(Seq2SeqLMScorer(model), embedded, batch)
    torch.testing.assert_close(whole.loss, plain.loss)


def test_a_cached_loss_equals_the_one_it_came_from_to_the_bit(tiny: Any) -> None:
    model, cache = tiny("t5"), MemoryCache()
    samples = make_samples()
    first = Seq2SeqLMScorer(model).begin([padded(samples, "left")], level="token", cache=cache)
    (scores,) = first.finish()
    again = Seq2SeqLMScorer(model).begin([padded(samples, "right")], level="token", cache=cache)
    assert again.num_steps == 0
    (stored,) = again.finish()
    assert again.cost.num_hits == 4
    assert stored.loss.equal(scores.loss)
    assert stored.token_loss[stored.token_mask].equal(scores.token_loss[scores.token_mask])


def test_nothing_labelled_is_empty_and_tuples_will_do(tiny: Any) -> None:
    batch = padded(make_samples(), "right")
    batch["labels"][1] = -100
    scorer = Seq2SeqLMScorer(tiny("t5"))
    scores, pair = score(scorer, batch, ({k: v for k, v in batch.items() if k != "labels"}, batch["labels"]))
    assert scores.count.tolist() == [3, 0, 1, 4]
    assert scores.loss[1] == 0
    assert pair.loss.equal(scores.loss)
    (zeros,) = score(scorer, batch, needs_loss=False, level="token")
    assert zeros.count.equal(scores.count)
    assert not zeros.loss.any()


IDS = torch.full((2, 4), 5)
BAD: dict[str, tuple[Any, str]] = {
    "no labels": ({"input_ids": IDS}, r"batch 1 of the window has no labels, only \['input_ids'\]"),
    "no ids": ({"labels": IDS}, "has no input_ids"),
    "rows": ({"input_ids": IDS, "labels": IDS[:1]}, "2 rows of input_ids and 1 of labels"),
    "id": ({"input_ids": IDS + 95, "labels": IDS}, "row 0 has the id 100 at position 0"),
    "label": ({"input_ids": IDS, "labels": IDS - 6}, "row 0 have -1 at position 0"),
    "decoder ids": (
        {"input_ids": IDS, "labels": IDS, "decoder_input_ids": IDS - 7},
        "decoder_input_ids of batch 1 .* id -2",
    ),
    "decoder shape": ({"input_ids": IDS, "labels": IDS, "decoder_input_ids": IDS[:, :2]}, r"shape \[2, 2\] beside ids"),
    "nothing to read": (
        {"input_ids": IDS, "labels": IDS, "attention_mask": IDS * 0},
        "row 0 has labels and no token to read",
    ),
    "too long": (
        {"input_ids": IDS.repeat(1, 20), "labels": IDS},
        "row 0 has 80 tokens, and the reference positions for 64",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_runs(tiny: Any, case: str) -> None:
    batch, message = BAD[case]
    scorer = Seq2SeqLMScorer(tiny("bart").requires_grad_(False))
    with pytest.raises(ValueError, match=message):
        scorer.begin([{"input_ids": IDS, "labels": IDS}, batch], level="sample")


def test_a_causal_model_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match="no encoder-decoder model; for a causal one use CausalLMScorer"):
        Seq2SeqLMScorer(tiny("llama"))


def test_from_pretrained_loads_a_frozen_model(tiny: Any, tmp_path: Any) -> None:
    model, batch = tiny("t5"), padded(make_samples(), "right")
    model.save_pretrained(tmp_path)
    scorer = Seq2SeqLMScorer.from_pretrained(str(tmp_path))
    assert score(scorer, batch)[0].loss.equal(score(Seq2SeqLMScorer(model), batch)[0].loss)
    assert scorer.fingerprint() == Seq2SeqLMScorer(model).fingerprint()
    scorer.load_state_dict(scorer.state_dict())
    scorer.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_chunked_to_its_budget(tiny: Any, family: str) -> None:
    model, batch = tiny(family), padded(make_samples(), "right")
    whole, chunked = Seq2SeqLMScorer(model), Seq2SeqLMScorer(model, max_head_bytes=2000)
    assert whole.state_dict() == chunked.state_dict()
    torch.testing.assert_close(score(chunked, batch)[0].loss, score(whole, batch)[0].loss, rtol=1e-5, atol=1e-5)


def test_logits_are_the_models_own_where_the_head_is_not_all(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, samples = tiny("bart"), make_samples()
    Seq2SeqLMScorer(model)
    assert "by its own logits" not in caplog.text
    model.final_logits_bias.copy_(torch.linspace(-1, 1, 97)[None])  # which no configuration tells of
    (scores,) = score(Seq2SeqLMScorer(model), padded(samples, "left"))
    assert "scored by its own logits, all of them at a time: a trial is off by" in caplog.text
    for (ids, labels), loss in zip(samples, scores.loss, strict=True):
        assert loss.item() == pytest.approx(alone(model, ids, labels).mean().item(), abs=1e-5)
