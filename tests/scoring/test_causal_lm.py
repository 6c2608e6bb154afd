"""Losses of causal language models, against each sample alone, unpadded, in a plain loop."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections import UserDict, namedtuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from texts import alone, check_samples, make_samples, num_labelled, packed, padded, score
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BatchEncoding

from flowstream.scoring.causal_lm import CausalLMScorer
from flowstream.scoring.memory_cache import MemoryCache


@pytest.fixture(scope="module")
def llama(tiny: Any) -> Any:
    return tiny("llama").requires_grad_(False)


@pytest.fixture(scope="module")
def scorer(llama: Any) -> CausalLMScorer:
    return CausalLMScorer(llama, token_budget=24)


# Values


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sample_scores_as_if_alone_in_every_family(tiny: Any, causal_family: str, side: str) -> None:
    model, samples = tiny(causal_family), make_samples()
    (scores,) = score(CausalLMScorer(model, token_budget=24), padded(samples, side))
    check_samples(model, samples, scores)


def test_token_losses_stand_at_their_labels_in_every_family(tiny: Any, causal_family: str) -> None:
    model, samples = tiny(causal_family), make_samples()
    (scores,) = score(CausalLMScorer(model), padded(samples, "left"), level="token")
    assert scores.token_loss.dtype == torch.float16
    assert scores.token_loss.shape == scores.token_mask.shape == (5, 12)
    for row, (ids, labels) in enumerate(samples):
        expected = torch.zeros(12)
        expected[12 - len(ids) :] = alone(model, ids, labels)
        torch.testing.assert_close(scores.token_loss[row].float(), expected, rtol=1e-3, atol=1e-3)
        assert scores.token_mask[row].tolist() == (expected != 0).tolist()
        kept = scores.token_loss[row][scores.token_mask[row]].double()
        assert scores.loss[row] == (kept.mean().float() if len(kept) else 0)


def test_documents_of_a_pack_score_as_if_alone_in_every_family(tiny: Any, causal_family: str) -> None:
    model, samples = tiny(causal_family), make_samples((5, 6, 2, 8, 3))
    (scores,) = score(CausalLMScorer(model), packed([samples[:3], samples[3:]], 15), level="token")
    check_samples(model, samples, scores, atol=1e-3)
    assert scores.segment[0].tolist() == [0] * 5 + [1] * 6 + [2] * 2 + [-1] * 2
    assert scores.segment[1].tolist() == [3] * 8 + [4] * 3 + [-1] * 4
    assert not scores.token_mask[scores.segment < 0].any()
    assert not scores.token_mask[:, 0].any()
    assert not scores.token_mask[0, 5]


@pytest.mark.parametrize(
    ("name", "neutral"),
    [
        ("gemma2", {"final_logit_softcapping": None}),
        ("cohere", {"logit_scale": 1.0}),
        ("granite", {"logits_scaling": 1.0}),
    ],
)
def test_softcaps_and_scales_of_the_head_count(tiny: Any, name: str, neutral: dict[str, Any]) -> None:
    samples = make_samples()
    (ours,) = score(CausalLMScorer(tiny(name)), padded(samples, "right"))
    (without,) = score(CausalLMScorer(tiny(name, **neutral)), padded(samples, "right"))
    assert (ours.loss - without.loss).abs().max() > 0.01


def test_no_labels_means_all_tokens(llama: Any, scorer: CausalLMScorer) -> None:
    samples = [(ids, ids) for ids, _ in make_samples()]
    for side in ("left", "right"):
        batch = padded(samples, side)
        del batch["labels"]
        (scores,) = score(scorer, batch)
        check_samples(llama, samples, scores)


def test_padding_that_looks_like_the_end_token_is_told_by_the_mask(llama: Any, scorer: CausalLMScorer) -> None:
    samples = [(torch.cat([ids, torch.tensor([2, 2])]),) * 2 for ids, _ in make_samples()]
    (scores,) = score(scorer, padded(samples, "right", pad=2))
    check_samples(llama, samples, scores)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float32, torch.uint8])
def test_masks_of_any_dtype(llama: Any, scorer: CausalLMScorer, dtype: torch.dtype) -> None:
    samples = make_samples()
    batch = padded(samples, "left")
    (scores,) = score(scorer, batch | {"attention_mask": batch["attention_mask"].to(dtype)})
    check_samples(llama, samples, scores)


def test_masked_positions_may_hold_anything(llama: Any, scorer: CausalLMScorer) -> None:
    samples = make_samples()
    (scores,) = score(scorer, padded(samples, "left", pad=-1))
    check_samples(llama, samples, scores)
    batch = padded(samples, "left", pad=5)
    batch["labels"] = batch["input_ids"].clone()  # the padding labelled too
    (scores,) = score(scorer, batch, level="token")
    assert scores.count.tolist() == [len(ids) - 1 for ids, _ in samples]
    assert not scores.token_mask[batch["attention_mask"] == 0].any()


def test_a_gap_in_the_mask_is_closed(llama: Any, scorer: CausalLMScorer) -> None:
    ids, labels = make_samples((8,))[0]
    gap = torch.tensor([0, 1, 2, 5, 6, 7, 8, 9])
    batch = {"input_ids": torch.full((1, 10), 4), "labels": torch.full((1, 10), -100)}
    batch["attention_mask"] = torch.zeros(1, 10, dtype=torch.long)
    batch["input_ids"][0, gap], batch["labels"][0, gap], batch["attention_mask"][0, gap] = ids, labels, 1
    for positions in (None, torch.arange(10)[None], (batch["attention_mask"].cumsum(1) - 1)):
        with_positions = batch if positions is None else batch | {"position_ids": positions}
        (scores,) = score(scorer, with_positions, level="token")
        assert scores.segment is None
        check_samples(llama, [(ids, labels)], scores, atol=1e-3)
        assert scores.token_mask[0].nonzero()[:, 0].tolist() == gap[1:].tolist()


def test_fp16_rounding_of_huge_losses_gives_infinity_without_a_warning(tiny: Any) -> None:
    model = tiny("llama")
    model.lm_head.weight.data.mul_(1e7)
    (scores,) = score(CausalLMScorer(model), padded(make_samples(), "right"), level="token")
    assert scores.token_loss.isinf().any()


def test_nan_weights_give_nan_losses(tiny: Any) -> None:
    model = tiny("llama")
    model.lm_head.weight.data.fill_(float("nan"))
    (scores,) = score(CausalLMScorer(model), padded(make_samples(), "right"))
    assert scores.loss.isnan().tolist() == [True, True, False, True, True]
    assert scores.loss[2] == 0


def test_nothing_labelled_is_empty(scorer: CausalLMScorer) -> None:
    batch = padded(make_samples(), "right")
    batch["labels"][1] = -100
    batch["attention_mask"][3] = 0
    job = scorer.begin([batch, {"input_ids": torch.full((2, 1), 5)}], level="token")
    scores, single = job.finish()
    assert scores.count.tolist() == [4, 0, 0, 0, 1]
    assert scores.loss[[1, 2, 3]].tolist() == [0, 0, 0]
    assert single.count.tolist() == [0, 0]
    assert single.token_loss.shape == (2, 1)


def test_a_window_of_nothing_labelled_takes_no_step(scorer: CausalLMScorer) -> None:
    job = scorer.begin([{"input_ids": torch.full((2, 4), 5), "labels": torch.full((2, 4), -100)}], level="sample")
    assert job.num_steps == 0
    assert job.finish()[0].count.tolist() == [0, 0]


def test_an_empty_window_is_fine(scorer: CausalLMScorer) -> None:
    assert scorer.begin([], level="token").finish() == []


# Packs and positions


def test_positions_of_left_padded_rows_are_no_pack(llama: Any, scorer: CausalLMScorer) -> None:
    samples = make_samples()
    batch = padded(samples, "left")
    mask = batch["attention_mask"]
    for fill in (0, 1):
        (scores,) = score(scorer, batch | {"position_ids": (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)})
        assert scores.segment is None
        check_samples(llama, samples, scores)


def test_padding_numbered_zero_makes_no_pack_of_single_rows(llama: Any, scorer: CausalLMScorer) -> None:
    samples = make_samples((5, 8))
    (scores,) = score(scorer, packed([samples[:1], samples[1:]], 10))
    assert scores.segment is None
    check_samples(llama, samples, scores)


def test_one_row_of_positions_serves_all_rows(llama: Any, scorer: CausalLMScorer) -> None:
    samples = make_samples()
    (scores,) = score(scorer, padded(samples, "right") | {"position_ids": torch.arange(12)[None]})
    check_samples(llama, samples, scores)


def test_packs_may_be_masked_and_padded_and_have_no_labels(llama: Any, scorer: CausalLMScorer) -> None:
    samples = [(ids, ids) for ids, _ in make_samples((4, 7, 5))]
    batch = packed([samples[:2], samples[2:]], 14)
    del batch["labels"]
    mask = torch.zeros(2, 14, dtype=torch.long)
    mask[0, :11], mask[1, :5] = 1, 1
    for form in (batch | {"attention_mask": mask}, batch):
        (scores,) = score(scorer, form)
        check_samples(llama, samples, scores)
        assert scores.segment[1].tolist() == [2] * 5 + [-1] * 9


def segments_in_a_loop(mask: list[int], positions: list[int]) -> list[list[int]]:
    """The documents of a row, token by token; lone tokens beside others are padding."""
    found: list[list[int]] = []
    for t, (kept, position) in enumerate(zip(mask, positions, strict=True)):
        if not kept:
            continue
        last = found[-1][-1] if found else None
        if last is not None and position > positions[last] and (last != t - 1 or position == positions[last] + 1):
            found[-1].append(t)
        else:
            found.append([t])
    return found if len(found) < 2 else [segment for segment in found if len(segment) > 1]


ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=7, max_size=7), st.lists(st.integers(0, 3), min_size=7, max_size=7)),
    max_size=4,
)


@given(ROWS)
def test_any_mask_and_positions_are_laid_out_as_a_loop_would(scorer: CausalLMScorer, rows: list[Any]) -> None:
    mask = torch.tensor([mask for mask, _ in rows], dtype=torch.long).reshape(-1, 7)
    positions = torch.tensor([numbers for _, numbers in rows], dtype=torch.long).reshape(-1, 7)
    ids = torch.full_like(mask, 5)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    (scores,) = scorer.begin([batch], level="token", needs_loss=False).finish()
    documents = [segments_in_a_loop(*row) for row in rows]
    if any(len(segments) > 1 for segments in documents):
        expected, number = torch.full_like(mask, -1), 0
        for row, segments in enumerate(documents):
            for segment in segments:
                expected[row, segment] = number
                number += 1
        assert scores.segment.equal(expected)
        assert scores.count.tolist() == [len(segment) - 1 for segments in documents for segment in segments]
    else:
        assert scores.segment is None
        assert scores.count.tolist() == [max(sum(map(len, segments)) - 1, 0) for segments in documents]
    wanted = torch.zeros_like(mask, dtype=torch.bool)
    for row, segments in enumerate(documents):
        for segment in segments:
            wanted[row, segment[1:]] = True
    assert scores.token_mask.equal(wanted)


def test_batches_without_rows_or_tokens_are_empty(scorer: CausalLMScorer) -> None:
    for shape in ((0, 4), (3, 0), (0, 0)):
        ids = torch.zeros(shape, dtype=torch.long)
        for batch in ({"input_ids": ids}, {"input_ids": ids, "position_ids": ids, "attention_mask": ids}):
            (scores,) = score(scorer, batch, level="token")
            assert scores.loss.shape == (shape[0],)
            assert scores.token_mask.shape == shape


def test_an_empty_document_keeps_its_place(llama: Any, scorer: CausalLMScorer) -> None:
    samples = make_samples((4, 7, 5))
    samples[1] = (samples[1][0], torch.full((7,), -100))
    (scores,) = score(scorer, packed([samples], 16))
    assert scores.count.tolist() == [num_labelled(labels) for _, labels in samples]
    check_samples(llama, samples, scores)


# Batch forms

Named = namedtuple("Named", ["input_ids", "attention_mask", "labels"])


@dataclasses.dataclass
class Declared:
    input_ids: Any
    attention_mask: Any
    labels: Any
    name: str = "ignored"


FORMS: dict[str, Any] = {
    "BatchEncoding": BatchEncoding,
    "UserDict": UserDict,
    "namedtuple": lambda batch: Named(**batch),
    "dataclass": lambda batch: Declared(**batch),
    "numpy": lambda batch: {key: value.numpy() for key, value in batch.items()},
    "int32": lambda batch: {key: value.int() for key, value in batch.items()},
    "pair": lambda batch: ({key: value for key, value in batch.items() if key != "labels"}, batch["labels"]),
    "further keys": lambda batch: (
        batch
        | {
            "__key__": ["a"] * 5,
            "text": "b",
            "id": torch.arange(5),
            "token_type_ids": batch["labels"],
            "position_ids": None,
        }
    ),
    "not contiguous": lambda batch: {key: value.t().contiguous().t() for key, value in batch.items()},
    "read-only": lambda batch: {
        key: np.frombuffer(value.numpy().tobytes(), np.int64).reshape(5, -1) for key, value in batch.items()
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_form(scorer: CausalLMScorer, form: str) -> None:
    batch = padded(make_samples(), "left")
    expected, found = score(scorer, batch, FORMS[form](batch))
    assert found.loss.equal(expected.loss)


def test_tuples_of_ids_and_labels(scorer: CausalLMScorer) -> None:
    batch = padded(make_samples(), "right", pad=4)
    ids, labels = batch["input_ids"], batch["labels"]
    plain, pair, alike = score(scorer, {"input_ids": ids}, (ids,), [ids])
    assert plain.loss.equal(pair.loss)
    assert plain.loss.equal(alike.loss)
    plain, pair, bare = score(scorer, {"input_ids": ids, "labels": labels}, [ids, labels], ids)
    assert plain.loss.equal(pair.loss)
    torch.testing.assert_close(bare.loss, alike.loss, rtol=1e-6, atol=1e-6)  # beside other samples


IDS = torch.full((2, 4), 5)
BAD: dict[str, tuple[Any, str]] = {
    "triple": (
        (IDS, IDS, IDS),
        r"batch 1 of the window is a tuple of 3: .* mapping with named keys, or write FunctionScorer",
    ),
    "lists": ({"input_ids": [[1, 2], [3, 4]]}, r"input_ids of batch 1 of the window is a list of 2: .*collate"),
    "single sample": ({"input_ids": torch.arange(4)}, r"shape \[4\], not \[B, T\]\. Single samples\?"),
    "4-D mask": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 4, 4)},
        r"\[2, 1, 4, 4\], not \[B, T\]\. Give one \[B, T\] of 0 and 1, or position_ids",
    ),
    "numbered mask": (
        {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 2, 2]] * 2)},
        r"values from 1 to 2, not 0 and 1: .*position_ids that restart",
    ),
    "mask of another shape": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 3).long()},
        r"attention_mask .* shape \[2, 3\] beside ids of shape \[2, 4\]",
    ),
    "soft mask": ({"input_ids": IDS, "attention_mask": torch.full((2, 4), 0.5)}, "must be of integers"),
    "id too large": (
        {"input_ids": torch.tensor([[1, 2], [3, 97]])},
        r"batch 1 of the window, row 1 has the id 97 at position 1, .* vocabulary of 97",
    ),
    "id negative": ({"input_ids": torch.tensor([[1, -100], [3, 9]])}, r"row 0 has the id -100 at position 1"),
    "labels of another shape": (
        {"input_ids": IDS, "labels": IDS[:, 1:]},
        r"labels .* shape \[2, 3\] beside ids of shape \[2, 4\]",
    ),
    "label too large": ({"input_ids": IDS, "labels": IDS + 100}, r"row 0 have 105 at position 0: .* below 97, or -100"),
    "label -1": ({"input_ids": IDS, "labels": -IDS // 5}, r"row 0 have -1 at position 0"),
    "float ids": ({"input_ids": IDS.float()}, r"input_ids .* of torch\.float32: it must be of integers"),
    "float labels": ({"input_ids": IDS, "labels": IDS.float()}, r"labels .* of torch\.float32"),
    "3-D positions": ({"input_ids": IDS, "position_ids": IDS[None]}, r"position_ids .* shape \[1, 2, 4\]"),
    "pack without positions": (
        {"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 4])},
        "let the collator return position_ids",
    ),
    "no ids": ({"ids": IDS}, r"no input_ids, only \['ids'\]"),
    "no batch": ("text", "a str is no batch"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_runs(scorer: CausalLMScorer, case: str) -> None:
    batch, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        scorer.begin([{"input_ids": IDS}, batch], level="sample")


def test_samples_longer_than_the_table_of_positions_are_refused(tiny: Any, scorer: CausalLMScorer) -> None:
    for name in ("gpt2", "opt"):
        with pytest.raises(ValueError, match=r"row 1 has 69 tokens, and the reference positions for 64"):
            score(CausalLMScorer(tiny(name)), padded(make_samples((5, 70)), "right"))
    score(scorer, padded(make_samples((5, 70)), "right"))


def test_left_padding_without_a_mask_is_told_once(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    scorer = CausalLMScorer(llama)
    batch = padded(make_samples(), "left")
    with caplog.at_level(logging.WARNING, "flowstream"):
        score(scorer, batch)
        score(scorer, {"input_ids": padded(make_samples(), "right")["input_ids"]})
        assert not caplog.records
        score(scorer, {"input_ids": batch["input_ids"]}, {"input_ids": batch["input_ids"]})
    assert len(caplog.records) == 1
    assert "padding id 0" in caplog.text
    assert "attention_mask" in caplog.text


def test_no_warning_where_the_padding_id_begins_texts(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    scorer = CausalLMScorer(tiny("llama", pad_token_id=1))
    score(scorer, {"input_ids": torch.ones(2, 4, dtype=torch.long)})
    assert not caplog.records


# Batches with further inputs


def test_further_inputs_of_the_model_are_passed_on(tiny: Any) -> None:
    model, samples = tiny("gpt2"), make_samples()
    for side in ("right", "left"):
        batch = padded(samples, side)
        kinds = torch.randint(3, 97, batch["input_ids"].shape, generator=torch.Generator().manual_seed(1))
        scores, plain = score(CausalLMScorer(model), batch | {"token_type_ids": kinds}, batch)
        check_samples(model, samples, plain)
        for row, (ids, labels) in enumerate(samples):
            where = batch["attention_mask"][row].bool()

            def with_kinds(input_ids: Tensor, use_cache: bool, kinds: Tensor = kinds[row, where]) -> Any:
                return model(input_ids=input_ids, token_type_ids=kinds[None], use_cache=use_cache)

            expected = alone(with_kinds, ids, labels).sum() / max(num_labelled(labels), 1)  # type: ignore[arg-type]
            assert scores.loss[row].item() == pytest.approx(expected.item(), abs=2e-5)
            assert scores.count[row] == num_labelled(labels)


def test_embeddings_in_place_of_ids(tiny: Any) -> None:
    model, samples = tiny("llama").requires_grad_(False), make_samples()
    batch = padded(samples, "left")
    embedded = {k: v for k, v in batch.items() if k != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])
    scorer, cache = CausalLMScorer(model), MemoryCache()
    jobs = [scorer.begin([embedded, embedded], level="token", cache=cache) for _ in range(2)]
    for scores in jobs[0].finish():
        check_samples(model, samples, scores, atol=1e-3)
    again = scorer.begin([embedded], level="token", cache=cache)
    assert again.num_steps == 0
    assert again.finish()[0].token_loss.equal(jobs[1].finish()[0].token_loss)
    with pytest.raises(ValueError, match="inputs_embeds and no labels"):
        score(scorer, {"inputs_embeds": embedded["inputs_embeds"]})


def test_further_inputs_with_packs_or_as_lists_are_refused(tiny: Any) -> None:
    scorer, batch = CausalLMScorer(tiny("gpt2")), packed([make_samples((4, 5))], 9)
    with pytest.raises(ValueError, match=r"packed .* further inputs \(token_type_ids\)"):
        score(scorer, batch | {"token_type_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match=r"token_type_ids of batch 0 of the window is a list, .* FunctionScorer"):
        score(scorer, batch | {"token_type_ids": [1, 2]})


# The caller's world


@pytest.mark.parametrize("level", ["sample", "token"])
def test_the_callers_autocast_and_modes_neither_leak_in_nor_change(scorer: CausalLMScorer, level: Any) -> None:
    batch = padded(make_samples(), "left")
    (expected,) = score(scorer, batch, level=level)
    for context in (
        torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode(),
        torch.no_grad(),
        torch.enable_grad(),
    ):
        with context:
            before = torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled()
            (scores,) = score(scorer, batch, level=level)
            scorer.check()
            after = torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        assert before == after
        assert scores.loss.equal(expected.loss)
        assert not scores.loss.requires_grad
        given = [value for value in vars(scores).values() if value is not None]
        assert not any(value.is_inference() for value in given)
    assert torch.is_grad_enabled()


def test_a_scorer_made_in_inference_mode_works_outside_it(tiny: Any) -> None:
    batch = padded(make_samples(), "left")
    model = tiny("llama")
    with torch.inference_mode():
        scorer = CausalLMScorer(model)
    (scores,) = score(scorer, batch)
    (expected,) = score(CausalLMScorer(model), batch)
    assert scores.loss.equal(expected.loss)


def _state(model: nn.Module) -> list[Any]:
    flags = [(module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    versions = [parameter._version for parameter in model.parameters()]
    return [flags, needs, versions, copy.deepcopy(model.config.to_dict()), sorted(vars(model))]


@pytest.mark.parametrize("sharing", ["auto", True, False])
def test_the_callers_model_stays_as_it_was(tiny: Any, sharing: Any) -> None:
    model = tiny("gpt2", resid_pdrop=0.5)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model.transformer.h[0].eval()
    model.transformer.wte.weight.requires_grad_(False)
    before, weights = _state(model), copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    scorer = CausalLMScorer(model, copy=sharing)
    job = scorer.begin([padded(make_samples(), "left")], level="sample")
    job.step()
    (scores,) = job.finish()
    assert _state(model) == before
    assert torch.get_rng_state().equal(rng)
    assert all(weights[name].equal(value) for name, value in model.state_dict().items())
    check_samples(model.eval(), make_samples(), scores)


def test_modes_are_put_back_when_the_forward_raises(tiny: Any) -> None:
    model = tiny("llama").train()

    def fail(*args: Any) -> None:
        raise RuntimeError("in the forward")

    model.model.layers[1].register_forward_pre_hook(fail)
    scorer = CausalLMScorer(model, copy=False)
    with pytest.raises(RuntimeError, match="in the forward"):
        score(scorer, padded(make_samples(), "left"))
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_gradients_flow_in_the_callers_model_after_scoring_it(tiny: Any) -> None:
    model = tiny("llama").train()
    batch = padded(make_samples(), "right")
    score(CausalLMScorer(model, copy=False), batch)
    model(**batch).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_copies_are_made_only_where_they_are_needed(tiny: Any) -> None:
    trained, frozen = tiny("llama"), tiny("llama").requires_grad_(False)
    assert CausalLMScorer(trained)._reference.model is not trained
    assert CausalLMScorer(frozen)._reference.model is frozen
    assert CausalLMScorer(trained, copy=False)._reference.model is trained
    assert CausalLMScorer(frozen, copy=True)._reference.model is not frozen


def test_a_trainers_patch_of_forward_is_not_followed(tiny: Any) -> None:
    model, batch = tiny("llama"), padded(make_samples(), "left")
    (expected,) = score(CausalLMScorer(model), batch)
    original = model.forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the caller's model was run")

    model.forward = patched
    (scores,) = score(CausalLMScorer(model), batch)
    assert scores.loss.equal(expected.loss)
    assert model.forward is patched
    model.forward = original


# The plan, the cache, and what they must not change


def test_the_same_window_gives_the_same_bits(llama: Any) -> None:
    batches = [padded(make_samples(seed=seed), "left") for seed in range(3)]
    first = score(CausalLMScorer(llama, token_budget=24), *batches)
    second = score(CausalLMScorer(llama, token_budget=24), *batches)
    assert all(a.loss.equal(b.loss) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("budget", [1, 7, 12, 10**6])
def test_any_budget_gives_the_same_losses(llama: Any, budget: int) -> None:
    samples = make_samples()
    job = CausalLMScorer(llama, token_budget=budget).begin([padded(samples, "left")] * 2, level="sample")
    assert job.num_steps == {1: 4, 7: 3, 12: 2, 10**6: 1}[budget]  # the second batch is a copy of the first
    for scores in job.finish():
        check_samples(llama, samples, scores)
    assert job.num_steps == 0


def test_padding_is_counted(tiny: Any, llama: Any) -> None:
    job = CausalLMScorer(llama, token_budget=10**6).begin([padded(make_samples(), "left")], level="sample")
    job.finish()
    assert job.cost.num_tokens == job.cost.num_padded == 4 + 10 + 7 + 1  # of a pack nothing is padded
    job = CausalLMScorer(tiny("mamba"), token_budget=10**6).begin([padded(make_samples(), "left")], level="sample")
    job.finish()
    assert job.cost.num_tokens == 4 + 10 + 7 + 1
    assert job.cost.num_padded == 4 * 10


@pytest.mark.parametrize("level", ["sample", "token"])
def test_a_cached_loss_equals_the_one_it_came_from_to_the_bit(llama: Any, level: Any) -> None:
    batches = [padded(make_samples(seed=seed), "left") for seed in range(3)]
    plain = score(CausalLMScorer(llama), *batches, level=level)
    cache, scorer = MemoryCache(), CausalLMScorer(llama)
    first = scorer.begin(batches, level=level, cache=cache)
    scored = first.finish()
    assert (first.cost.num_lookups, first.cost.num_hits) == (12, 0)
    # Other neighbours, another padding, another scorer of the same weights.
    other = CausalLMScorer(copy.deepcopy(llama)).begin(
        [padded(make_samples(seed=seed)[::-1], "right") for seed in range(3)], level=level, cache=cache
    )
    assert other.num_steps == 0
    stored = other.finish()
    assert (other.cost.num_lookups, other.cost.num_hits, other.cost.num_tokens) == (12, 12, 0)
    for a, b, c in zip(plain, scored, stored, strict=True):
        assert a.loss.equal(b.loss)
        assert a.loss.equal(c.loss.flip(0))
        assert a.count.equal(c.count.flip(0))
        if level == "token":
            assert a.token_loss.equal(b.token_loss)
            assert a.token_loss[a.token_mask].sort().values.equal(c.token_loss[c.token_mask].sort().values)


def test_levels_labels_and_references_do_not_share_entries(tiny: Any, llama: Any) -> None:
    batch, cache = padded(make_samples(), "left"), MemoryCache()
    score(CausalLMScorer(llama), batch, cache=cache)
    unlike = batch | {"labels": batch["labels"].clone()}
    unlike["labels"][[0, 1], -1] = -100
    job = CausalLMScorer(llama).begin([unlike], level="sample", cache=cache)
    job.finish()
    assert job.cost.num_hits == 2
    other = copy.deepcopy(llama)
    other.model.layers[0].mlp.up_proj.weight.data.add_(0.1)
    for scorer, level in (
        (CausalLMScorer(llama), "token"),
        (CausalLMScorer(other), "sample"),
        (CausalLMScorer(tiny("llama").bfloat16()), "sample"),
    ):
        job = scorer.begin([batch], level=level, cache=cache)
        job.finish()
        assert job.cost.num_hits == 0


def test_rows_may_name_themselves(llama: Any) -> None:
    scorer, cache, batch = CausalLMScorer(llama), MemoryCache(), padded(make_samples(), "left")
    keys = [[f"sample {i}" for i in range(5)]]
    (expected,) = scorer.begin([batch], level="token", cache=cache, row_keys=keys).finish()
    augmented = batch | {"input_ids": (batch["input_ids"] + 1) % 97}
    job = scorer.begin([augmented], level="token", cache=cache, row_keys=[torch.arange(5)])
    assert not job.finish()[0].token_loss.equal(expected.token_loss)
    job = scorer.begin([augmented], level="token", cache=cache, row_keys=keys)
    assert job.num_steps == 0
    assert job.finish()[0].token_loss.equal(expected.token_loss)
    shorter = {key: value[:, :-1] for key, value in batch.items()}
    assert scorer.begin([shorter], level="token", cache=cache, row_keys=keys).num_steps > 0
    with pytest.raises(ValueError, match="2 cache keys for 5 rows"):
        scorer.begin([batch], level="token", cache=cache, row_keys=[["a", "b"]])


def test_documents_of_a_named_row_are_told_apart(llama: Any) -> None:
    scorer, cache = CausalLMScorer(llama), MemoryCache()
    samples = make_samples((5, 5, 5))
    samples = [(ids, ids) for ids, _ in samples]
    batch = packed([samples], 15)
    for _ in range(2):
        (scores,) = scorer.begin([batch], level="sample", cache=cache, row_keys=[["a"]]).finish()
        check_samples(llama, samples, scores)


@pytest.mark.parametrize("level", ["sample", "token"])
def test_without_losses_there_are_counts_and_segments(scorer: CausalLMScorer, level: Any) -> None:
    batches = [packed([make_samples((5, 6))], 12), padded(make_samples(), "left")]
    job = scorer.begin(batches, level=level, needs_loss=False)
    assert job.num_steps == 0
    for scores, expected in zip(job.finish(), score(scorer, *batches, level=level), strict=True):
        assert not scores.loss.any()
        assert scores.count.equal(expected.count)
        assert (scores.segment is None) == (expected.segment is None)
        if level == "token":
            assert scores.token_mask.equal(expected.token_mask)
            assert not scores.token_loss.any()


# Memory


class Bounded(nn.Module):
    """A language model with room for `limit` tokens at a time."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 16)
        self.head = nn.Linear(16, 97)
        self.limit = limit
        self.sizes: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        if input_ids.numel() > self.limit:
            raise torch.OutOfMemoryError(f"tried to allocate {input_ids.numel()}")
        self.sizes.append(input_ids.numel())
        return SimpleNamespace(logits=self.head(self.embed(input_ids).cumsum(1)))


