"""Reading YAML and TOML, layers over each other, and the messages about what is wrong in them."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacuna.config.files import Layer, check, flag_name, merge_layers, read_layer
from lacuna.config.training import ALTERNATIVES, SFTConfig
from lacuna.errors import ConfigError
from lacuna.words import did_you_mean

GOOD = 'model_name = "m"\ndataset = "d"\noutput_dir = "o"\nsteps = 5\n'


def yaml_value(folder: Path, text: str) -> Any:
    path = folder / "one.yaml"
    path.write_text(f"key: {text}\n", encoding="utf-8")
    return read_layer(path).values["key"]


def failure(folder: Path, name: str, text: str | bytes) -> str:
    """The message with which a file is refused, the folder's name left out."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        read_layer(path)
    return str(error.value).replace(f"{folder}/", "")


def sft_problems(folder: Path, text: str, name: str = "a.toml") -> list[str]:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    layer = read_layer(path)
    with pytest.raises(ConfigError) as error:
        check(SFTConfig, *merge_layers([layer], ALTERNATIVES))
    return [problem.replace(f"{folder}/", "") for problem in error.value.problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 0.0003),
        ("1e5", 100000.0),
        ("-1.5E+3", -1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("010", 10),
        ("-7", -7),
        ("+7", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("on", "on"),
        ("no", "no"),
        ("Yes", "Yes"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-31", "2024-01-31"),
        ("0b11", "0b11"),
        ("'3e-4'", "3e-4"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("NULL", None),
        ("", None),
        ("nULL", "nULL"),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("[3e-4, on]", [0.0003, "on"]),
        ("${output_dir}/x", "${output_dir}/x"),
    ],
)
def test_yaml_scalars_follow_the_1_2_core_schema(tmp_path: Path, text: str, value: Any) -> None:
    found = yaml_value(tmp_path, text)
    assert (found, type(found)) == (value, type(value))


def test_yaml_nan_is_a_number(tmp_path: Path) -> None:
    assert math.isnan(yaml_value(tmp_path, ".nan"))


@given(number=st.floats(allow_nan=False, allow_infinity=False) | st.integers())
def test_yaml_reads_every_number_as_python_writes_it(
    tmp_path_factory: pytest.TempPathFactory, number: float | int
) -> None:
    path = tmp_path_factory.getbasetemp() / "number.yaml"
    path.write_text(f"key: {number!r}\n")
    found = read_layer(path).values["key"]
    assert (found, type(found)) == (number, type(number))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "x.yaml:3: the key 'a' is already on line 1: keep one of them"),
        ("top:\n  a: 1\n  a: 2\n", "x.yaml:3: the key 'a' is already on line 2: keep one of them"),
        ("a: 1\nb: [1, 2\n", "x.yaml:3: not valid YAML: did not find expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", "x.yaml:2: not valid YAML: found a tab character that violates indentation"),
        ("a: *nowhere\n", "x.yaml:1: not valid YAML: found undefined alias"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2: not valid YAML: but found another document"),
        (
            "a: 1\nb: !!python/object/apply:os.system ['true']\n",
            "x.yaml:2: not valid YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.system'",
        ),
        (
            "a: !!timestamp 2024-01-01\n",
            "x.yaml:1: not valid YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:timestamp'",
        ),
        ("a: !!int abc\n", "x.yaml: not valid YAML: invalid literal for int() with base 10: 'abc'"),
        ("a: \x01\n", "x.yaml: not valid YAML: unacceptable character #x0001: control characters are not allowed"),
        ("? [1, 2]\n: b\n", "x.yaml:1: a key is a name, not a list or a mapping"),
        ("a: &self\n  b: *self\n", "x.yaml:1: an alias contains itself, or repeats too much"),
        ("- 1\n- 2\n", "x.yaml: a config is a mapping of names to values, this is a list"),
        ("only text\n", "x.yaml: a config is a mapping of names to values, this is a str"),
    ],
)
def test_broken_yaml_is_named_by_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    assert failure(tmp_path, "x.yaml", text) == message


