"""Rows of different batches that meet in one, against the samples that the batches were padded from."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import default_collate
from transformers import (
    BatchEncoding,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from flowstream.batch import fields, leaves
from flowstream.recollate import Padding, Row, lengths_of, read_padding, recollate, take, width_of

PAD = 7
FILLS = {"input_ids": PAD, "labels": -100}


def sample(length: int, number: int = 0) -> dict[str, Any]:
    """A sample of this many tokens, unlike any of another number."""
    rng = np.random.default_rng(number)
    return {
        "input_ids": rng.integers(10, 99, length),
        "attention_mask": np.ones(length, np.int64),
        "token_type_ids": rng.integers(0, 2, length),
        "position_ids": np.arange(length),
        "labels": np.where(rng.random(length) < 0.4, -100, rng.integers(10, 99, length)),
        "frames": rng.random((length, 2)).astype(np.float32),
        "features": rng.random(4).astype(np.float32),
        "index": np.int64(number),
        "text": f"sample {number}",
    }


TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "frames")


def padded(samples: Sequence[dict[str, Any]], side: str = "right", width: int = 0, as_numpy: bool = False) -> Any:
    """The batch that a collate function makes of samples: a plain loop."""
    width = max([width, *(len(s["input_ids"]) for s in samples)])
    batch: dict[str, Any] = {}
    for key in samples[0]:
        column = [s[key] for s in samples]
        if key in TOKENS:
            missing = [width - len(row) for row in column]
            pads = [(n, 0) if side == "left" else (0, n) for n in missing]
            column = [
                np.pad(row, [pad, *[(0, 0)] * (row.ndim - 1)], constant_values=FILLS.get(key, 0))
                for row, pad in zip(column, pads, strict=True)
            ]
        if key == "text":
            batch[key] = column
        else:
            batch[key] = np.stack(column) if as_numpy else torch.from_numpy(np.stack(column))
    return batch


def met(batches: Sequence[Any], picks: Sequence[tuple[int, int]], loaded: Sequence[Any] | None = None) -> Any:
    """The rows (batch, row) in a batch of their own."""
    return recollate([Row(batches[i], row) for i, row in picks], read_padding(loaded or batches))


def causal(*lengths: int, side: str = "right", start: int = 0, **kwargs: Any) -> Any:
    return padded([sample(length, start + i) for i, length in enumerate(lengths)], side, **kwargs)


# Every row survives


@st.composite
def meetings(draw: st.DrawFn) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Lengths of the rows of some batches, and which rows meet."""
    lengths = draw(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=4))
    places = [(i, row) for i, batch in enumerate(lengths) for row in range(len(batch))]
    return lengths, draw(st.lists(st.sampled_from(places), min_size=1, max_size=6))


