"""Batches of any shape, read and rebuilt."""

from __future__ import annotations

import types
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate
from transformers import BatchEncoding
from transformers.modeling_outputs import CausalLMOutput

from flowstream.batch import (
    attach,
    check_rows,
    content_hash,
    device_of,
    fields,
    has_entries,
    is_container,
    leaves,
    num_bytes,
    num_rows,
    num_samples,
    with_fields,
)

IDS = torch.arange(12).reshape(3, 4)
LABELS = torch.arange(3)
WEIGHT = torch.tensor([0.1, 0.2, 0.3])

Declared = namedtuple("Declared", ["x", "y", "flow_weight"], defaults=[None])
Undeclared = namedtuple("Undeclared", ["x", "y"])


@dataclass
class Plain:
    x: Tensor
    y: Tensor
    flow_weight: Tensor | None = None


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    y: Tensor
    flow_weight: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Slotted:
    x: Tensor
    y: Tensor
    flow_weight: Tensor | None = None


@dataclass
class Derived:
    x: Tensor
    y: Tensor
    flow_weight: Tensor | None = None
    doubled: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.doubled = self.x * 2


class Wrapping(MutableMapping[str, Any]):
    """A mapping around another: a plain `copy.copy` of it shares what it wraps."""

    def __init__(self, **wrapped: Any) -> None:
        self.wrapped = wrapped

    def __getitem__(self, key: str) -> Any:
        return self.wrapped[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.wrapped[key] = value

    def __delitem__(self, key: str) -> None:
        del self.wrapped[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.wrapped)

    def __len__(self) -> int:
        return len(self.wrapped)


class Copying(Wrapping):
    def copy(self) -> Copying:
        return Copying(**self.wrapped)


MAPPINGS = {
    "dict": {"x": IDS, "y": LABELS},
    "ordered": OrderedDict(x=IDS, y=LABELS),
    "default": defaultdict(list, x=IDS, y=LABELS),
    "encoding": BatchEncoding({"x": IDS, "y": LABELS}),
    "user": UserDict(x=IDS, y=LABELS),
    "copying": Copying(x=IDS, y=LABELS),
}
UNTYPED = {"wrapping": Wrapping(x=IDS, y=LABELS), "proxy": types.MappingProxyType({"x": IDS, "y": LABELS})}
DECLARED = {cls.__name__: cls(IDS, LABELS) for cls in (Declared, Plain, Frozen, Slotted, Derived)}
SEQUENCES = {"tuple": (IDS, LABELS), "list": [IDS, LABELS]}


def by_name(batches: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("batch", batches.values(), ids=list(batches))


# Attaching


@by_name(MAPPINGS | UNTYPED)
def test_a_mapping_gains_the_keys(batch: Any) -> None:
    got = attach(batch, {"flow_weight": WEIGHT, "flow_tau": torch.tensor(2.0)})
    assert list(got) == ["x", "y", "flow_weight", "flow_tau"]
    assert got["x"] is IDS
    assert got["flow_weight"].tolist() == WEIGHT.tolist()


@by_name(MAPPINGS)
def test_a_mapping_keeps_its_type(batch: Any) -> None:
    assert type(attach(batch, {"flow_weight": WEIGHT})) is type(batch)
    assert type(with_fields(batch, {"x": LABELS})) is type(batch)


@by_name(MAPPINGS | UNTYPED | DECLARED | SEQUENCES)
def test_the_original_batch_is_never_changed(batch: Any) -> None:
    before = dict(fields(batch))
    attach(batch, {"flow_weight": WEIGHT})
    with_fields(batch, dict.fromkeys(before, LABELS))
    after = fields(batch)
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)


@by_name(SEQUENCES)
def test_a_tuple_or_list_gains_an_element_an_extra(batch: Any) -> None:
    got = attach(batch, {"flow_weight": WEIGHT, "flow_tau": torch.tensor(2.0)})
    assert type(got) is type(batch)
    assert len(got) == 4
    assert got[0] is IDS
    assert got[2].tolist() == WEIGHT.tolist()
    assert float(got[3]) == 2.0


@by_name(DECLARED)
def test_a_declared_field_is_set(batch: Any) -> None:
    got = attach(batch, {"flow_weight": WEIGHT})
    assert type(got) is type(batch)
    assert got.flow_weight.tolist() == WEIGHT.tolist()
    assert got.x is IDS
    assert got.y is LABELS


@by_name({"tuple": Undeclared(IDS, LABELS), "dataclass": Plain(IDS, LABELS)})
def test_an_undeclared_field_is_refused_with_the_remedy(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"declares no field 'flow_tau': add it .* attach='pair'"):
        attach(batch, {"flow_tau": torch.tensor(1.0)})


@by_name({"tensor": IDS, "array": IDS.numpy()})
def test_nothing_is_attached_to_a_bare_array(batch: Any) -> None:
    with pytest.raises(ValueError, match=f"nothing can be attached to a {type(batch).__name__}: use attach='pair'"):
        attach(batch, {"flow_weight": WEIGHT})


def test_a_key_that_is_there_already_is_not_overwritten() -> None:
    with pytest.raises(ValueError, match=r"already have 'flow_weight'.*itself a FlowStream"):
        attach({"x": IDS, "flow_weight": WEIGHT}, {"flow_weight": WEIGHT})


def test_with_nothing_to_attach_the_batch_is_handed_through() -> None:
    batch = {"x": IDS}
    assert attach(batch, {}) is batch
    assert attach(IDS, {}) is IDS


def test_a_model_output_is_a_mapping() -> None:
    batch = CausalLMOutput(loss=LABELS, logits=IDS)
    got = attach(batch, {"flow_weight": WEIGHT})
    assert got["flow_weight"].tolist() == WEIGHT.tolist()
    assert "flow_weight" not in batch


def test_an_encoding_keeps_what_its_tokenizer_knows_while_its_rows_stay() -> None:
    batch = BatchEncoding({"x": IDS}, n_sequences=1)
    assert attach(batch, {"flow_weight": WEIGHT}).n_sequences == 1


# Fields and leaves


@by_name(MAPPINGS | UNTYPED | DECLARED)
def test_fields_by_name(batch: Any) -> None:
    assert fields(batch)["x"] is IDS
    assert fields(batch)["y"] is LABELS


@by_name(MAPPINGS | DECLARED | SEQUENCES)
def test_fields_put_back_give_the_batch(batch: Any) -> None:
    got = with_fields(batch, fields(batch))
    assert type(got) is type(batch)
    assert list(fields(got)) == list(fields(batch))
    assert all(fields(got)[key] is value for key, value in fields(batch).items())


def test_a_dataclass_takes_values_as_they_are_whatever_it_does_when_made() -> None:
    got = with_fields(Derived(IDS, LABELS), {"x": IDS[:1], "y": LABELS, "flow_weight": None, "doubled": WEIGHT})
    assert got.doubled is WEIGHT


def test_a_bare_array_is_its_own_field() -> None:
    assert fields(IDS)[0] is IDS
    assert with_fields(IDS, {0: LABELS}) is LABELS


@pytest.mark.parametrize("batch", ["text", 3, None, torch.tensor(1.0), Plain])
def test_what_is_no_batch_is_refused(batch: Any) -> None:
    with pytest.raises(ValueError, match="is no batch: the loader must deliver a mapping, tuple, list"):
        fields(batch)


def test_leaves_have_their_paths() -> None:
    batch = ({"input_ids": IDS, "text": ["a", "b", "c"]}, Undeclared(LABELS, np.zeros((3, 2))), 0.5)
    assert [path for path, _ in leaves(batch)] == [(0, "input_ids"), (0, "text"), (1, "x"), (1, "y"), (2,)]


def test_a_list_of_strings_or_numbers_is_a_leaf() -> None:
    assert not is_container(["a", "b"])
    assert not is_container([[1, 2], [3]])
    assert is_container([IDS])
    assert is_container(Undeclared(1, 2))


def test_two_views_are_fields_and_boxes_are_entries() -> None:
    views, labels = default_collate([((torch.zeros(2), torch.ones(2)), i) for i in range(5)])
    assert len(labels) == 5
    assert not has_entries(views, 5)
    boxes = [torch.zeros(n, 4) for n in (1, 0, 3)]
    assert has_entries(boxes, 3)
    assert has_entries([{"id": i} for i in range(3)], 3)
    assert not has_entries([{"id": i} for i in range(3)], 4)
    assert has_entries(["a", "b", "c"], 3)
    assert not has_entries([], 3)
    assert not has_entries(Undeclared(1, 2), 2)


# Rows, samples, bytes, device


@by_name(MAPPINGS | UNTYPED | DECLARED | SEQUENCES | {"tensor": IDS, "strings": ["a", "b", "c"], "tuple_": ("a",) * 3})
def test_rows_of_any_batch(batch: Any) -> None:
    assert num_rows(batch) == 3


@pytest.mark.parametrize("name", ["labels", "input_ids", "attention_mask"])
def test_labels_and_ids_tell_the_rows_before_patches_do(name: str) -> None:
    patches = torch.zeros(40, 8)
    assert num_rows({"pixel_values": patches, name: IDS}) == 3
    assert num_rows({"pixel_values": patches, name: IDS.numpy()}) == 3
    assert num_rows(({"pixel_values": patches, "input_ids": IDS}, torch.zeros(3, 2))) == 3


def test_rows_are_those_of_a_list_where_arrays_in_it_differ() -> None:
    images = tuple(torch.zeros(3, 8, 8) for _ in range(5))
    targets = tuple({"boxes": torch.zeros(n, 4), "labels": torch.zeros(n)} for n in range(5))
    assert num_rows((images, targets)) == 5
    assert num_rows({"image": list(images), "labels": torch.zeros(5)}) == 5
    assert num_rows({"image": list(images), "caption": ["a"] * 5}) == 5


def test_rows_of_nested_fields() -> None:
    assert num_rows(([torch.zeros(5, 2), torch.ones(5, 2)], [torch.zeros(5)])) == 5
    assert num_rows({"image": {"pixels": torch.zeros(5, 3)}, "vocabulary": ["a", "b"]}) == 5


@pytest.mark.parametrize("batch", [{}, {"x": 1}, {"x": torch.tensor(1.0)}, "text", {"text": "one"}])
def test_what_has_no_rows_is_refused_with_the_remedy(batch: Any) -> None:
    with pytest.raises(ValueError, match="has no rows: does the loader deliver batches"):
        num_rows(batch)


def test_packed_rows_hold_a_document_where_positions_restart() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 1]])
    batch = {"input_ids": positions, "position_ids": positions}
    assert num_samples(batch) == 5
    assert num_samples({key: value.numpy() for key, value in batch.items()}) == 5
    assert num_samples((batch, positions)) == 5


