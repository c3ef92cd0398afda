"""TorchtuneConfigBuilder without torchtune: seed 001's checks and messages, and what it writes."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import torchtune_config_writer
from lacuna.errors import ConfigError
from torchtune_config_writer.builder import TorchtuneConfigBuilder as Builder

CONFIG: dict[str, Any] = {
    "output_dir": "/tmp/out",
    "tokenizer": {"_component_": "torchtune.models.llama3.llama3_tokenizer", "path": "/m", "max_seq_len": None},
    "model": {"_component_": "torchtune.models.llama3_2.lora_llama3_2_1b", "lora_rank": 8, "lora_alpha": 16},
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-5, "weight_decay": 0.01},
    "dataset": {"_component_": "torchtune.datasets.alpaca_cleaned_dataset", "packed": False},
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "epochs": 1,
    "seed": None,
    "dtype": "bf16",
    "enable_activation_checkpointing": False,
    "compile": False,
    "log_dir": "${output_dir}/logs",
}


@pytest.fixture(scope="session")
def start() -> Builder:
    return Builder.from_dict(CONFIG)


@pytest.fixture
def builder(start: Builder) -> Builder:
    return copy.deepcopy(start)


def changed(before: Any, after: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path to the new value of all that differs."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return {} if before == after and type(before) is type(after) else {prefix.rstrip("."): after}
    keys = [*before, *(key for key in after if key not in before)]
    return {k: v for key in keys for k, v in changed(before.get(key), after.get(key), f"{prefix}{key}.").items()}


@pytest.mark.parametrize(
    ("method", "arguments", "expected"),
    [
        ("with_output_dir", ("results",), {"output_dir": "results"}),
        ("with_learning_rate", (3e-4,), {"optimizer.lr": 3e-4}),
        ("with_learning_rate", (1,), {"optimizer.lr": 1.0}),
        ("with_batch_size", (4,), {"batch_size": 4}),
        ("with_epochs", (3,), {"epochs": 3}),
        ("with_lora_params", (32, 48), {"model.lora_rank": 32, "model.lora_alpha": 48}),
        ("with_gradient_accumulation_steps", (8,), {"gradient_accumulation_steps": 8}),
        ("with_max_seq_length", (2048,), {"tokenizer.max_seq_len": 2048}),
        ("with_activation_checkpointing", (True,), {"enable_activation_checkpointing": True}),
        ("with_seed", (0,), {"seed": 0}),
        ("with_dtype", ("fp32",), {"dtype": "fp32"}),
        ("with_packed", (True,), {"dataset.packed": True}),
        ("with_compile", (True,), {"compile": True}),
        ("with_dataset_template", ("a.b.Template",), {"tokenizer.prompt_template": "a.b.Template"}),
    ],
)
def test_each_method_changes_its_setting_alone(builder: Builder, method: str, arguments: Any, expected: Any) -> None:
    assert getattr(builder, method)(*arguments) is builder
    assert changed(CONFIG, builder.build()) == expected


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("with_lora_params", (16.5, 32), "rank must be int, got float"),
        ("with_lora_params", (16, "32"), "alpha must be int, got str"),
        ("with_lora_params", (True, 32), "rank must be int, got bool"),
        ("with_lora_params", (16, True), "alpha must be int, got bool"),
        ("with_lora_params", (0, 2.5), "alpha must be int, got float"),
        ("with_gradient_accumulation_steps", (1.0,), "steps must be int, got float"),
        ("with_max_seq_length", (None,), "length must be int, got NoneType"),
        ("with_activation_checkpointing", (1,), "enabled must be bool, got int"),
        ("with_seed", (None,), "seed must be int, got NoneType"),
        ("with_seed", (False,), "seed must be int, got bool"),
        ("with_dtype", (16,), "dtype must be str, got int"),
        ("with_packed", (1,), "enabled must be bool, got int"),
        ("with_packed", ("yes",), "enabled must be bool, got str"),
        ("with_compile", (1,), "enabled must be bool, got int"),
        ("with_compile", ("true",), "enabled must be bool, got str"),
        ("with_dataset_template", (123,), "template must be str, got int"),
        ("with_dataset", (Path("data"),), "path must be str, got PosixPath"),
        ("with_output_dir", (1,), "path must be str, got int"),
        ("with_learning_rate", ("3e-4",), "lr must be float, got str"),
        ("with_learning_rate", (True,), "lr must be float, got bool"),
        ("with_batch_size", (2.0,), "batch_size must be int, got float"),
        ("with_epochs", ("3",), "epochs must be int, got str"),
    ],
)
def test_a_wrong_type_is_a_type_error(builder: Builder, method: str, arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        getattr(builder, method)(*arguments)
    assert builder.build() == CONFIG


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("with_lora_params", (0, 16), "rank must be positive, got 0"),
        ("with_lora_params", (-8, 16), "rank must be positive, got -8"),
        ("with_lora_params", (8, 0), "alpha must be positive, got 0"),
        ("with_gradient_accumulation_steps", (0,), "steps must be positive, got 0"),
        ("with_max_seq_length", (-1,), "length must be positive, got -1"),
        ("with_seed", (-1,), "seed must be non-negative, got -1"),
        ("with_dtype", ("",), "dtype cannot be empty"),
        ("with_dataset_template", ("",), "template cannot be empty"),
        ("with_dataset", ("",), "path cannot be empty"),
        ("with_output_dir", ("",), "path cannot be empty"),
        ("with_learning_rate", (0.0,), "lr must be positive, got 0.0"),
        ("with_learning_rate", (float("nan"),), "lr must be finite, got nan"),
        ("with_batch_size", (0,), "batch_size must be positive, got 0"),
        ("with_epochs", (-3,), "epochs must be positive, got -3"),
    ],
)
def test_a_wrong_value_is_a_value_error(builder: Builder, method: str, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(builder, method)(*arguments)
    assert builder.build() == CONFIG


@pytest.mark.parametrize(
    ("path", "section"),
    [
        ("data/rows.json", {"source": "json", "data_files": "data/rows.json"}),
        ("nested.json", {"source": "json", "data_files": "nested.json", "field": "train"}),
        ("rows.jsonl", {"source": "json", "data_files": "rows.jsonl"}),
        ("rows.csv", {"source": "csv", "data_files": "rows.csv"}),
        ("rows.parquet", {"source": "parquet", "data_files": "rows.parquet"}),
        ("rows.txt", {"source": "text", "data_files": "rows.txt"}),
        ("org/name", {"source": "org/name"}),
    ],
)
def test_a_dataset_becomes_what_torchtune_reads(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, section: dict[str, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nested.json").write_text(' {\n "train": [{"input": "a", "output": "b"}]}')
    Path("rows.jsonl").write_text('{"input": "a", "output": "b"}\n')
    component = {"_component_": "torchtune.datasets.instruct_dataset", "packed": False}
    assert builder.with_dataset(path).build()["dataset"] == {**component, **section, "split": "train"}


def test_a_component_that_reads_any_source_stays_with_its_settings(builder: Builder) -> None:
    chat = {"_component_": "torchtune.datasets.chat_dataset", "conversation_column": "c", "source": "x", "field": "f"}
    builder.override({"dataset": chat}).with_dataset("rows.csv")
    assert builder.build()["dataset"] == {
        "_component_": "torchtune.datasets.chat_dataset", "conversation_column": "c", "packed": False, "source": "csv",
        "data_files": "rows.csv", "split": "train",
    }  # fmt: skip
    assert "dataset" in Builder.from_dict({"epochs": 1}).with_dataset("a/b").build()


def test_a_dataset_that_cannot_be_set_leaves_the_old_one() -> None:
    config = {**CONFIG, "dataset": {**CONFIG["dataset"], "packed": "yes"}}
    builder = Builder.from_dict(config)
    with pytest.raises(ConfigError, match="'yes'"):
        builder.with_dataset("rows.csv")
    assert builder.build() == config


def test_overrides_are_nested_dotted_or_flat_and_all_or_none(builder: Builder) -> None:
    builder.override({"model": {"lora_rank": 4}, "optimizer.lr": 1e-3, "weight_decay": 0, "+new.key": [1], "seed": 3})
    assert changed(CONFIG, builder.build()) == {
        "model.lora_rank": 4, "optimizer.lr": 1e-3, "optimizer.weight_decay": 0, "new": {"key": [1]}, "seed": 3,
    }  # fmt: skip
    before = builder.build()
    with pytest.raises(ConfigError) as error:
        builder.override({"epochs": 9, "epoch": 3, "batch_size": "x", "model": 1})
    assert [problem.split(" (")[0] for problem in error.value.problems] == [
        "the base config has no 'epoch'; did you mean 'epochs'?; '+epoch' adds it all the same",
        "'batch_size' is 'x'",
        "model is a mapping in the base config",
    ]
    assert builder.build() == before
    assert builder.override({"seed": None}).build()["seed"] is None


def test_deleting_takes_out_what_is_there(builder: Builder) -> None:
    builder.delete("optimizer.weight_decay").delete("dataset").delete("learning_rate")
    assert builder.build()["optimizer"] == {"_component_": "torch.optim.AdamW"}
    assert "dataset" not in builder.build()
    with pytest.raises(ConfigError, match=r"nothing to delete.*did you mean 'model.lora_rank'"):
        builder.delete("model.lora_rnk")
    with pytest.raises(ConfigError, match="nothing to delete"):
        builder.delete("optimizer.weight_decay")


def test_nothing_that_goes_in_or_out_is_shared(builder: Builder) -> None:
    modules = ["q_proj"]
    builder.override({"+model.lora_attn_modules": modules})
    modules.append("v_proj")
    built = builder.build()
    built["model"]["lora_attn_modules"].append("k_proj")
    built["optimizer"]["lr"] = 5
    assert builder.build()["model"]["lora_attn_modules"] == ["q_proj"]
    assert builder.build()["optimizer"]["lr"] == 2e-5
    config = copy.deepcopy(CONFIG)
    Builder.from_dict(config).with_seed(3).delete("dataset")
    assert config == CONFIG


@given(st.lists(st.sampled_from(["rate", "batch", "lora", "packed", "seed"]), max_size=6), st.integers(1, 99))
def test_chains_end_where_their_last_calls_lead(start: Builder, names: list[str], number: int) -> None:
    calls: dict[str, Callable[[Builder, int], Builder]] = {
        "rate": lambda b, n: b.with_learning_rate(n / 100),
        "batch": lambda b, n: b.with_batch_size(n),
        "lora": lambda b, n: b.with_lora_params(n, 2 * n),
        "packed": lambda b, n: b.with_packed(n % 2 == 0),
        "seed": lambda b, n: b.with_seed(n),
    }
    chained, last = copy.deepcopy(start), copy.deepcopy(start)
    for index, name in enumerate(names):
        calls[name](chained, number + index)
    for name in sorted(set(names)):
        calls[name](last, number + len(names) - 1 - names[::-1].index(name))
    assert chained.build() == last.build()


def test_saving_writes_the_config_and_where_it_comes_from(builder: Builder, tmp_path: Path) -> None:
    builder.with_learning_rate(3e-4).delete("dataset.packed").with_seed(1)
    path = builder.save(tmp_path / "new" / "lr_0.0003.yaml")
    assert yaml.safe_load(path.read_text()) == builder.build()
    meta = yaml.safe_load((tmp_path / "new" / "lr_0.0003.meta.yaml").read_text())
    assert list(meta) == ["source", "versions", "changes", "sha256", "time"]
    assert meta["changes"] == [
        {"override": {"learning_rate": 0.0003}}, {"delete": "dataset.packed"}, {"override": {"seed": 1}}
    ]  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", str(meta["time"]))
    assert set(meta["versions"]) == {"lacuna", "torchtune"}
    assert sorted(file.name for file in path.parent.iterdir()) == ["lr_0.0003.meta.yaml", "lr_0.0003.yaml"]


def test_a_saved_file_is_a_start_and_can_be_saved_again(builder: Builder, tmp_path: Path) -> None:
    path = builder.save(tmp_path / "base.yaml")
    again = Builder.from_file(path)
    assert again.build() == CONFIG
    again.with_epochs(2).save(path)
    assert yaml.safe_load(path.read_text())["epochs"] == 2
    assert yaml.safe_load((tmp_path / "base.meta.yaml").read_text())["source"]["file"] == str(path)


def test_a_file_of_someone_else_is_never_replaced(builder: Builder, tmp_path: Path) -> None:
    path, meta = tmp_path / "a.yaml", tmp_path / "a.meta.yaml"
    path.write_text("mine: 1\n")
    for prepare in ("", "sha256: 3\n", "sha256: abc\n", "broken: [\n"):
        if prepare:
            meta.write_text(prepare)
        with pytest.raises(ConfigError, match="was not saved by a builder, or was changed since"):
            builder.save(path)
        assert path.read_text() == "mine: 1\n"
    path.unlink()
    meta.write_text("notes: years of work\n")
    with pytest.raises(ConfigError, match=r"a\.meta\.yaml"):
        builder.save(path)
    assert meta.read_text() == "notes: years of work\n"
    assert not path.exists()
    meta.unlink()
    meta.mkdir()
    with pytest.raises(ConfigError, match="was not saved by a builder"):
        builder.save(path)


def test_a_saved_file_that_was_edited_stays(builder: Builder, tmp_path: Path) -> None:
    path = builder.save(tmp_path / "a.yaml")
    path.write_text(path.read_text() + "# note\n")
    with pytest.raises(ConfigError, match="was changed since"):
        builder.with_epochs(2).save(path)
    assert path.read_text().endswith("# note\n")


@pytest.mark.parametrize("where", ["folder", "/proc/x/a.yaml"])
def test_a_place_that_cannot_be_written(builder: Builder, tmp_path: Path, where: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError):
        builder.save(tmp_path / where)
    assert not list((tmp_path / "folder").iterdir())


def test_names_without_an_ending_keep_their_own_meta_files(builder: Builder, tmp_path: Path) -> None:
    """`lr_0.0001` and `lr_0.0003` must not share `lr_0.meta.yaml`: two files each, or a refusal."""
    try:
        for rate in (1e-4, 3e-4):
            builder.with_learning_rate(rate).save(tmp_path / f"lr_{rate}")
    except ConfigError:
        assert not list(tmp_path.iterdir())
    else:
        assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", 'trainer = "sft"\n', "a config for sft, not for torchtune"),
        ("a.yaml", "{}\n", "the config is empty"),
        ("a.yaml", "a: 1\na: 2\n", "a.yaml:2: the key 'a' is already on line 1"),
        ("a.txt", "", "ends in .toml, .yaml or .yml"),
    ],
)
def test_files_that_are_no_start(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        Builder.from_file(tmp_path / name)


def test_the_old_package_has_the_same_builder() -> None:
    assert torchtune_config_writer.TorchtuneConfigBuilder is Builder


@pytest.mark.parametrize("overrides", [3, "epochs", {3: 1}])
def test_overrides_are_a_mapping_of_names(builder: Builder, overrides: Any) -> None:
    with pytest.raises(TypeError, match="overrides must be a mapping of names to values"):
        builder.override(overrides)