@settings(deadline=None, max_examples=150)
@given(meetings(), st.sampled_from(["left", "right"]), st.booleans(), st.sampled_from([1, 4]))
def test_without_its_padding_every_row_is_the_sample_it_was(
    meeting: tuple[list[list[int]], list[tuple[int, int]]], side: str, as_numpy: bool, multiple: int
) -> None:
    lengths, picks = meeting
    samples = [[sample(n, 10 * i + j) for j, n in enumerate(batch)] for i, batch in enumerate(lengths)]
    widths = [-(-max(batch) // multiple) * multiple for batch in lengths]
    batches = [padded(s, side, width, as_numpy) for s, width in zip(samples, widths, strict=True)]
    merged = met(batches, picks)
    assert list(merged) == list(batches[0])
    width = merged["input_ids"].shape[1]
    longest = max(lengths[i][row] for i, row in picks)
    step = max(power for power in (1, 2, 4, 8) if all(w % power == 0 for w in widths))
    assert step >= multiple
    assert width == (widths[0] if len(set(widths)) == 1 else next(w for w in range(longest, 99) if w % step == 0))
    for n, (i, row) in enumerate(picks):
        expected = samples[i][row]
        kept = np.asarray(merged["attention_mask"][n]) == 1
        assert kept.sum() == lengths[i][row]
        for key in TOKENS:
            assert np.array_equal(np.asarray(merged[key][n])[kept], expected[key]), key
            assert (np.asarray(merged[key][n])[~kept] == FILLS.get(key, 0)).all() or key == "input_ids", key
            assert merged[key].dtype == batches[0][key].dtype
            assert type(merged[key]) is type(batches[0][key])
        assert np.array_equal(np.asarray(merged["features"][n]), expected["features"])
        assert int(merged["index"][n]) == expected["index"]
        assert merged["text"][n] == expected["text"]


@pytest.mark.parametrize(("side", "at"), [("left", slice(None, 2)), ("right", slice(3, None))])
def test_padding_is_what_the_loader_pads_with(side: str, at: slice) -> None:
    one, other = causal(3, 6, side=side), causal(5, 4, side=side, start=5)
    merged = met([one, other], [(0, 0), (1, 0)])
    assert merged["input_ids"].shape == (2, 5)
    expected = {"input_ids": PAD, "labels": -100, "attention_mask": 0, "token_type_ids": 0, "position_ids": 0}
    assert {key: set(merged[key][0, at].tolist()) for key in expected} == {k: {v} for k, v in expected.items()}
    assert merged["frames"][0, at].tolist() == [[0.0, 0.0]] * 2


def test_the_pad_id_is_zero_where_no_batch_shows_one() -> None:
    merged = met([causal(3), causal(5, start=5)], [(0, 0), (1, 0)])
    assert merged["input_ids"][0, 3:].tolist() == [0, 0]


def test_a_hole_in_a_mask_shows_no_pad_id() -> None:
    batch = causal(5, 3)
    batch["attention_mask"][0, 1] = 0
    assert read_padding([batch]).pad_id == PAD
    assert lengths_of(batch) == [5, 3]


def test_equal_widths_are_left_as_they_are() -> None:
    batches = [causal(3, 6, width=9), causal(5, 4, start=5, width=9)]
    assert not read_padding(batches).trims
    merged = met(batches, [(1, 1), (0, 0)])
    assert merged["input_ids"].shape == (2, 9)
    for key in TOKENS:
        assert torch.equal(merged[key], torch.stack([batches[1][key][1], batches[0][key][0]]))


def test_widths_stay_multiples_of_what_the_loader_pads_to() -> None:
    batches = [causal(3, 11, width=16), causal(20, start=5, width=24)]
    assert read_padding(batches).multiple == 8
    assert met(batches, [(0, 0)])["input_ids"].shape == (1, 8)
    assert met(batches, [(0, 0), (0, 1)])["input_ids"].shape == (2, 16)
    assert met(batches, [(1, 0)])["input_ids"].shape == (1, 24)


def test_features_that_are_as_wide_as_a_batch_by_chance_are_not_cut() -> None:
    batches = [causal(2, 4), causal(6, start=5)]  # features are [B, 4]
    merged = met(batches, [(0, 0)])
    assert merged["input_ids"].shape == (1, 2)
    assert torch.equal(merged["features"], batches[0]["features"][:1])


def test_rows_wholly_masked_meet() -> None:
    batches = [causal(3, 5), causal(4, start=5)]
    batches[0]["attention_mask"][0] = 0
    batches[0]["labels"][0] = -100
    assert lengths_of(batches[0]) == [0, 5]
    merged = met(batches, [(0, 0), (1, 0)])
    assert merged["attention_mask"].tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert met(batches, [(0, 0)])["attention_mask"].sum() == 0


def test_labels_that_reach_beyond_the_mask_keep_ids_and_labels_of_one_width() -> None:
    batches = [causal(2, 6), causal(4, start=5)]
    batches[0]["labels"] = batches[0]["input_ids"].clone()  # padding was not masked out: the loader's own choice
    merged = met(batches, [(0, 0), (1, 0)])
    assert merged["labels"].shape == merged["input_ids"].shape == (2, 6)
    assert torch.equal(merged["labels"][0], batches[0]["labels"][0])
    assert lengths_of(batches[0]) == [6, 6]


def test_without_a_mask_rows_keep_their_width_and_are_padded_on_the_right() -> None:
    one, other = ({k: v for k, v in batch.items() if k in ("input_ids", "labels")} for batch in (causal(3), causal(5)))
    merged = met([one, other], [(0, 0), (1, 0)])
    assert lengths_of(one) == [3]
    assert merged["labels"][0, 3:].tolist() == [-100, -100]
    assert torch.equal(merged["input_ids"][0, :3], one["input_ids"][0])


def test_masks_of_labels_are_no_labels() -> None:
    batches = [causal(3), causal(5, start=5)]
    for batch in batches:
        batch["label_mask"] = batch["labels"] != -100
        batch["lm_labels"] = batch["labels"].clone()
    merged = met(batches, [(0, 0), (1, 0)])
    assert merged["label_mask"][0, 3:].tolist() == [False, False]
    assert merged["lm_labels"][0, 3:].tolist() == [-100, -100]


def test_dtypes_that_differ_are_widened() -> None:
    batches = [causal(3), causal(5, start=5)]
    batches[0]["token_type_ids"] = batches[0]["token_type_ids"].int()
    batches[1]["token_type_ids"] = batches[1]["token_type_ids"] + 0.5
    merged = met(batches, [(0, 0), (1, 0)])
    assert torch.equal(merged["token_type_ids"][1], batches[1]["token_type_ids"][0])


def test_read_only_arrays_meet() -> None:
    batches = [causal(3, 4, as_numpy=True), causal(5, start=5, as_numpy=True)]
    for batch in batches:
        for value in batch.values():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)
    assert met(batches, [(0, 0), (1, 0)])["input_ids"].flags.writeable


def test_arrays_of_strings_and_objects_meet() -> None:
    one = {"x": torch.zeros(2), "key": np.array(["a", "bcd"]), "any": np.array([{"n": 1}, None], dtype=object)}
    other = {"x": torch.ones(1), "key": np.array(["efghi"]), "any": np.array([[1, 2]], dtype=object)[:, 0]}
    merged = met([one, other], [(0, 0), (1, 0)])
    assert merged["key"].tolist() == ["a", "efghi"]
    assert merged["any"].tolist() == [{"n": 1}, 1]


# Encoder-decoders


def pair(sources: Sequence[int], targets: Sequence[int], *, start: int = 0, decoder: bool = False) -> dict[str, Any]:
    """A batch of an encoder-decoder; rows of labels end with their last label."""
    batch = {k: v for k, v in causal(*sources, start=start).items() if k in ("input_ids", "attention_mask")}
    width = max(targets)
    labels = torch.full((len(targets), width), -100)
    for row, length in enumerate(targets):
        labels[row, :length] = torch.arange(length) + 10 * (start + row) + 1
    batch["labels"] = labels
    if decoder:
        batch["decoder_input_ids"] = torch.cat([torch.zeros(len(labels), 1).long(), labels[:, :-1].clamp(min=0)], 1)
        batch["decoder_attention_mask"] = (labels != -100).long()
    return batch


def stripped(labels: Tensor) -> list[list[int]]:
    return [row[row != -100].tolist() for row in labels]


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_labels_of_an_encoder_decoder_have_their_own_width(data: st.DataObject) -> None:
    widths = st.integers(1, 8)
    batches = []
    for number in range(data.draw(st.integers(1, 3))):
        rows = data.draw(st.lists(st.tuples(widths, widths), min_size=1, max_size=3))
        batches.append(pair(*zip(*rows, strict=True), start=5 * number, decoder=True))
    places = [(i, row) for i, batch in enumerate(batches) for row in range(len(batch["labels"]))]
    picks = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=5))
    merged = met(batches, picks)
    assert stripped(merged["labels"]) == [stripped(batches[i]["labels"])[row] for i, row in picks]
    assert merged["labels"].shape == merged["decoder_input_ids"].shape == merged["decoder_attention_mask"].shape
    assert merged["labels"].shape[1] <= max(batch["labels"].shape[1] for batch in batches)
    for n, (i, row) in enumerate(picks):
        source = batches[i]
        for mask, key in (("attention_mask", "input_ids"), ("decoder_attention_mask", "decoder_input_ids")):
            assert merged[key][n][merged[mask][n] == 1].tolist() == source[key][row][source[mask][row] == 1].tolist()