def test_running_out_of_memory_halves_the_budget_for_good(caplog: pytest.LogCaptureFixture) -> None:
    model = Bounded(30).requires_grad_(False)
    scorer = CausalLMScorer(model, token_budget=200)
    samples = make_samples((9, 11, 12, 8, 10, 3, 4, 29))
    (expected,) = score(CausalLMScorer(model, token_budget=1), padded(samples, "right"))
    model.sizes.clear()
    job = scorer.begin([padded(samples, "left")], level="sample")
    assert job.num_steps == 2
    job.step()
    assert job.num_steps >= 2
    (scores,) = job.finish()
    torch.testing.assert_close(scores.loss, expected.loss)
    assert max(model.sizes) <= 30
    assert job.cost.num_padded == sum(model.sizes)
    state = scorer.state_dict()
    assert state["token_budget"] <= 30
    score(scorer, padded(make_samples(seed=3), "left"))
    assert len(caplog.records) == 1
    assert "micro-batch of 196 tokens: it goes on with at most 98" in caplog.text

    resumed = CausalLMScorer(model, token_budget=200)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    caplog.clear()
    (again,) = score(resumed, padded(samples, "left"))
    assert not caplog.records
    assert again.loss.equal(score(resumed, padded(samples, "left"))[0].loss)


