"""Methods by name: what there is, and what is refused."""

import pytest

from flowstream.compare.methods import Method, parse_methods, trained
from flowstream.compare.settings import ALL_METHODS


@pytest.mark.parametrize(
    ("typed", "data", "companions", "name"),
    [
        ("standard", "standard", (), "standard"),
        ("l2", "standard", ("l2",), "l2"),
        ("standard+l2", "standard", ("l2",), "l2"),
        ("flow+wise+l2", "flow", ("l2", "wise"), "flow+l2+wise"),
        ("mofo+dro", "dro", ("mofo",), "dro+mofo"),
        ("flow-token+lora+wise", "flow-token", ("lora", "wise"), "flow-token+lora+wise"),
        ("wise", "standard", ("wise",), "wise"),
    ],
)
def test_a_name_is_data_and_companions_in_any_order(
    typed: str, data: str, companions: tuple[str, ...], name: str
) -> None:
    method = Method.parse(typed)
    assert (method.data, method.companions, method.name) == (data, companions, name)
    assert Method.parse(name) == method


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("flaw", "there is no flaw"),
        ("flow+", "there is no empty name"),
        ("flow+resample", "flow and resample both say"),
        ("dro+flow", "dro and flow both say"),
        ("flow+l2+l2", "l2 is there twice"),
        ("l1+l2", "l1 and l2 exclude each other"),
        ("flow+hft+lora", "lora and hft exclude each other"),
    ],
)
def test_nonsense_is_refused_with_what_there_is(typed: str, told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("+", r"\+")) as raised:
        Method.parse(typed)
    for known in ("standard", "flow-token", "dro", "lora", "wise"):
        assert known in str(raised.value)


def test_all_methods_of_the_default_parse_and_wise_is_not_trained() -> None:
    methods = parse_methods(ALL_METHODS)
    assert [method.name for method in methods] == ALL_METHODS.split(",")
    names = [method.name for method in trained(methods)]
    assert len(names) == 14
    assert not any("wise" in name for name in names)
    assert [method.name for method in trained(parse_methods("flow+wise"))] == ["standard", "flow"]


def test_standard_is_always_there_and_first_and_nothing_is_there_twice() -> None:
    assert [method.name for method in parse_methods("flow, standard")] == ["standard", "flow"]
    with pytest.raises(ValueError, match=r"flow\+l2 twice"):
        parse_methods("flow+l2,l2+flow")


def test_methods_whose_steps_cost_otherwise_are_known() -> None:
    costly = {name for name in ALL_METHODS.split(",") if Method.parse(name).costs_otherwise}
    assert costly == {
        *("lora", "hft", "flow", "flow-token", "resample", "permuted"),
        *("flow+l2", "flow+lora", "flow+wise"),
    }