def test_labels_keep_their_own_width_without_decoder_inputs() -> None:
    batches = [pair([3, 6], [2, 4]), pair([5], [7], start=5)]
    merged = met(batches, [(0, 0), (1, 0)])
    assert merged["input_ids"].shape == (2, 5)
    assert merged["labels"].shape == (2, 7)
    assert met(batches, [(0, 0)])["labels"].tolist() == [[1, 2]]


def test_labels_as_wide_as_the_inputs_by_chance_lose_nothing() -> None:
    batches = [pair([2, 6], [6, 3]), pair([5], [7], start=5)]
    merged = met(batches, [(0, 0), (1, 0)])
    assert stripped(merged["labels"]) == [[1, 2, 3, 4, 5, 6], list(range(51, 58))]
    assert merged["input_ids"][0][merged["attention_mask"][0] == 1].tolist() == batches[0]["input_ids"][0, :2].tolist()


def test_decoder_inputs_without_a_mask_stay_as_wide_as_the_labels() -> None:
    batches = [pair([3, 6], [2, 4], decoder=True), pair([5], [3], start=5, decoder=True)]
    for batch in batches:
        del batch["decoder_attention_mask"]
    merged = met(batches, [(0, 0), (1, 0)])
    assert merged["decoder_input_ids"].shape == merged["labels"].shape == (2, 3)