@pytest.mark.parametrize("fill", [0, 1])
def test_left_padding_is_no_document(fill: int) -> None:
    positions = torch.tensor([[fill, fill, fill, 0, 1, 2], [0, 1, 2, 3, 4, 5], [fill] * 5 + [0]])
    assert num_samples({"input_ids": positions, "position_ids": positions}) == 3


def test_samples_are_rows_without_positions() -> None:
    assert num_samples((IDS, LABELS)) == 3
    assert num_samples({"input_ids": IDS, "position_ids": torch.arange(4)}) == 3


def test_bytes_of_tensors_and_arrays() -> None:
    batch = {"ids": IDS, "x": ({"y": np.zeros((3, 5), np.float32)}, [torch.zeros(7)]), "text": ["a"], "scale": 1.0}
    assert num_bytes(batch) == 12 * 8 + 15 * 4 + 7 * 4


def test_the_device_is_that_of_the_labels() -> None:
    meta = torch.zeros(3, device="meta")
    assert device_of({"pixels": IDS, "labels": meta}).type == "meta"
    assert device_of(({"input_ids": IDS, "labels": meta}, IDS)).type == "meta"
    assert device_of(Undeclared(meta, IDS)).type == "meta"
    assert device_of({"text": ["a"], "x": {"y": meta}}).type == "meta"
    assert device_of({"x": np.zeros(3), "labels": np.zeros(3)}).type == "cpu"
    assert device_of(["a", "b"]).type == "cpu"


