"""YAML written so that every reader finds the same values, and read so that no document takes the machine down."""

import math
import resource
import subprocess
import sys
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lacuna.config.yaml_format import dump_yaml, parse_yaml
from lacuna.errors import ConfigError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=15,
)
CONFIGS = st.dictionaries(TEXTS, VALUES, max_size=4)
TRICKY = [
    "3e-4", "1e5", "1.5E+3", ".5", "5.", "+.5e1", "1e", "1.2.3", "0.1.", "010", "0o17", "0x1F", "0b101", "1_000", "-7",
    "1:30", "190:20:30", "1:30.5", "2024-01-01", "2024-01-01 10:00:00", "on", "off", "yes", "No", "y", "n", "true",
    "FALSE", "~", "null", "Null", "", " x ", "\t", "a: b", "a #b", "#a", "- a", "-", "?", "? a", ":", "::", "<<", "=",
    "*a", "&a", "!a", "%a", "@a", "`a", "|", ">", "[a]", "{a: 1}", "{a}", "a,b", "'", '"', "\\", "it's", '"q"', "---",
    "...", "--- a", "x\n...", "a\nb", "a\n", "\n", "a\r\nb", "a\tb", "\x00", "\x07", "\x1b[0m", "\x7f", "\x85", "\xa0",
    "\u2028", "\ufeff", "\ufffe", "é", "漢字", "🙂", ".inf", "-.INF", ".nan", "inf", "nan", "${output_dir}/logs",
    "x" * 300,
]  # fmt: skip

ALIAS_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 12)
)


def read(text: str) -> dict[str, Any]:
    return parse_yaml(text, "f.yaml")[0]


def failure(text: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "f.yaml")
    return str(error.value)


def same(left: Any, right: Any) -> bool:
    """Equal in type too, so that 1, 1.0 and True differ."""
    return repr(left) == repr(right)


@given(CONFIGS)
@example({"a": [[[1], [2, [3]]], [{"b": [{"c": []}, {}]}]], "d": {"e": [[{}], {"f": {"g": [1]}}]}})
def test_what_is_written_reads_back_the_same_everywhere(values: dict[str, Any]) -> None:
    text = dump_yaml(values)
    assert same(read(text), values)
    assert same(yaml.safe_load(text), values)
    assert text == dump_yaml(values)


@given(CONFIGS)
def test_what_is_written_reads_back_the_same_in_omegaconf(values: dict[str, Any]) -> None:
    text = dump_yaml(values)
    if "${" not in text and "???" not in text:
        assert same(OmegaConf.to_container(OmegaConf.create(text) if values else OmegaConf.create({})), values)


@pytest.mark.parametrize("text", TRICKY)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    values = {"value": text, text: {"list": [text, [text]]}}
    written = dump_yaml(values)
    assert read(written) == values
    assert yaml.safe_load(written) == values
    assert OmegaConf.to_container(OmegaConf.create(written), resolve=False) == values


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3e-05, "3.0e-05"),
        (-1e16, "-1.0e+16"),
        (1.5e300, "1.5e+300"),
        (0.0003, "0.0003"),
        (2.0, "2.0"),
        (-0.0, "-0.0"),
        (math.inf, ".inf"),
        (-math.inf, "-.inf"),
        (math.nan, ".nan"),
        (True, "true"),
        (None, "null"),
        (10**20, "1" + "0" * 20),
        ({}, "{}"),
        ((), "[]"),
        ("plain words, é", "plain words, é"),
        ("${output_dir}/logs", "${output_dir}/logs"),
        ("on", "'on'"),
    ],
)
def test_each_kind_of_value_has_one_form(value: Any, text: str) -> None:
    assert dump_yaml({"key": value}) == f"key: {text}\n"


def test_blocks_are_indented_as_people_write_them() -> None:
    values = {"a": {"b": [1, {"c": 2, "d": [3]}, [4, 5]]}, "e": (6,)}
    lines = ["a:", "  b:", "  - 1", "  - c: 2", "    d:", "    - 3", "  - - 4", "    - 5", "e:", "- 6", ""]
    assert dump_yaml(values) == "\n".join(lines)