def test_labels_meet_where_only_they_differ_in_width() -> None:
    images = torch.zeros(2, 3, 4, 4)
    batches = [{"pixel_values": images, "labels": pair([1, 1], targets)["labels"]} for targets in ([2, 3], [5, 1])]
    merged = met(batches, [(0, 1), (1, 1)])
    assert stripped(merged["labels"]) == [[11, 12, 13], [11]]
    assert merged["labels"].shape == (2, 3)
    static = [pair([4, 4], [2, 3]), pair([4, 4], [5, 1])]
    assert met(static, [(0, 0), (1, 0)])["labels"].shape == (2, 5)


def test_labels_of_one_width_stay_static() -> None:
    batches = [pair([3, 6], [4, 4]), pair([5], [4], start=5)]
    assert met(batches, [(0, 0)])["labels"].shape == (1, 4)


def test_a_left_padded_encoder_has_a_right_padded_decoder() -> None:
    batches = [pair([3, 6], [2, 4]), pair([5], [3], start=5)]
    for batch in batches:
        for key in ("input_ids", "attention_mask"):
            batch[key] = batch[key].flip(1)
    merged = met(batches, [(0, 0), (1, 0)])
    assert merged["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert merged["labels"].tolist() == [[1, 2, -100], [51, 52, 53]]


# Other fields


def test_images_and_classes_meet() -> None:
    batches = [(torch.rand(2, 3, 4, 4), torch.tensor([1, 2])), (torch.rand(1, 3, 4, 4), torch.tensor([3]))]
    image, label = met(batches, [(1, 0), (0, 1)])
    assert torch.equal(image, torch.stack([batches[1][0][0], batches[0][0][1]]))
    assert label.tolist() == [3, 2]
    assert width_of(batches[0]) == 0
    assert lengths_of(batches[0]) == [0, 0]


def test_images_of_different_sizes_are_refused_naming_the_key() -> None:
    batches = [{"image": torch.zeros(1, 3, size, 4), "label": torch.zeros(1)} for size in (4, 5)]
    with pytest.raises(ValueError, match=r"batch\['image'\] has rows of the shapes \[\[3, 4, 4\], \[3, 5, 4\]\]"):
        met(batches, [(0, 0), (1, 0)])
    assert met(batches, [(0, 0)])["image"].shape == (1, 3, 4, 4)


def test_two_views_and_lists_with_an_entry_a_row_meet() -> None:
    views = [default_collate([((torch.full((2,), i), torch.full((2,), -i)), i) for i in r]) for r in (range(4), [4])]
    (left, right), label = met(views, [(0, 3), (1, 0)])
    assert left.tolist() == [[3, 3], [4, 4]]
    assert right.tolist() == [[-3, -3], [-4, -4]]
    assert label.tolist() == [3, 4]
    boxed = [
        {"id": torch.arange(3), "boxes": [torch.full((n, 4), n) for n in (1, 0, 5)], "json": [{"n": n} for n in "abc"]},
        {"id": torch.arange(2), "boxes": [torch.full((n, 4), n) for n in (7, 4)], "json": [{"n": n} for n in "de"]},
    ]
    merged = met(boxed, [(0, 2), (1, 0), (0, 0)])
    assert [len(box) for box in merged["boxes"]] == [5, 7, 1]
    assert merged["json"] == [{"n": "c"}, {"n": "d"}, {"n": "a"}]


@pytest.mark.parametrize("value", [2, "en", None, (), [], torch.tensor(1.5), np.array(2), float("nan")])
def test_what_belongs_to_the_batch_is_kept_where_it_is_equal(value: Any) -> None:
    batches = [{"x": torch.zeros(2), "all": value}, {"x": torch.ones(1), "all": copy.deepcopy(value)}]
    merged = met(batches, [(0, 0), (1, 0)])
    assert repr(merged["all"]) == repr(value)


@pytest.mark.parametrize(
    ("one", "other"),
    [(2, 3), ("en", "de"), (torch.tensor(1.0), torch.tensor(2.0)), (1.0, float("nan")), (None, 0), (True, "no")],
)
def test_what_belongs_to_the_batch_and_differs_is_refused_naming_the_key(one: Any, other: Any) -> None:
    batches = [{"x": torch.zeros(2), "all": one}, {"x": torch.ones(1), "all": other}]
    with pytest.raises(ValueError, match=r"batch\['all'\] has no entry a row and differs .*recollate="):
        met(batches, [(0, 0), (1, 0)])


@pytest.mark.parametrize("other", [None, np.zeros(1), ["a"], {"a": torch.zeros(1)}, torch.tensor(1.0)])
def test_fields_of_another_kind_are_refused_naming_the_key(other: Any) -> None:
    batches = [{"x": torch.zeros(2), "y": torch.zeros(2)}, {"x": torch.zeros(1), "y": other}]
    with pytest.raises(ValueError, match=r"batch\['y'\] is .* in one batch and .* in another"):
        met(batches, [(0, 0), (1, 0)])
    with pytest.raises(ValueError, match=r"batch\['y'\] is .* in one batch and .* in another"):
        met(batches, [(1, 0), (0, 0)])


def test_batches_with_different_fields_do_not_meet() -> None:
    batches = [{"x": torch.zeros(2), "y": torch.zeros(2)}, {"x": torch.zeros(1), "z": torch.zeros(1)}]
    with pytest.raises(ValueError, match=r"different fields at batch: \['x', 'y', 'z'\]"):
        met(batches, [(0, 0), (1, 0)])
    with pytest.raises(ValueError, match=r"different fields at batch\['in'\]"):
        met([{"x": torch.zeros(1), "in": batch} for batch in batches], [(0, 0), (1, 0)])


# Types


class Named(namedtuple("Named", ["input_ids", "attention_mask", "labels"])):
    __slots__ = ()


@dataclass(frozen=True)
class Held:
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def tokens_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}


