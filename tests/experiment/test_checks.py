"""What is wrong with a run's config and shows without a trainer: values, folders, data files."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lacuna.errors import Problem
from lacuna.experiment.checks import check_run
from lacuna.experiment.folder import summarise

INSTRUCT = "torchtune.datasets.instruct_dataset"
ROWS = [{"input": f"q{i}", "output": f"a{i}"} for i in range(4)]
Settings = dict[str, Any]


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps(row) for row in ROWS]
    Path("rows.jsonl").write_text("\n".join(lines) + "\n\n")
    Path("list.json").write_text(json.dumps(ROWS, indent=1))
    Path("one_line.json").write_text(json.dumps(ROWS))
    Path("nested.json").write_text(json.dumps({"train": ROWS, "name": "x"}, indent=1))
    Path("numbers.json").write_text('{"train": [1, 2, 3, 4]}')
    Path("words.json").write_text('{"train": ["input output", "b", "c", "d"]}')
    Path("rows.csv").write_text("input,output\n" + "a,b\n" * 4)
    Path("rows.txt").write_text("line\n" * 4)
    pq.write_table(pa.Table.from_pylist(ROWS), "rows.parquet")
    Path("broken.jsonl").write_text(lines[0] + "\n{\n")
    Path("latin.csv").write_bytes(b"input,output\n\xe9,b\n")
    Path("empty.jsonl").write_text("")
    Path("folder").mkdir()
    Path("large.json").write_text("[\n")
    os.truncate("large.json", 600 * 2**20)


def found(gpus: int = 1, **values: Any) -> list[Problem]:
    return list(check_run("torchtune", "run_000", values, gpus))


def lines(gpus: int = 1, **values: Any) -> str:
    return "\n".join(summarise(found(gpus, **values)))


def dataset(files: Any, source: Any = "json", component: str = INSTRUCT, **others: Any) -> Settings:
    given = {"source": source} if source is not None else {}
    return {"_component_": component, **given, "data_files": files, "split": "train", **others}


@pytest.mark.parametrize(
    "section",
    [
        dataset("rows.jsonl"),
        dataset("list.json"),
        dataset("one_line.json"),
        dataset("large.json"),
        dataset("nested.json", field="train"),
        dataset("rows.csv", "csv"),
        dataset("rows.parquet", "parquet"),
        dataset(["rows.jsonl", "list.json"]),
        dataset({"train": "rows.jsonl", "test": "list.json"}, split="test"),
        dataset("*.jsonl"),
        dataset("https://example.com/a.jsonl"),
        dataset("rows.txt", "text", "torchtune.datasets.text_completion_dataset"),
        dataset("rows.csv", "csv", "torchtune.datasets.text_completion_dataset", column="input"),
        dataset("rows.jsonl", component="my.own_dataset"),
        dataset("rows.jsonl", component="torchtune.datasets.chat_dataset", conversation_column="input"),
        dataset("rows.jsonl", column_map={"input": "input", "output": "output"}),
        dataset("rows.jsonl", split="train[:100%]"),
        dataset("rows.jsonl", split="train[0:4]"),
        {"_component_": INSTRUCT, "source": "org/name", "split": "test"},
        {"_component_": INSTRUCT, "source": "folder", "data_files": "x"},
        {"_component_": INSTRUCT, "source": "${data.kind}", "data_files": "${oc.env:HOME}"},
    ],
)
def test_data_that_fit_are_left_alone(section: Settings) -> None:
    assert lines(dataset=section, batch_size=4, data={"kind": "json"}) == ""


CHAT = "torchtune.datasets.chat_dataset"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dataset("none.jsonl"), "dataset.data_files there is no file none.jsonl"),
        (dataset("rows.jsonl", "org/name"), "dataset.data_files names files, but the source is 'org/name'"),
        (dataset("rows.jsonl", None), "but the source is the component's own hub data set"),
        ({"_component_": INSTRUCT, "source": "rows.csv"}, "rows.csv is a file: write source: csv and data"),
        ({"_component_": INSTRUCT, "source": "rows.txt"}, "write source: text and data_files: rows.txt"),
        (dataset("rows.jsonl", split="test"), "dataset.split is 'test', but files without a name are all 'train'"),
        (dataset("nested.json"), "nested.json is one object over several lines, no rows: name the list in it"),
        (dataset("list.json", field="train"), "dataset.field is 'train', but list.json is a plain list of rows"),
        (dataset("nested.json", field="test"), "nested.json has no list 'test'; it has 'train', 'name'"),
        (dataset("rows.csv", "csv", field="train"), "dataset.field csv files have none: leave field out"),
        (dataset("broken.jsonl"), "broken.jsonl is not readable json"),
        (dataset("latin.csv", "csv"), "latin.csv is not readable csv"),
        (dataset("rows.csv", "parquet"), "rows.csv is not readable parquet"),
        (dataset("folder"), "folder is not readable json"),
        (dataset("numbers.json", field="train"), "numbers.json"),
        (dataset("words.json", field="train"), "words.json"),
        (dataset("nested.json", field=["train"]), "dataset.field"),
        (dataset("rows.jsonl", column_map={"input": "question"}), "dataset.column_map lacks output, which"),
        (dataset("rows.jsonl", column_map={}), "dataset.column_map lacks input and output"),
        (
            dataset("rows.jsonl", column_map={"input": "question", "output": "output"}),
            "rows.jsonl has no column 'question'; it has 'input', 'output': set column_map",
        ),
        (dataset("rows.csv", "csv", CHAT, conversation_column="c"), "no column 'c'; it has 'input', 'output': set con"),
        (dataset("rows.csv", "csv", "x.text_completion_dataset"), "no column 'text'; it has 'input', 'output': set"),
        (dataset("rows.jsonl", component="x.alpaca_dataset"), "no column 'instruction'"),
        (dataset("rows.jsonl", component="x.preference_dataset"), "no column 'chosen'"),
        (dataset("rows.jsonl", component=CHAT, conversation_style="chatml"), "dataset.conversation_style is 'chatml'"),
        (dataset(["empty.jsonl", "empty.jsonl"]), "batch_size 0 rows of empty.jsonl, empty.jsonl are fewer"),
        (dataset("empty.jsonl", packed=True), "empty.jsonl"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_are_named(section: Settings, message: str) -> None:
    assert message in lines(dataset=section, batch_size=2)


def test_fewer_rows_than_a_step_are_told_with_the_sum() -> None:
    step: Settings = {"batch_size": 2, "gradient_accumulation_steps": 2, "dataset": dataset("rows.jsonl")}
    assert lines(**step) == ""
    assert "4 rows are fewer than one step of 2 × 2 accumulated × 2 devices" in lines(2, **step)
    assert "4 rows are fewer than one step of 2 × 4 accumulated: no step" in lines(
        **{**step, "gradient_accumulation_steps": 4}
    )
    packed = {**step, "dataset": dataset("rows.jsonl", packed=True)}
    assert "4 rows are fewer" in lines(2, **packed)  # packing makes no more rows of them
    for split, count in {"train[:3]": 3, "train[2:]": 2, "train[1:3]": 2, "train[:50%]": 2}.items():
        part = {**step, "dataset": dataset("rows.jsonl", split=split)}
        assert f"{count} rows are fewer than one step of 2 × 2 accumulated: no step" in lines(**part), split
    assert lines(2, **{**step, "dataset": dataset(["rows.jsonl", "rows.jsonl"])}) == ""


def test_a_file_that_was_corrected_is_read_anew() -> None:
    assert "not readable" in lines(dataset=dataset("broken.jsonl"), batch_size=2)
    Path("broken.jsonl").write_text(Path("rows.jsonl").read_text())
    assert lines(dataset=dataset("broken.jsonl"), batch_size=2) == ""


def checkpointer(folder: str, output: str | None = None, **others: Any) -> Settings:
    return {"checkpointer": {"checkpoint_dir": folder, "output_dir": output or "elsewhere", **others}}


@pytest.mark.parametrize(
    ("values", "path", "message"),
    [
        (checkpointer("folder", "folder"), "checkpointer.output_dir", "is inside checkpoint_dir"),
        (checkpointer("folder", "folder/a/b"), "checkpointer.output_dir", "is inside checkpoint_dir"),
        (
            {**checkpointer("folder", "${output_dir}"), "output_dir": "folder/x"},
            "checkpointer.output_dir",
            "folder/x is",
        ),
        (checkpointer("nowhere"), "checkpointer.checkpoint_dir", "there is no folder nowhere"),
        (checkpointer("folder", checkpoint_files=["a.pt", 3]), "checkpointer.checkpoint_files", "no file folder/a.pt"),
        ({"ref_checkpointer": {"checkpoint_dir": "nowhere"}}, "ref_checkpointer.checkpoint_dir", "no folder"),
        ({"tokenizer": {"path": "/m/tokenizer.model"}}, "tokenizer.path", "there is no file /m/tokenizer.model"),
        ({"tokenizer": {"merges_file": "${home}/x"}, "home": "/m"}, "tokenizer.merges_file", "there is no file /m/x"),
        ({"dtype": "float16"}, "dtype", "is 'float16', which torchtune does not know"),
        ({"batch_size": 0}, "batch_size", "is 0 (int): should be greater than 0"),
        ({"model": {"lora_rank": 8.0}}, "model.lora_rank", "is 8.0 (float)"),
        ({"device": "gpu"}, "device", "is 'gpu'"),
        ({"dataloader": {"shuffle": "yes"}}, "dataloader.shuffle", "is 'yes'"),
    ],
)
def test_places_and_values_that_cannot_be(values: Settings, path: str, message: str) -> None:
    (problem,) = found(**values)
    assert (problem.run, problem.path) == ("run_000", path)
    assert message in problem.what
    is_value = "should be" in problem.what or "takes another kind" in problem.todo
    assert problem.kind == ("here" if problem.what.startswith("there is no f") else "wrong" if is_value else "start")


@pytest.mark.parametrize(
    "values",
    [
        checkpointer("folder"),
        checkpointer("folder", "folder_2/x"),
        {"checkpointer": {"x": 1}, "tokenizer": {"path": None}, "dataset": [1]},
        {"checkpointer": {"checkpoint_dir": "${oc.env:MODELS}/x"}},
        {"checkpointer": {"checkpoint_dir": "${a}"}, "a": "${b}", "b": "${a}"},
        {"tokenizer": {"path": "${nowhere}/x"}},
        {"tokenizer": {"path": "${.folder}/x", "folder": "f"}},
        {"batch_size": "${n}", "n": 2, "model": {"lora_rank": "${n}"}},
    ],
)
def test_what_only_the_trainer_can_know_is_left_to_it(values: Settings) -> None:
    assert lines(**values) == ""


def test_the_data_of_lacunas_trainers_must_be_there() -> None:
    Path("pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    values = {"dataset": "pairs.jsonl", "dataset_schema": "auto", "validation_dataset": "none.jsonl", "batch_size": 0}
    problems = list(check_run("sft", "r", values, 1))
    assert [(problem.path, problem.kind) for problem in problems] == [
        ("batch_size", "wrong"), ("validation_dataset", "here")
    ]  # fmt: skip
    assert not list(check_run("pretrain", "r", {"dataset": "org/name"}, 1))
    (problem,) = check_run("sft", "r", {"dataset": "rows.jsonl", "dataset_schema": "auto"}, 1)
    assert (problem.path, problem.kind) == ("dataset", "start")
    assert "the columns are input, output; needed are chat: messages" in problem.what
    (problem,) = check_run("sft", "r", {"chat_template": "none.jinja"}, 1)
    assert (problem.path, problem.kind) == ("chat_template", "here")


def test_packed_rows_are_at_most_what_the_bytes_can_fill() -> None:
    step: Settings = {"batch_size": 2, "gradient_accumulation_steps": 2, "tokenizer": {"max_seq_len": 4096}}
    assert "1 rows are fewer" in lines(**step, dataset=dataset("rows.jsonl", packed=True))
    step["tokenizer"] = {"max_seq_len": 64}
    (problem,) = found(**step, dataset=dataset("rows.jsonl", packed=True))
    assert "4 samples may be packed into 1 row, " in problem.what
    assert not problem.stops_a_start
    step["tokenizer"] = {"max_seq_len": 4}
    assert not found(**step, dataset=dataset("rows.jsonl", packed=True))


def test_places_that_nothing_expands_are_named() -> None:
    for path in ("~/out", "$SCRATCH/out"):
        assert "output_dir begins with ~ or holds $NAME" in lines(output_dir=path)
    assert lines(output_dir="${oc.env:HOME}/out") == ""


def test_a_list_of_data_sets_is_looked_into() -> None:
    assert "dataset.1.data_files there is no file none.jsonl" in lines(
        dataset=[dataset("rows.jsonl"), dataset("none.jsonl")], batch_size=2
    )


def test_nothing_to_resume_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert "resume_from_checkpoint there is nothing to resume in" in lines(
        resume_from_checkpoint=True, output_dir=str(tmp_path / "run")
    )
    (tmp_path / "run" / "epoch_0").mkdir()
    assert lines(resume_from_checkpoint=True, output_dir=str(tmp_path / "run")) == ""


def test_a_conversation_of_the_other_style_is_told() -> None:
    Path("chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 4)
    section = dataset("chat.jsonl", component=CHAT, conversation_column="messages", conversation_style="sharegpt")
    assert "is sharegpt, but the turns of chat.jsonl have no 'from'" in lines(dataset=section, batch_size=2)
    assert lines(dataset={**section, "conversation_style": "openai"}, batch_size=2) == ""


def test_a_file_of_another_kind_is_no_object_over_several_lines() -> None:
    assert "rows.csv is no JSON: it begins with" in lines(dataset=dataset("rows.csv"), batch_size=2)


def test_a_summary_has_one_line_for_equal_problems() -> None:
    problems = [Problem(f"run_{i}", "a.b", "is wrong", "mend it") for i in range(3)] + [Problem("run_1", "", "x", "y")]
    assert summarise(problems) == ["3 runs (run_0 … run_2): a.b is wrong: mend it", "run_1: x: y"]


def test_a_warmup_as_long_as_the_run_is_told() -> None:
    step: Settings = {"batch_size": 2, "epochs": 3, "dataset": dataset("rows.jsonl")}
    (problem,) = found(**step, lr_scheduler={"num_warmup_steps": 6})
    assert "6 steps of warmup are no less than the run's 6: the learning rate never" in problem.what
    assert not problem.stops_a_start
    assert not found(**step, lr_scheduler={"num_warmup_steps": 5})
    assert found(**step, max_steps_per_epoch=1, lr_scheduler={"num_warmup_steps": 3})