def test_a_smaller_budget_of_the_users_outlives_a_loaded_state(llama: Any) -> None:
    scorer = CausalLMScorer(llama, token_budget=64)
    scorer.load_state_dict({"token_budget": 4096})
    assert scorer.state_dict() == {"token_budget": 64}


def test_a_sample_that_does_not_fit_alone_raises_with_the_sizes() -> None:
    scorer = CausalLMScorer(Bounded(20).requires_grad_(False), token_budget=100)
    with pytest.raises(RuntimeError, match=r"single sample of 24 tokens .* truncate") as caught:
        score(scorer, padded(make_samples((5, 25, 7)), "left"))
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


# Construction


def test_from_pretrained_loads_a_frozen_model(tiny: Any, tmp_path: Any) -> None:
    model, batch = tiny("llama"), padded(make_samples(), "left")
    model.save_pretrained(tmp_path)
    scorer = CausalLMScorer.from_pretrained(str(tmp_path), token_budget=50, dtype="float32", device="cpu")
    assert score(scorer, batch)[0].loss.equal(score(CausalLMScorer(model, token_budget=50), batch)[0].loss)
    assert scorer.state_dict() == {"token_budget": 50}
    assert scorer.fingerprint() == CausalLMScorer(model).fingerprint()
    reference = scorer._reference.model
    assert not any(p.requires_grad for p in reference.parameters())
    assert not reference.training