TYPES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dict": dict,
    "ordered": OrderedDict,
    "user": UserDict,
    "encoding": BatchEncoding,
    "namedtuple": lambda named: Named(**named),
    "dataclass": lambda named: Held(**named),
    "nested": lambda named: (named, torch.arange(len(named["labels"]))),
}


@pytest.mark.parametrize("kind", TYPES.values(), ids=list(TYPES))
def test_a_batch_keeps_its_type_and_its_padding(kind: Callable[[dict[str, Any]], Any]) -> None:
    batches = [causal(3, 6, side="left"), causal(5, start=5, side="left")]
    merged = met([kind(tokens_of(batch)) for batch in batches], [(0, 0), (1, 0)])
    expected = kind(tokens_of(met(batches, [(0, 0), (1, 0)])))
    assert type(merged) is type(expected)
    found, wanted = dict(leaves(merged)), dict(leaves(expected))
    assert list(found) == list(wanted)
    for path in found:
        if path != (1,):
            assert torch.equal(found[path], wanted[path]), path


@pytest.mark.parametrize("sequence", [tuple, list])
def test_labels_beside_a_mapping_are_labels(sequence: type) -> None:
    batches = [causal(3, 6, side="left"), causal(5, start=5, side="left")]
    split = [sequence([{k: v for k, v in tokens_of(b).items() if k != "labels"}, b["labels"]]) for b in batches]
    merged = met(split, [(0, 0), (1, 0)])
    assert type(merged) is sequence
    expected = met(batches, [(0, 0), (1, 0)])
    assert torch.equal(merged[1], expected["labels"])
    assert torch.equal(merged[0]["input_ids"], expected["input_ids"])