def test_yaml_keys_are_found_by_line_also_nested(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    path.write_text("# comment\na: 1\nb:\n  c: 2\n\n  d: {e: 3}\n")
    layer = read_layer(path)
    assert layer.lines == {"a": 2, "b": 3, "b.c": 4, "b.d": 6, "b.d.e": 6}
    assert layer.where("b.c") == f"{path}:4"
    assert layer.where("z") == str(path)


def test_yaml_aliases_keep_their_values_and_each_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: &x {n: 1}\nb: *x\n")
    layer = read_layer(path)
    assert layer.values == {"a": {"n": 1}, "b": {"n": 1}}
    assert layer.lines["b"] == 2


@pytest.mark.parametrize("text", ["", "# nothing\n", "\ufeff"])
@pytest.mark.parametrize("name", ["a.yaml", "a.toml"])
def test_an_empty_file_is_an_empty_layer(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_layer(tmp_path / name).values == {}


@pytest.mark.parametrize(("name", "text"), [("a.yaml", "steps: 3\n"), ("a.toml", "steps = 3\n")])
def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
    assert read_layer(tmp_path / name).values == {"steps": 3}


def test_toml_keys_are_found_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('# c\na = 1\n\n"b" = [\n  ["x"],\n]\nd.e = 2\n[f]\ng = 3\n[f.h] # more\ni = 4\n', encoding="utf-8")
    layer = read_layer(path)
    assert layer.values == {"a": 1, "b": [["x"]], "d": {"e": 2}, "f": {"g": 3, "h": {"i": 4}}}
    assert layer.lines == {"a": 2, "b": 4, "d": 7, "d.e": 7, "f": 8, "f.g": 9, "f.h": 10, "f.h.i": 11}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\nb = \n", "x.toml:2: not valid TOML: Invalid value (at line 2, column 5)"),
        ("a = 1\na = 2\n", "x.toml:2: not valid TOML: Cannot overwrite a value (at line 2, column 6)"),
        ("a = '''x", "x.toml: not valid TOML: Expected \"'''\" (at end of document)"),
    ],
)
def test_broken_toml_is_named_by_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    assert failure(tmp_path, "x.toml", text) == message


def test_a_missing_file_names_the_one_that_was_meant(tmp_path: Path) -> None:
    (tmp_path / "sft_qwen.toml").touch()
    with pytest.raises(ConfigError) as error:
        read_layer(tmp_path / "sft_qwne.toml")
    assert str(error.value) == (
        f"{tmp_path}/sft_qwne.toml: no such config file; did you mean '{tmp_path}/sft_qwen.toml'?"
    )


def test_a_missing_file_in_a_missing_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such config file$"):
        read_layer(tmp_path / "nowhere" / "a.toml")


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.toml: cannot be read: .*Is a directory"):
        read_layer(tmp_path / "folder.toml")
    assert "x.yaml: cannot be read: 'utf-8' codec can't decode" in failure(tmp_path, "x.yaml", b"a: \xff\n")


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    assert failure(tmp_path, "x.json", "{}") == "x.json: a config file ends in .toml, .yaml or .yml"