def test_an_empty_config_and_an_empty_document() -> None:
    assert dump_yaml({}) == "{}\n"
    assert parse_yaml("# nothing\n", "f.yaml") == ({}, {})


def test_a_thousand_levels_are_written_and_read() -> None:
    values: dict[str, Any] = {"key": 1}
    listed: Any = [1]
    for _ in range(999):
        values, listed = {"key": values}, [listed]
    assert dump_yaml(read(dump_yaml(values))) == dump_yaml(values)
    assert dump_yaml(read(dump_yaml({"key": listed}))) == dump_yaml({"key": listed})


@pytest.mark.parametrize("value", [object(), 3j, b"bytes", {1, 2}])
def test_what_yaml_has_no_word_for_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be written as YAML"):
        dump_yaml({"key": [value]})


def test_half_a_character_is_refused() -> None:
    with pytest.raises(ConfigError, match="half a character"):
        dump_yaml({"key": "a\ud83d"})


def test_a_key_that_no_reader_takes_is_not_written() -> None:
    values = {"k" * 1000: 1, "after": 2}
    assert read(dump_yaml(values)) == values
    assert yaml.safe_load(dump_yaml(values)) == values
    with pytest.raises(ConfigError, match="has 1001 characters"):
        dump_yaml({"k" * 1001: 1})


def test_every_key_has_its_line() -> None:
    _, lines = parse_yaml("a:\n  b: 1\n  c:\n  - d: 2\n  - 3\n\ne: {f: 4}\n", "f.yaml")
    assert lines == {"a": 1, "a.b": 2, "a.c": 3, "a.c.0.d": 4, "e": 7, "e.f": 7}


def test_numbers_as_keys_become_names_at_the_top() -> None:
    assert read("1: a\n") == {"1": "a"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: the key 'a' is already on line 1"),
        ("a:\n  b: 1\n  b: 2\n", "f.yaml:3: the key 'b' is already on line 2"),
        ("a:\n  [b, c]: 1\n", "f.yaml:2: a key is a name"),
        ("a: {b: 1\n", "f.yaml:2: not valid YAML"),
        ("a: b: c\n", "f.yaml:1: not valid YAML"),
        ("a: *nowhere\n", "f.yaml:1: not valid YAML: found undefined alias"),
        ("a: 1\n---\nb: 2\n", "not valid YAML: but found another document"),
        ("a: !!python/object:os.system x\n", "f.yaml:1: not valid YAML: could not determine a constructor"),
        ("a: !!int x\n", "not valid YAML"),
        ("a: !!bool x\n", "not valid YAML"),
        ("a: \x01\n", "not valid YAML: unacceptable character"),
        ("- a\n", "f.yaml: a config is a mapping of names to values, this is a list"),
        ("text\n", "this is a str"),
        (ALIAS_BOMB, "repeats too much"),
    ],
)
def test_broken_documents_are_named_with_their_line(text: str, message: str) -> None:
    assert message in failure(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x {b: *x}\n", "an alias contains itself"),
        ("a: &x [*x]\n", "an alias contains itself"),
        ("a: &x {b: [{c: *x}]}\n", "an alias contains itself"),
        ("a: " + "[" * 100_000, "not readable"),
        ("a: " + "{b: " * 100_000, "not readable"),
        ("- " * 100_000, "not readable"),
    ],
    ids=["mapping", "list", "both", "open lists", "open mappings", "nested dashes"],
)
def test_no_document_takes_the_machine_down(text: str, message: str) -> None:
    """In a process of its own with 2 GiB and 20 s of processor time: it must answer, and not crash."""
    program = (
        "import sys\nfrom lacuna.config.yaml_format import parse_yaml\nfrom lacuna.errors import ConfigError\n"
        "try:\n    parse_yaml(sys.stdin.read(), 'f.yaml')\nexcept ConfigError as error:\n    print(error)\n"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))

    done = subprocess.run(
        [sys.executable, "-c", program], input=text, capture_output=True, text=True, preexec_fn=limit, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert message in done.stdout


def test_what_an_alias_repeats_reasonably_is_read() -> None:
    assert read("a: &x {b: [1, 2]}\nc: *x\nd: *x\n") == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}, "d": {"b": [1, 2]}}