def test_a_bare_tensor_is_a_batch() -> None:
    assert met([torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6]])], [(1, 0), (0, 1)]).tolist() == [[5, 6], [3, 4]]


WORDS = ["<pad>", "<unk>", "flow", "weighs", "what", "the", "reference", "finds", "easy"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = {word: i for i, word in enumerate(WORDS)}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", unk_token="<unk>")


def test_an_encoding_of_new_rows_knows_nothing_of_the_old_ones(tokenizer: Any) -> None:
    batches = [
        tokenizer(texts, padding=True, return_tensors="pt")
        for texts in (["flow weighs", "what the reference finds easy"], ["the reference weighs"])
    ]
    assert batches[0].word_ids(0) == [0, 1, None, None, None]
    merged = met(batches, [(0, 0), (1, 0)])
    assert type(merged) is BatchEncoding
    assert not merged.encodings
    with pytest.raises(ValueError, match="word_ids"):
        merged.word_ids(0)
    assert tokenizer.batch_decode(merged["input_ids"], skip_special_tokens=True) == [
        "flow weighs",
        "the reference weighs",
    ]


def in_place(value: Any) -> None:
    if isinstance(value, Tensor | np.ndarray):
        value[...] = 0
    elif isinstance(value, list):
        value.clear()


@pytest.mark.parametrize("trims", [True, False])
@pytest.mark.parametrize("as_numpy", [True, False])
def test_a_new_batch_shares_no_memory_with_its_sources(trims: bool, as_numpy: bool) -> None:
    batches = [causal(3, 6, as_numpy=as_numpy), causal(5 if trims else 6, start=5, as_numpy=as_numpy)]
    for i, batch in enumerate(batches):
        batch["scale"] = torch.tensor(2.0)
        batch["boxes"] = [torch.ones(n, 4) for n in range(len(batch["text"]))]
        batch["words"] = [["a"] * (i + 1)] * len(batch["text"])
    before = copy.deepcopy(batches)
    merged = met(batches, [(0, 0), (1, 0), (0, 0)])
    for _, leaf in leaves(merged):
        in_place(leaf)
    merged = met(batches, [(0, 1)])
    for entry in (*merged["boxes"], *merged["words"]):
        in_place(entry)
    for batch, kept in zip(batches, before, strict=True):
        found, wanted = dict(leaves(batch)), dict(leaves(kept))
        assert list(found) == list(wanted)
        assert all(np.array_equal(found[path], wanted[path]) for path in found)


def test_a_row_delivered_twice_is_two_rows() -> None:
    merged = met([causal(3, 6), causal(5, start=5)], [(0, 0), (0, 0)])
    merged["labels"][0] = 0
    assert merged["labels"][1].tolist() != [0, 0, 0]


# Samples for a user's own collate function


def taken(batches: Sequence[Any], picks: Sequence[tuple[int, int]]) -> list[Any]:
    return [take(Row(batches[i], row)) for i, row in picks]


def test_a_sample_has_the_fields_of_its_row() -> None:
    batch = ({"x": torch.arange(6).reshape(3, 2), "text": ["a", "b", "c"], "scale": 2.0}, np.arange(3), [{"n": 1}] * 3)
    inputs, label, meta = take(Row(batch, 1))
    assert inputs["x"].tolist() == [2, 3]
    assert (inputs["text"], inputs["scale"], label, meta) == ("b", 2.0, 1, {"n": 1})
    held = take(Row(Held(*tokens_of(causal(3, 2)).values()), 1))
    assert held.attention_mask.tolist() == [1, 1, 0]
    assert take(Row(torch.arange(3), 2)) == 2


def test_samples_suit_the_default_collators() -> None:
    batches = [tokens_of(causal(3, 6, width=9)), tokens_of(causal(5, start=5, width=9))]
    picks = [(0, 1), (1, 0)]
    expected = met(batches, picks)
    for collate in (default_data_collator, default_collate):
        got = collate(taken(batches, picks))
        assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy")  # transformers' own
def test_samples_suit_collators_that_pad(tokenizer: Any) -> None:
    batches = [tokens_of(causal(3, 6)), tokens_of(causal(5, start=5))]
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    got = DataCollatorWithPadding(tokenizer)(taken(inputs, [(0, 0), (1, 0)]))
    assert got["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    got = DataCollatorForSeq2Seq(tokenizer)(taken(batches, [(0, 0), (1, 0)]))
    assert stripped(got["labels"]) == [stripped(batches[0]["labels"])[0], stripped(batches[1]["labels"])[0]]


def test_samples_suit_a_callable_of_the_user() -> None:
    def collate(samples: list[Any]) -> Any:
        return {"lengths": [int(s["attention_mask"].sum()) for s in samples]}

    assert collate(taken([causal(3, 6), causal(5)], [(1, 0), (0, 0)])) == {"lengths": [5, 3]}


# How a loader pads


def test_padding_is_read_from_all_batches() -> None:
    full, left = causal(4), causal(3, 6, side="left", start=5)
    padding = read_padding([full, left])
    assert (padding.side, padding.pad_id, padding.trims, padding.multiple) == ("left", PAD, True, 2)
    assert padding == read_padding([left, full])
    assert {path[0] for path in padding.tokens} == set(TOKENS)
    assert read_padding([]) == read_padding([{"x": torch.zeros(2)}]) == Padding()


def test_widths_and_lengths_of_a_batch() -> None:
    for side in ("left", "right"):
        batch = causal(3, 6, 1, side=side, width=8)
        assert width_of(batch) == 8
        assert lengths_of(batch) == [3, 6, 1]
        assert lengths_of((batch, torch.zeros(3))) == [3, 6, 1]
        assert lengths_of(BatchEncoding(fields(batch))) == [3, 6, 1]
    assert lengths_of({"input_ids": torch.zeros(2, 5)}) == [5, 5]
    assert lengths_of({"x": torch.zeros(2, 5)}) == [0, 0]