def test_both_formats_give_the_same_config(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(GOOD + "learning_rate = 3e-4\n")
    (tmp_path / "a.yaml").write_text("model_name: m\ndataset: d\noutput_dir: o\nsteps: 5\nlearning_rate: 3e-4\n")
    first, second = (
        check(SFTConfig, *merge_layers([read_layer(tmp_path / name)], [])) for name in ("a.toml", "a.yaml")
    )
    assert first == second
    assert first.learning_rate == 0.0003


def test_a_later_layer_wins_and_is_named(tmp_path: Path) -> None:
    below, above = Layer("a", {"seed": 1, "steps": 2}), Layer("b", {"seed": 3})
    values, origins = merge_layers([below, above], ALTERNATIVES)
    assert values == {"seed": 3, "steps": 2}
    assert origins == {"seed": above, "steps": below}


@pytest.mark.parametrize(("first", "second"), ALTERNATIVES)
def test_a_later_alternative_replaces_an_earlier_one(first: str, second: str) -> None:
    for earlier, later in ((first, second), (second, first)):
        below, above = Layer("a", {earlier: 1, "seed": 7}), Layer("b", {later: 2})
        values, origins = merge_layers([below, above], ALTERNATIVES)
        assert values == {"seed": 7, later: 2}
        assert earlier not in origins


def test_an_alternative_that_is_none_replaces_nothing() -> None:
    values, _ = merge_layers([Layer("a", {"epochs": 3}), Layer("b", {"steps": None})], ALTERNATIVES)
    assert values == {"epochs": 3, "steps": None}


def test_both_alternatives_in_one_layer_stay_for_the_model_to_refuse(tmp_path: Path) -> None:
    assert sft_problems(tmp_path, GOOD + "epochs = 3\n") == ["give epochs or steps, not both"]


@given(layers=st.lists(st.dictionaries(st.sampled_from("abcde"), st.integers() | st.none(), max_size=5), max_size=5))
def test_the_last_layer_that_has_a_key_wins_and_nothing_is_invented(layers: list[dict[str, Any]]) -> None:
    named = [Layer(str(number), values) for number, values in enumerate(layers)]
    values, origins = merge_layers(named, [])
    assert set(values) == set(origins) == {key for layer in layers for key in layer}
    for key, value in values.items():
        last = [layer for layer in named if key in layer.values][-1]
        assert (value, origins[key]) == (last.values[key], last)


@given(
    layers=st.lists(
        st.dictionaries(st.sampled_from(["epochs", "steps", "seed"]), st.integers(1, 9), max_size=2), min_size=1
    )
)
def test_of_two_alternatives_only_the_last_given_layer_remains(layers: list[dict[str, Any]]) -> None:
    values, _ = merge_layers([Layer(str(n), layer) for n, layer in enumerate(layers)], [("epochs", "steps")])
    expected: dict[str, Any] = {}
    for layer in layers:
        if {"epochs", "steps"} & set(layer):
            expected = {key: value for key, value in expected.items() if key == "seed"}
        expected |= layer
    assert values == expected


def test_an_unknown_key_is_named_with_its_line_and_the_meant_one(tmp_path: Path) -> None:
    assert sft_problems(tmp_path, GOOD + "\nlerning_rate = 1e-4\n") == [
        "a.toml:6: unknown setting 'lerning_rate'; did you mean 'learning_rate'?"
    ]
    assert sft_problems(tmp_path, GOOD + "zzz = 1\n") == ["a.toml:5: unknown setting 'zzz'"]
    assert sft_problems(tmp_path, GOOD + "[model]\nname = 1\n") == [
        "a.toml:5: unknown setting 'model'; did you mean 'model_name'?"
    ]
    text = "model_name: m\ndataset: d\noutput_dir: o\nsteps: 5\n1: x\n"
    assert sft_problems(tmp_path, text, "a.yaml") == ["a.yaml:5: unknown setting '1'"]


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    text = 'model_name = 3\ndataset = "d"\nstep = 5\nbatch_size = 0\nkeep_last = true\nlearning_rate = inf\n'
    assert sft_problems(tmp_path, text) == [
        "a.toml:1: 'model_name' is 3 (int): should be a valid string",
        "a.toml: 'output_dir' is missing: add it, or pass --output-dir",
        "a.toml:4: 'batch_size' is 0 (int): should be greater than 0",
        "a.toml:6: 'learning_rate' is inf (float): should be a finite number",
        "a.toml:5: 'keep_last' is True (bool): should be a valid integer",
        "a.toml:3: unknown setting 'step'; did you mean 'steps'?",
    ]


def test_disagreements_between_settings_are_listed_at_once(tmp_path: Path) -> None:
    text = GOOD + "epochs = 3\nbatch_size = 6\nmicro_batch_size = 4\n"
    assert sft_problems(tmp_path, text) == [
        "give epochs or steps, not both",
        "batch_size 6 is not a multiple of micro_batch_size 4: try --micro-batch-size 3",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("steps = true", "'steps' is True (bool): should be a valid integer"),
        ("steps = 5.0", "'steps' is 5.0 (float): should be a valid integer"),
        ('steps = "5"', "'steps' is '5' (str): should be a valid integer"),
        ('packing = "yes"', "'packing' is 'yes' (str): should be a valid boolean"),
        ("packing = 1", "'packing' is 1 (int): should be a valid boolean"),
        ('learning_rate = "1e-4"', "'learning_rate' is '1e-4' (str): should be a valid number"),
        ('precision = "fp16"', "'precision' is 'fp16' (str): should be 'auto', 'bf16' or 'fp32'"),
        ("output_dir = ['o']", "'output_dir' is ['o'] (list): should be a valid string"),
    ],
)
def test_types_are_strict(tmp_path: Path, line: str, problem: str) -> None:
    kept = [old for old in GOOD.splitlines() if old.split(" ")[0] != line.split(" ")[0]]
    text = "\n".join([*kept, line])
    assert sft_problems(tmp_path, text) == [f"a.toml:{len(kept) + 1}: {problem}"]


def test_an_integer_is_a_number_where_a_number_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(GOOD + "learning_rate = 1\n")
    assert check(SFTConfig, *merge_layers([read_layer(tmp_path / "a.toml")], [])).learning_rate == 1


def test_nothing_near_is_no_suggestion() -> None:
    assert did_you_mean("lerning_rate", ["learning_rate", "seed"]) == "; did you mean 'learning_rate'?"
    assert did_you_mean("xyz", ["learning_rate", "seed"]) == ""


def test_flags_are_the_settings_names_in_kebab_case() -> None:
    assert flag_name("learning_rate") == "--learning-rate"
