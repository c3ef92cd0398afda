"""Which runs there are, arithmetic, and names in texts."""

import itertools
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacuna.experiment.sweep import combinations, evaluate, fill, matches, names_in

VARIABLES = st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(), min_size=1, max_size=4, unique=True))
PAIRED = st.lists(st.integers(), max_size=3, unique=True).map(lambda xs: [{"p": x, "q": -x} for x in xs])
SEEDS = st.lists(st.integers(0, 99), max_size=3, unique=True)


@given(VARIABLES, PAIRED, SEEDS)
def test_every_combination_comes_exactly_once(variables: Any, paired: Any, seeds: Any) -> None:
    runs = list(combinations(variables, paired, seeds))
    sizes = [*map(len, variables.values()), len(paired) or 1, len(seeds) or 1]
    assert len(runs) == math.prod(sizes)
    assert len({tuple(run.items()) for run in runs}) == len(runs)
    names = [*variables, *(["p", "q"] * bool(paired)), *(["seed"] * bool(seeds))]
    assert all(list(run) == names for run in runs)
    assert all(run[name] in values for run in runs for name, values in variables.items())
    assert all(run["q"] == -run["p"] for run in runs if paired)


def test_the_first_variable_is_slowest_and_the_seed_fastest() -> None:
    runs = combinations({"a": [1, 2], "b": [3]}, [{"p": 5}, {"p": 6}], [0, 1])
    expected = [(a, 3, p, seed) for a, p, seed in itertools.product([1, 2], [5, 6], [0, 1])]
    assert [tuple(run.values()) for run in runs] == expected
    assert list(combinations({}, [], [])) == [{}]


def test_a_run_matches_where_all_settings_agree() -> None:
    assert matches({"a": 1, "b": 2}, {"a": 1})
    assert matches({"a": 1, "b": 2}, {"a": 1, "b": 2})
    assert not matches({"a": 1, "b": 2}, {"a": 1, "b": 3})
    assert not matches({"a": 1}, {"c": 1})
    assert not matches({"a": True}, {"a": 1})


NAMES: dict[str, Any] = {"lora_rank": 8, "optimizer.lr": 0.5, "max": 4, "modules": ["a"], "text": "t", "none": None}


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("2 * lora_rank", 16),
        ("lora_rank ** 2 - 1", 63),
        ("lora_rank // 3 % 2", 0),
        ("sqrt(2 * lora_rank)", 4.0),
        ("log2(lora_rank) + log(1)", 3.0),
        ("min(lora_rank, 5)", 5),
        ("round(lora_rank / 3)", 3),
        ("int(lora_rank / 3)", 2),
        ("optimizer.lr * 2", 1.0),
        ("1e-4 * lora_rank", 8e-4),
        ("max * 2", 8),
        ("-lora_rank", -8),
        (" 7 ", 7),
    ],
)
def test_arithmetic_over_names(expression: str, result: float) -> None:
    assert evaluate(expression, NAMES) == result


@given(st.integers(-1000, 1000), st.integers(1, 1000))
def test_arithmetic_is_pythons(left: int, right: int) -> None:
    names = {"a": left, "a.b": right}
    assert evaluate("a + 2 * a.b - a / a.b", names) == left + 2 * right - left / right


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("2 * rank", "names 'rank', which is no number here"),
        ("2 * optimizer.rate", "optimizer"),
        ("lora_rank / 0", "division by zero"),
        ("lora_rank % 0", "modulo by zero"),
        ("", "empty"),
        ("2 *", "invalid syntax"),
        ("2 lora_rank", "invalid syntax"),
        ("lora_rank + text", "unsupported operand"),
        ("lora_rank * none", "lora_rank"),
        ("log(0)", "log"),
        ("sqrt(-1)", "sqrt"),
        ("10.0 ** 400", "out of range"),
        ("1e308 * 10", "gives inf"),
        ("(-1) ** 0.5", "gives"),
        ("9 ** 9 ** 9", "9"),
        ("sqrt(1, 2)", "argument"),
        ("__import__('os')", "__import__"),
        ("open('/etc/passwd')", "open"),
        ("(lora_rank).__class__", "__class__"),
        ("lambda: 1", "names 'lambda'"),
        ("lora_rank ^ 2", "BitXor"),
        ("lora_rank > 4", "Gt"),
        ("(lora_rank, 1)", "Tuple"),
        ("-" * 50_000 + "1", "cannot be worked out"),
        ("name_7 * 2", "names 'name_7'"),
        ("name_0 * 2", "names 'name_0'"),
        ("modules[9]", "modules"),
        ("(lora_rank).real", "real"),
        ("(text).upper()", "text"),
        ("text", "text"),
        ("'a' * 3", "'a' * 3"),
        ("f'{lora_rank}'", "lora_rank"),
        ("modules", "modules"),
        ("none", "none"),
        ("lora_rank = 2", "lora_rank = 2"),
        ("lora_rank; 2", "lora_rank; 2"),
        ("lora_rank\n+ 1", "lora_rank"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_is_no_arithmetic_is_refused(expression: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        evaluate(expression, NAMES)
    assert repr(expression) in str(error.value)
    assert not re.search(r"name_[1-689]", str(error.value))


FILL = {"lora_rank": 8, "learning_rate": 3e-4, "packed": True, "nothing": None, "model": "org/name", "a.b": 2}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("rank_{lora_rank}", "rank_8"),
        ("{lora_rank}{lora_rank}-{a.b}", "88-2"),
        ("{learning_rate}", "0.0003"),
        ("{packed} {nothing}", "true none"),
        ("{model}", "org/name"),
        ("no braces", "no braces"),
        ("${output_dir}/{lora_rank}", "${output_dir}/8"),
        ("${lora_rank}", "${lora_rank}"),
        ("{{lora_rank}} {{ lora_rank }}", "{{lora_rank}} {{ lora_rank }}"),
        ('{"json": 1} {} { lora_rank } {0} {1x}', '{"json": 1} {} { lora_rank } {0} {1x}'),
        ("Summarise: {dialogue}", "Summarise: {dialogue}"),
    ],
)
def test_known_names_are_filled_and_other_braces_stay(text: str, filled: str) -> None:
    assert fill(text, FILL) == filled


@pytest.mark.parametrize(
    ("text", "in_path", "message"),
    [
        ("{lora_rnk}", False, "{lora_rnk} is unknown; did you mean 'lora_rank'?"),
        ("{many}", False, "{many} is no single value"),
        ("out/{dialogue}", True, "{dialogue} is unknown; known: lora_rank"),
        ("out/{empty}", True, "is '', which is no folder name"),
        ("out/{up}", True, "is '..', which is no folder name"),
        ("out/{here}/x", True, "is '.', which is no folder name"),
    ],
)
def test_names_that_cannot_be_filled_are_refused(text: str, in_path: bool, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fill(text, {**FILL, "empty": "", "up": "..", "here": ".", "many": [1]}, in_path)


def test_a_value_in_a_path_is_one_folder() -> None:
    assert fill("/out/{model}/{learning_rate}", FILL, in_path=True) == "/out/org_name/0.0003"


def test_the_names_that_a_text_asks_for() -> None:
    assert names_in("{a}/${b}/{{c}}/{d.e}/{a}") == {"a", "d.e"}