# Whether rows can be taken


def test_rows_that_can_be_taken_pass() -> None:
    check_rows({"labels": IDS, "text": ["a"] * 3, "scale": 2.0, "none": None, "empty": (), "zero": torch.tensor(0)}, 3)
    check_rows({"labels": IDS, "boxes": [torch.zeros(n, 4) for n in range(3)], "json": [{"id": "a"}] * 3}, 3)
    check_rows(([torch.zeros(3, 2), torch.zeros(3, 2)], LABELS), 3)
    check_rows(Undeclared(IDS, LABELS), 3)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": IDS, "pixel_values": torch.zeros(7, 5)}, r"batch\['pixel_values'\] has shape \[7, 5\].*3 rows"),
        (({"image": {"grid": np.zeros((2, 3))}}, LABELS), r"batch\[0\]\['image'\]\['grid'\] has shape \[2, 3\]"),
        ({"labels": IDS, "text": ["a", "b"]}, r"batch\['text'\] is a list of 2 in a batch of 3 rows"),
        ({"labels": IDS, "boxes": [torch.zeros(2, 4)] * 2}, r"batch\['boxes'\]\[0\] has shape \[2, 4\]"),
    ],
)
def test_rows_that_cannot_be_taken_are_refused_naming_the_key(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_rows(batch, 3)


def test_a_list_that_may_be_fields_or_entries_is_refused() -> None:
    images = [torch.zeros(3, 8, 8) for _ in range(3)]
    with pytest.raises(ValueError, match=r"batch\['image'\] is a list of 3, with 3 rows in each.*nothing tells"):
        check_rows({"labels": IDS, "image": images}, 3)


@pytest.mark.parametrize("num", [0, 1, 3])
def test_a_tensor_cut_with_a_stride_has_the_hash_of_its_values(num):
    every_second = torch.arange(2.0 * num)[::2]
    assert content_hash({"x": every_second}) == content_hash({"x": every_second.clone()})
    assert content_hash({"x": torch.arange(8.0).split(1)[3]}) == content_hash({"x": torch.tensor([3.0])})