def test_what_is_no_causal_model_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"a torch\.nn\.Module, not str: .*from_pretrained"):
        CausalLMScorer("meta-llama/Llama-3.2-1B")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes no input_ids"):
        CausalLMScorer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"shape \[5, 3\] for tokens of shape"):
        score(
            CausalLMScorer(tiny("bert")),
            padded(make_samples((4, 5, 6, 7, 8)), "right") | {"labels": torch.ones(5, 9, dtype=torch.long)},
        )
    with pytest.raises(ValueError, match="token_budget is 0"):
        CausalLMScorer(tiny("llama"), token_budget=0)
    with pytest.raises(ValueError, match="copy must be True, False or 'auto'"):
        CausalLMScorer(tiny("llama"), copy="never")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="meta device"), torch.device("meta"):
        CausalLMScorer(Bounded(3))


@pytest.mark.parametrize("name", ["max_head_bytes", "token_budget"])
@pytest.mark.parametrize("value", ["x", 0, -5, 2.5, True])
def test_budgets_are_whole_numbers(tiny: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}: give a whole number of at least 1"):
        CausalLMScorer(tiny("llama"), **{name: value})


def test_encoder_decoders_have_a_scorer_of_their_own(tiny: Any) -> None:
    with pytest.raises(ValueError, match="is an encoder-decoder model: use Seq2SeqLMScorer"):
        CausalLMScorer(tiny("bart"))


def test_trained_adapters_load_from_disk_where_the_base_is_meant(tiny: Any, tmp_path: Any) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="trained_adapters"):
        CausalLMScorer.from_pretrained(str(tmp_path / "adapter"))
    scorer = CausalLMScorer.from_pretrained(str(tmp_path / "adapter"), trained_adapters="ignore")
    (scores,) = score(scorer, padded(make_samples(), "right"))
    check_samples(tiny("llama"), make_samples(), scores)
