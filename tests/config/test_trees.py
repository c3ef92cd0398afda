"""Mappings over each other, compared with the plain recursion that they must equal."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacuna.config.trees import (
    MISSING,
    agree,
    copied,
    get,
    leaves,
    merge,
    nested,
    prefixes,
    type_conflicts,
    without,
)

Values = dict[str, Any]
KEYS = st.sampled_from("abc")
SCALARS = st.none() | st.booleans() | st.integers(0, 3) | st.text("xy") | st.lists(st.integers(), max_size=2)
NESTED = st.dictionaries(KEYS, st.recursive(SCALARS, lambda inner: st.dictionaries(KEYS, inner), max_leaves=8))
LEAVES = st.dictionaries(KEYS, SCALARS)
TYPED = st.fixed_dictionaries({}, optional={"a": LEAVES, "b": SCALARS, "c": st.dictionaries(KEYS, LEAVES)})


def recursive_merge(base: Values, override: Values) -> Values:
    merged = dict(base)
    for key, value in override.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            value = recursive_merge(below, value)
        merged[key] = value
    return merged


def containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from containers(item)


def deep(levels: int, value: Any) -> Values:
    return nested(".".join(["k"] * levels), value)


@given(NESTED, NESTED)
def test_merging_equals_the_plain_recursion(base: Values, override: Values) -> None:
    assert repr(merge(base, override)) == repr(recursive_merge(base, override))


@given(TYPED, TYPED, TYPED)
def test_merging_is_associative_where_mappings_meet_mappings(first: Values, second: Values, third: Values) -> None:
    assert merge(merge(first, second), third) == merge(first, merge(second, third))


@given(NESTED, NESTED)
def test_nothing_given_is_ever_changed(base: Values, override: Values) -> None:
    before = deepcopy((base, override))
    merged = merge(base, override)
    for path, _ in list(leaves(merged)):
        merged = without(merged, path)
    assert repr((base, override)) == repr(before)


@given(NESTED)
def test_merging_with_nothing_or_itself_changes_nothing(values: Values) -> None:
    assert merge(values, {}) == merge({}, values) == merge(values, values) == values


@pytest.mark.parametrize(
    ("base", "override", "merged"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"a": {"b": 3, "c": 2}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
        ({"a": None}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"b": 1}}, {"a": {}}, {"a": {"b": 1}}),
        ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
    ],
)
def test_mappings_merge_and_all_else_replaces(base: Values, override: Values, merged: Values) -> None:
    assert merge(base, override) == merged


def test_a_thousand_levels_and_more_are_no_limit() -> None:
    base, override = deep(5000, 1), deep(5000, 2)
    path = ".".join(["k"] * 5000)
    merged = merge(base, override)
    assert get(merged, path) == 2
    assert get(base, path) == 1
    assert get(without(merged, path), path) is MISSING
    assert get(copied(merged), path) == 2
    assert next(leaves(merged)) == (path, 2)
    assert list(type_conflicts(base, deep(5000, "x"))) == [
        (path, "is a number in the base config (1), here text ('x')")
    ]


@given(NESTED)
def test_a_copy_is_equal_and_shares_nothing(values: Values) -> None:
    copy = copied(values)
    assert repr(copy) == repr(values)
    assert not {id(part) for part in containers(copy)} & {id(part) for part in containers(values)}


def test_a_copy_of_a_tuple_is_a_list_and_a_scalar_is_itself() -> None:
    shared = [1]
    copy = copied({"a": (shared, {"b": shared}), "c": 1})
    assert copy == {"a": [[1], {"b": [1]}], "c": 1}
    copy["a"][0].append(2)
    assert (copy["a"][1], shared) == ({"b": [1]}, [1])
    assert copied("text") == "text"


@given(NESTED)
def test_the_leaves_make_the_whole_again(values: Values) -> None:
    whole: Values = {}
    for path, value in leaves(values):
        assert get(values, path) is value
        whole = merge(whole, nested(path, value))
    assert whole == values


def test_leaves_come_in_order_and_with_a_prefix() -> None:
    values = {"b": {"d": [1], "c": {}}, "a": 2}
    assert list(leaves(values)) == [("b.d", [1]), ("b.c", {}), ("a", 2)]
    assert list(leaves({"a": 1}, "x.")) == [("x.a", 1)]


def test_what_is_not_there_is_missing_and_null_is_there() -> None:
    values = {"a": {"b": None, "c": 1}}
    assert get(values, "a.b") is None
    assert get(values, "a.c") == 1
    for path in ("x", "a.x", "a.c.d", "a.b.c", ""):
        assert get(values, path) is MISSING


def test_taking_out_leaves_the_rest_and_the_original() -> None:
    values = {"a": {"b": {"c": 1, "d": 2}}, "e": 3}
    assert without(values, "a.b.c") == {"a": {"b": {"d": 2}}, "e": 3}
    assert without(values, "e") == {"a": {"b": {"c": 1, "d": 2}}}
    assert values == {"a": {"b": {"c": 1, "d": 2}}, "e": 3}
    with pytest.raises(KeyError):
        without(values, "a.x")


def test_prefixes_go_from_the_outermost_to_the_path_itself() -> None:
    assert prefixes("a.b.c") == ["a", "a.b", "a.b.c"]
    assert prefixes("a") == ["a"]


@pytest.mark.parametrize(
    ("old", "new", "fits"),
    [
        (1, 2.5, True), (2.5, 1, True), (1, True, False), (False, 0, False), (True, False, True), ("a", "b", True),
        ("a", 1, False), (1, "1", False), ({}, {"a": 1}, True), ({}, [], False), ([1], (2,), True), ([1], 1, False),
        (None, {"a": 1}, True), ([1], None, True), (None, None, True), (b"x", 1, False), (b"x", b"y", True),
    ],
)  # fmt: skip
def test_which_kinds_may_stand_for_each_other(old: Any, new: Any, fits: bool) -> None:
    assert agree(old, new) is fits


def test_conflicts_name_the_path_and_both_kinds() -> None:
    base = {"a": {"b": 1, "c": "text", "d": {"e": 1}}, "f": None, "g": True, "h": "y" * 60}
    override = {"a": {"b": 2.5, "c": [1], "d": 3, "new": 1}, "f": 1, "g": 1, "h": {"i": 1}}
    found = dict(type_conflicts(base, override))
    assert found == {
        "a.c": "is text in the base config ('text'), here a list ([1])",
        "a.d": "is a mapping in the base config (…), here a number (3)",
        "g": "is true or false in the base config (True), here a number (1)",
        "h": f"is text in the base config ('{'y' * 38}…), here a mapping (…)",
    }
