"""Experiments over torchtune's configs, with the real torchtune in its environment."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from conftest import Run
from lacuna import generate
from lacuna.config.files import read_layer
from lacuna.config.names import TORCHTUNE, find_path
from lacuna.config.trees import leaves, merge
from lacuna.config.yaml_format import dump_yaml
from lacuna.errors import ConfigError
from lacuna.experiment.base import load_recipe
from lacuna.experiment.checks import check_run
from lacuna.experiment.design import design
from lacuna.experiment.generator import check_configs
from lacuna.torchtune import environment as torchtune
from lacuna.torchtune.recipe import check_recipe
from lacuna.torchtune.templates import DROPPED
from torchtune_config_writer.builder import TorchtuneConfigBuilder
from torchtune_fixture import (
    DELETE,
    GLOO,
    ROOT,
    TORCHTUNE_PYTHON,
    Changes,
    find_problems,
    losses,
    make_llama,
    tiny_controls,
    train,
    write_rows,
)

LORA = "llama3_2/1B_lora_single_device"
FULL = "llama3_2/1B_full_single_device"
DISTRIBUTED = "llama3_2/1B_lora"
DISTILLATION = "llama3_2/8B_to_1B_KD_lora_single_device"
DPO = "llama3_1/8B_lora_dpo"
PPO = "mistral/7B_full_ppo_low_memory"
OFFLOADING = "enable_activation_offloading"


@pytest.fixture(scope="module")
def environment() -> torchtune.Environment:
    return torchtune.need_environment(None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "Llama-tiny")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl")


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    return values


def experiment(**settings: Any) -> dict[str, Any]:
    return {"experiment_name": "trial", "base_config": LORA, **settings}


# Every shipped config.

READ_THERE = """
import json, sys
from omegaconf import OmegaConf
from torchtune.config import validate
answer, sys.stdout = sys.stdout, sys.stderr
found = {}
for name, shipped, written in json.load(sys.stdin):
    try:
        validate(OmegaConf.load(shipped))
        accepted = True
    except Exception:
        accepted = False
    found[name] = [accepted, OmegaConf.to_container(OmegaConf.load(written), resolve=False)]
print(json.dumps(found), file=answer)
"""


def test_every_shipped_config_reads_back_equal_and_is_accepted_where_torchtune_accepts_it(
    environment: torchtune.Environment, tmp_path: Path
) -> None:
    shipped = torchtune.recipes(environment)
    values = {recipe.config: merge(read_layer(recipe.file).values, {"seed": 7}) for recipe in shipped}
    assert len(values) == 155
    files, runs, ours = [], [], []
    for index, recipe in enumerate(shipped):
        file = tmp_path / f"{index}.yaml"
        file.write_text(dump_yaml(values[recipe.config]))
        assert yaml.safe_load(file.read_text()) == values[recipe.config]
        assert OmegaConf.to_container(OmegaConf.load(file), resolve=False) == values[recipe.config]
        files.append((recipe.config, str(recipe.file), str(file)))
        runs.append({"id": recipe.config, "file": str(file), "recipe": recipe.recipe, "touched": ["seed"]})
        ours += check_run("torchtune", recipe.config, values[recipe.config], 1)
        facts = torchtune.facts_of(environment, recipe.recipe)
        ours += check_recipe(facts, values[recipe.config], ["seed"], is_shipped=True)
        ours += check_recipe(facts, values[recipe.config], [], is_shipped=False)
    process = subprocess.run(
        [environment.python, "-c", READ_THERE], input=json.dumps(files), capture_output=True, text=True, check=True
    )
    there = json.loads(process.stdout)
    assert {name: read for name, (_, read) in there.items()} == values
    accepted = {name for name, (is_accepted, _) in there.items() if is_accepted}
    assert len(accepted) == 143
    assert [problem for problem in ours if problem.kind != "here"] == []
    theirs = torchtune.validate(environment, runs)
    assert {problem.run for problem in theirs} == values.keys() - accepted
    assert all("torchvision" in problem.what and problem.kind == "here" for problem in theirs)


SETTINGS: dict[str, tuple[dict[str, int], Any, Any]] = {
    "learning_rate": ({"optimizer.lr": 138}, 1e-4, 3e-4), "weight_decay": ({"optimizer.weight_decay": 69}, 0.0, 0.1),
    "num_warmup_steps": ({"lr_scheduler.num_warmup_steps": 93}, 0, 10), "epochs": ({"epochs": 137}, 2, 3),
    "max_steps_per_epoch": ({"max_steps_per_epoch": 137}, None, 10), "batch_size": ({"batch_size": 148}, 3, 5),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 138}, 3, 5),
    "clip_grad_norm": ({"clip_grad_norm": 125}, None, 0.5), "seed": ({"seed": 155}, 1, 2),
    "shuffle": ({"shuffle": 137, "dataloader.shuffle": 1}, True, False), "lora_rank": ({"model.lora_rank": 90}, 3, 5),
    "lora_alpha": ({"model.lora_alpha": 90}, 3, 0.5), "lora_dropout": ({"model.lora_dropout": 84}, 0.0, 0.1),
    "lora_attn_modules": ({"model.lora_attn_modules": 90}, ["q_proj"], ["q_proj", "v_proj"]),
    "apply_lora_to_mlp": ({"model.apply_lora_to_mlp": 90}, True, False),
    "apply_lora_to_output": ({"model.apply_lora_to_output": 55}, True, False),
    "max_seq_len": ({"tokenizer.max_seq_len": 129}, None, 512),
    "prompt_template": ({"tokenizer.prompt_template": 5}, None, "torchtune.data.SummarizeTemplate"),
    "train_on_input": ({"dataset.train_on_input": 3}, True, False),
    "packed": ({"dataset.packed": 126, "dataloader.packed": 1}, True, False), "dtype": ({"dtype": 155}, "bf16", "fp32"),
    "optimizer_in_bwd": ({"optimizer_in_bwd": 47}, True, False),
    "enable_activation_checkpointing": ({"enable_activation_checkpointing": 138}, True, False),
    "enable_activation_offloading": ({"enable_activation_offloading": 127}, True, False),
    "compile": ({"compile": 138}, True, False), "fused": ({"optimizer.fused": 120}, True, False),
    "device": ({"device": 155}, "cuda:1", "cpu"), "log_every_n_steps": ({"log_every_n_steps": 138}, 1, 10),
    "checkpoint_dir": ({"checkpointer.checkpoint_dir": 155}, "/models/a", "/models/b"),
    "output_dir": ({"output_dir": 155}, "/runs/a", "/runs/b"),
    "resume_from_checkpoint": ({"resume_from_checkpoint": 143}, True, False),
    "save_adapter_weights_only": ({"save_adapter_weights_only": 68}, True, False),
}  # fmt: skip
"""Name to the paths where recipes read it, with the number of shipped configs that have it, and two values."""


@pytest.fixture(scope="module")
def shipped(environment: torchtune.Environment) -> list[tuple[torchtune.Recipe, Any]]:
    """torchtune's configs, each with what is in it."""
    return [(recipe, read_layer(recipe.file).values) for recipe in torchtune.recipes(environment)]


@pytest.mark.parametrize("name", TORCHTUNE)
def test_two_values_give_two_configs_that_differ_where_the_recipe_reads_it(
    name: str, shipped: list[tuple[torchtune.Recipe, Any]]
) -> None:
    """Designed for one config of each recipe that has it."""
    counts, *two = SETTINGS[name]
    found = dict.fromkeys(counts, 0)
    designed = set()
    for recipe, values in shipped:
        path, missing = find_path(name, "torchtune", values)
        if missing:
            continue
        found[path] += 1
        if (recipe.recipe, path) in designed:
            continue
        designed.add((recipe.recipe, path))
        runs = design(experiment(base_config=recipe.config, variables={name: two})).runs
        first, second = (dict(leaves(run.values)) for run in runs)
        assert runs[0].values.keys() == runs[1].values.keys()
        differing = {leaf for leaf in first.keys() | second.keys() if first.get(leaf, ...) != second.get(leaf, ...)}
        assert differing == {path, "output_dir"}, recipe.config
        assert [first[path], second[path]] == two
    assert found == counts


# Broken configs.


FILE = {"source": "json", "data_files": "train.jsonl", "split": "train"}
INSTRUCTIONS = {"_component_": "torchtune.datasets.instruct_dataset", **FILE}
CHATS = {**INSTRUCTIONS, "_component_": "torchtune.datasets.chat_dataset", "conversation_column": "messages"}
WANDB = {"_component_": "torchtune.training.metric_logging.WandBLogger", "project": "p", "mode": "offline"}
WARMUP, QUERIES = {"num_warmup_steps": 9}, {"lora_attn_modules": ["q_proj"]}
MODELS, LOGGERS, LOSSES = "torchtune.models.llama3_2", "torchtune.training.metric_logging", "torchtune.modules.loss"
FACTS: dict[str, list[Any]] = {
    "model._component_": [f"{MODELS}.lora_llama3_2_999b", "nosuchpkg.models.x", "", None, "torchtune.models", 5],
    "dataset._component_": ["torchtune.nosuch.x"], "loss._component_": [f"{LOSSES}.Nope"],
    "model.lora_rnk": [8], "tokenizer.max_sequence_len": [8], "optimizer.lrr": [8], "lr_scheduler.foo": [8],
    "dataset.foo": [8], "dataset.template": ["torchtune.data.AlpacaInstructTemplate"], "checkpointer.foo": [8],
    "model.lora_attn_modules": [DELETE], "tokenizer.path": [DELETE, "/nonexistent/t.model", "${nope}/t.model"],
    "checkpointer.checkpoint_dir": [DELETE, "/nonexistent"], "model": [DELETE, "foo"], "optimizer": [DELETE],
    "batch_size": [DELETE, [1, 2]], "output_dir": [DELETE], "learning_rate": [3e-4], "epochs": ["many"],
    "model.lora_rank": ["eight", -1, "???"], "optimizer.lr": ["3e-4"], "dtype": ["bf17"], "device": ["cudaa"],
    "checkpointer.output_dir": ["${no_such_key}"], "dataset.packed": [True],
}  # fmt: skip
"""facts/torchtune/bad.py: a path, which the refusal names, and what is wrong there."""
FACTS_ELSEWHERE: list[tuple[Changes, str]] = [
    ({"profiler.schedule": {"_component_": "torchtune.nope"}}, "profiler.schedule._component_"),
    ({"dataset": [{"_component_": "torchtune.datasets.nope"}]}, "dataset.0._component_"),
    ({"optimizer._component_": "bitsandbytes.optim.PagedAdamW8bit"}, "optimizer.fused"),
]
"""And those that the refusal names at another path."""
MISTYPED: dict[str, dict[str, list[Any]]] = {
    LORA: {
        "model.lora_rank": [DELETE, 8.5], "model.lora_alpha": [0], "model.lora_dropout": [1.5], "model.embed_dim": [64],
        "model.lora_attn_modules": ["q_proj", ["q_proj", "vproj"], []], "model.apply_lora_to_mlp": [DELETE, "all"],
        "tokenizer.max_seq_len": ["2k"],
        "tokenizer.prompt_template": ["torchtune.data.AlpacaInstructTemplate", {"usr": ["Q: ", "\n"]}],
        "dataset": [None], "dataset.data_files": ["train.jsonl"], "optimizer._component_": ["torch.optim.Adamw"],
        "optimizer": [None, "torch.optim.AdamW", {"_componet_": "torch.optim.AdamW", "lr": 3e-4}],
        "optimizer.weight_decay": [-0.1], "optimizer.betas": [0.9, [0.9], "(0.9, 0.99)"], "lr_scheduler": [None],
        "lr_scheduler.num_warmup_step": [5], "lr_scheduler.num_warmup_steps": ["100"], "loss.ignore_idx": [-1],
        "loss._component_": ["torch.nn.CrossEntropyLos"], "checkpointer.recipe_checkpoint": [5],
        "checkpointer.checkpoint_files": ["model.safetensors", [1], {"filename_format": "{}-{}"}],
        "checkpointer.model_type": ["LLAMA4", "llama3_2", DELETE], "profiler.enabled": ["yes"],
        "profiler.wait_step": [5], "profiler._component_": ["torchtune.training.setup_profiler"],
        "metric_logger": [None], "metric_logger._component_": [f"{LOGGERS}.WandbLogger"],
        "metric_logger.log_dir": ["${outputdir}/logs"], "collate_fn": ["torchtune.data.padded_collat"],
        "batchsize": [4], "max_steps": [100], "training": [{"epochs": 3}], "epochs": [True], "shuffle": ["true"],
        "gradient_accumulation_steps": [True], "max_steps_per_epoch": [0], "seed": ["42"], "output_dir": [None],
        "log_peak_memory_stats": ["no"], "clip_grad_norm": ["max"], "dtype": ["fp16", "float16"],
        "enable_activation_offloading": [True],
    },
    FULL: {"model.lora_rank": [8], "optimizer.fused": [True], "lora_rank": [8], "save_adapter_weights_only": [True]},
    DISTRIBUTED: {"fsdp_cpu_offload": ["no"], "custom_sharded_layers": ["tok_embeddings"]},
    DISTILLATION: {
        "teacher_model": [DELETE], "teacher_model._component_": ["torchtune.models.llama3_1.llama3_1_8x"],
        "teacher_model.lora_rank": [8], "teacher_checkpointer": [DELETE], "kd_loss": [DELETE], "kd_ratio": ["half"],
        "teacher_checkpointer.checkpoint_dir": [DELETE], "teacher_checkpointer.checkpoint_fils": [["x"]],
        "kd_loss._component_": [f"{LOSSES}.ForwardKLLos"], "kd_ration": [0.5], "enable_activation_offloading": [True],
    },
    DPO: {"compile": [True], "dataset.packed": [True], "loss.beta": ["0.1"]},
    PPO: {"epochs": [3], "num_steps": [DELETE], "reward_and_value_model._component_": ["torchtune.models.mistral.x"]},
}  # fmt: skip
MISTYPED_ELSEWHERE: list[tuple[str, Changes, str]] = [
    *(
        (LORA, {"dataset": {**INSTRUCTIONS, key: value}}, f"dataset.{place or key}")
        for key, value, place in (
            ("split", "validation", ""), ("spilt", "train", ""), ("source", "jsonl", "data_files"),
            ("data_file", "train.jsonl", ""), ("column_map", "input", ""), ("column_map", ["input", "output"], ""),
            ("column_map", {"output": "response"}, ""), ("train_on_input", 1, ""), ("new_system_prompt", 5, ""),
        )
    ),
    (LORA, {"dataset": {"_component_": "torchtune.datasets.instruct_dataset"}}, "dataset.source"),
    (LORA, {"dataset": {**CHATS, "conversation_style": "chatml"}}, "dataset.conversation_style"),
    (LORA, {"dataset": CHATS}, "dataset.conversation_style"),
    (LORA, {"dataset": [{"_component_": "torchtune.datasets.alpaca_dataset", "packd": True}]}, "dataset.0.packd"),
    (LORA, {"dataset.packed": "true", "tokenizer.max_seq_len": 512}, "dataset.packed"),
    (LORA, {"model._component_": f"{MODELS}.llama3_2_1b"}, "model.lora_rank"),
    (LORA, {"tokenizer._component_": "torchtune.models.qwen2_5.qwen2_5_tokenizer"}, "tokenizer.merges_file"),
    (LORA, {"lr_scheduler._component_": "torch.optim.lr_scheduler.StepLR"}, "lr_scheduler.step_size"),
    (LORA, {"output_dir": "/tmp/Llama-3.2-1B-Instruct/out"}, "checkpointer.output_dir"),
    (LORA, dict.fromkeys((OFFLOADING, "enable_activation_checkpointing"), True) | {"device": "cpu"}, OFFLOADING),
    (FULL, {"optimizer_in_bwd": True, "gradient_accumulation_steps": 4}, "gradient_accumulation_steps"),
    (FULL, {"optimizer_in_bwd": True, "clip_grad_norm": 1.0}, "clip_grad_norm"),
    (FULL, {"model._component_": f"{MODELS}.lora_llama3_2_1b"}, "model.lora_attn_modules"),
    (FULL, {"model": {"_component_": f"{MODELS}.lora_llama3_2_1b", **QUERIES}}, "model._component_"),
    (LORA, {"model": {"_component_": f"{MODELS}.llama3_2_1b"}}, "model.lora_rank"),
    (DPO, {"loss._component_": f"{LOSSES}.CEWithChunkedOutputLoss"}, "loss.beta"),
]  # fmt: skip
HARMLESS: list[tuple[str, Changes]] = [
    *((name, {}) for name in MISTYPED),
    (LORA, {"metric_logger": WANDB}),
    (LORA, {"metric_logger._component_": f"{LOGGERS}.StdoutLogger"}),
    (LORA, {"profiler": None}),
    (LORA, {"optimizer._component_": "bitsandbytes.optim.PagedAdamW8bit", "optimizer.fused": DELETE}),
    (LORA, {"model.lora_alpha": 16.0, "optimizer.lr": 1, "optimizer.betas": [0.9, 0.99], "optimizer.eps": 1e-6}),
    (LORA, {"tokenizer.prompt_template": {"user": ["Q: ", "\n"], "assistant": ["A: ", ""]}}),
    (LORA, {"tokenizer.prompt_template": "torchtune.models.llama2.Llama2ChatTemplate"}),
    (LORA, {"tokenizer._component_": "my_package.tokenizers.byte_tokenizer"}),
    (LORA, {"checkpointer.checkpoint_files": {"filename_format": "model-{}-of-{}.st", "max_filename": "00002"}}),
    (LORA, {"dataset.split": "train[:10%]", "collate_fn": "torchtune.data.padded_collate_sft"}),
    (LORA, {"loss": {"_component_": "torch.nn.CrossEntropyLoss", "ignore_index": -100}}),
    (FULL, {"lr_scheduler": {"_component_": "torchtune.training.get_cosine_schedule_with_warmup", **WARMUP}}),
    (DISTRIBUTED, {"fsdp_cpu_offload": True, "custom_sharded_layers": ["tok_embeddings", "output"]}),
]  # fmt: skip


def test_every_broken_config_is_refused_with_its_place_and_harmless_ones_are_not(
    environment: torchtune.Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "tokenizers.py").write_text("def byte_tokenizer(path, max_seq_len=None): ...\n")
    monkeypatch.chdir(tmp_path)
    from_facts = [({path: value}, path) for path, values in FACTS.items() for value in values] + FACTS_ELSEWHERE
    assert len(from_facts) == 42 - len(["the empty one", "the harmless one"])
    single = ((name, at, value) for name, paths in MISTYPED.items() for at, values in paths.items() for value in values)
    cases: list[tuple[str, Changes, str | None]] = [
        *((LORA, changes, place) for changes, place in from_facts),
        *((name, {at: value}, at) for name, at, value in single),
        *MISTYPED_ELSEWHERE,
        *((name, changes, None) for name, changes in HARMLESS),
    ]
    assert len(cases) - len(from_facts) - len(HARMLESS) == 104
    wrong = []
    found = find_problems(tmp_path, environment, [(name, changes) for name, changes, _ in cases])
    for (name, changes, place), problems in zip(cases, found, strict=True):
        shown = f"{name} {changes}: expected {place}, found {problems}"
        is_clear = all(problem.what and problem.todo and "object at 0x" not in problem.what for problem in problems)
        for mode in ("own", "set"):
            paths = {problem.path for problem in problems if problem.run == mode and problem.stops_a_start}
            if not is_clear or (place not in paths if place else paths):
                wrong.append(f"{mode} {shown}")
    assert not wrong, "\n".join(wrong)


def test_empty_and_malformed_configs_are_refused_and_the_other_runs_are_checked(
    environment: torchtune.Environment, tmp_path: Path
) -> None:
    runs = []
    for id, text in {"empty": "{}\n", "malformed": "a: '${b'\n", "last": "a: '${b}'\n"}.items():
        (tmp_path / f"{id}.yaml").write_text(text)
        runs.append({"id": id, "file": str(tmp_path / f"{id}.yaml"), "recipe": None, "touched": []})
    found = torchtune.validate(environment, runs)
    assert {(problem.run, problem.path) for problem in found} == {("empty", ""), ("malformed", "a"), ("last", "a")}


def test_missing_files_are_forgiven_but_no_broken_interpolation(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(dump_yaml(experiment(variables={"tokenizer.path": ["${nope}/a.model", "/elsewhere/b.model"]})))
    outcome = run("lacuna", "generate", file, output=tmp_path / "configs")
    assert outcome.code == 2
    assert "tokenizer.path" in outcome.output
    assert "${nope}" in outcome.output
    assert "b.model" not in outcome.output
    assert not (tmp_path / "configs").exists()


# The commands.

SEED_000 = """\
experiment_name: lora_rank_study
base_config: llama3_2/1B_lora_single_device

variables:
  lora_rank: [8, 16, 32, 64]

controls:
  learning_rate: 3e-4
  lora_alpha: 16
  batch_size: 4
  epochs: 3
  dataset:
    _component_: torchtune.datasets.instruct_dataset
    source: json
    data_files: /scratch/data/words_8L_80P_5000.json
    field: train
    packed: true
  output_dir: /scratch/results/lora_study
  metric_logger:
    _component_: torchtune.training.metric_logging.WandBLogger
    project: capitalization
    mode: offline
"""
LINES_000 = """\
✓ Loaded base config: llama3_2/1B_lora_single_device
✓ Generated 4 configs in configs/
  - configs/run_000.yaml (lora_rank=8)
  - configs/run_001.yaml (lora_rank=16)
  - configs/run_002.yaml (lora_rank=32)
  - configs/run_003.yaml (lora_rank=64)
✓ Created run_mapping.yaml
"""


def python(*words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    surroundings = {**os.environ, **environment}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=surroundings, check=False)


WRITER = ("-m", "torchtune_config_writer", "generate", "experiment.yaml")


def test_the_first_example_of_the_config_writer_prints_what_its_plan_shows(tmp_path: Path) -> None:
    """As written, on a machine that has none of its files."""
    (tmp_path / "experiment.yaml").write_text(SEED_000)
    result = python(*WRITER, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, LINES_000)
    configs = [read(tmp_path / "configs" / f"run_{index:03}.yaml") for index in range(4)]
    assert [config["model"]["lora_rank"] for config in configs] == [8, 16, 32, 64]
    assert {config["optimizer"]["lr"] for config in configs} == {3e-4}
    assert configs[3]["output_dir"] == "/scratch/results/lora_study/run_003"
    assert configs[0]["dataset"]["packed"] is True
    assert configs[0]["metric_logger"]["project"] == "capitalization"

    all_runs = "4 runs (run_000 … run_003)"
    assert [line for line in result.stderr.splitlines() if line.startswith("warning: ")] == [
        f"warning: not on this machine, {all_runs}: tokenizer.path there is no file "
        "/tmp/Llama-3.2-1B-Instruct/original/tokenizer.model: download it, or correct the path",
        f"warning: not on this machine, {all_runs}: checkpointer.checkpoint_dir there is no folder "
        "/tmp/Llama-3.2-1B-Instruct/: download the model there, or correct the path",
        f"warning: not on this machine, {all_runs}: dataset.data_files there is no file "
        "/scratch/data/words_8L_80P_5000.json: correct the path",
        f"warning: torchtune would refuse to start {all_runs}: dataset.packed needs tokenizer.max_seq_len, which is "
        "null: set max_seq_len, such as 2048",
    ]
    report = (tmp_path / "configs" / "validation_report.txt").read_text()
    rows = [line.split("\t")[:2] for line in report.splitlines() if line.startswith("run_")]
    paths = ("tokenizer.path", "checkpointer.checkpoint_dir", "dataset.data_files", "dataset.packed")
    assert sorted(rows) == sorted([f"run_{index:03}", path] for index in range(4) for path in paths)


def test_strict_makes_an_error_of_what_could_not_start_here(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(SEED_000)
    result = python(*WRITER, "--strict", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    for path in ("tokenizer.path", "checkpointer.checkpoint_dir", "dataset.data_files", "dataset.packed"):
        assert f"4 runs (run_000 … run_003): {path} " in result.stderr
    assert not (tmp_path / "configs").exists()


CONCEPT_000 = """\
experiment_name: lora_rank_study
base_config: llama3_2/1B_lora_single_device  # Or: base_config_file: /path/to/custom.yaml

variables:  # What varies (independent variables)
  lora_rank: [8, 16, 32, 64]

controls:   # What's constant (controlled variables)
  learning_rate: 3e-4
  batch_size: 16
  epochs: 2
  dataset:
    data_files: /path/to/data.json
    packed: true
"""


def test_the_core_concept_of_the_config_writer_is_written_too(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(CONCEPT_000)
    result = python(*WRITER, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, LINES_000)
    assert "dataset.data_files names files, but the source is the component's own hub data set" in result.stderr
    config = read(tmp_path / "configs" / "run_002.yaml")
    assert (config["model"]["lora_rank"], config["batch_size"], config["epochs"]) == (32, 16, 2)
    assert config["dataset"]["data_files"] == "/path/to/data.json"


GRID_000 = """\
experiment_name: lr_batch_sweep
base_config_file: /scratch/configs/v100_optimized.yaml  # Pre-adapted for V100 GPUs

variables:
  learning_rate: [1e-4, 3e-4, 5e-4]
  batch_size: [2, 4, 8]

controls:
  epochs: 5
  seed: 42
"""


def test_the_second_example_needs_its_base_file_and_nothing_else(tmp_path: Path) -> None:
    """Without the file that it starts from there is nothing to complete; with it there, at a path of this test's."""
    (tmp_path / "experiment.yaml").write_text(GRID_000)
    result = python(*WRITER, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("error: ") == 1
    assert "/scratch/configs/v100_optimized.yaml: " in result.stderr
    base = tmp_path / "scratch" / "configs" / "v100_optimized.yaml"
    base.parent.mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "v100_optimized.yaml", base)
    (tmp_path / "experiment.yaml").write_text(GRID_000.replace("/scratch", str(tmp_path / "scratch")))
    result = python(*WRITER, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "✓ Generated 9 configs in configs/" in result.stdout
    configs = [read(tmp_path / "configs" / f"run_00{index}.yaml") for index in range(9)]
    assert [(config["optimizer"]["lr"], config["batch_size"]) for config in configs] == [
        (rate, size) for rate in (1e-4, 3e-4, 5e-4) for size in (2, 4, 8)
    ]
    assert {(config["epochs"], config["seed"]) for config in configs} == {(5, 42)}


def test_a_misspelled_key_stays_an_error(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(SEED_000.replace("lora_alpha: 16", "lora_alhpa: 16"))
    result = python(*WRITER, cwd=tmp_path)
    assert result.returncode == 2
    assert "experiment.yaml:9: the base config has no 'lora_alhpa'; did you mean 'lora_alpha'?" in result.stderr
    assert not (tmp_path / "configs").exists()


def test_what_could_not_start_is_generated_but_not_started(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("experiment.yaml").write_text(SEED_000.replace("/scratch/results", "results"))
    assert run("lacuna", "generate", "experiment.yaml").code == 0
    for words in (
        ["slurm", "experiment.yaml", "--submit"], ["start", "configs", "1"], ["run", "configs", "--only", "run_002"]
    ):  # fmt: skip
        outcome = run("lacuna", *words)
        assert outcome.code == 2, outcome.output
        for path in ("tokenizer.path", "checkpointer.checkpoint_dir", "dataset.data_files", "dataset.packed"):
            assert f"{path} " in outcome.output, words
    assert "run_002: dataset.packed needs tokenizer.max_seq_len" in outcome.output
    assert run("lacuna", "slurm", "configs").code == 0
    (row,) = json.loads(run("lacuna", "status", "results/lora_study/run_001", "--json").output)
    assert row["state"] == "failed"
    assert "tokenizer.path there is no file" in row["reason"]
    outcome = run("lacuna", "doctor", "configs/run_001.yaml")
    assert outcome.code == 1
    assert "not ready: config" in outcome.output
    assert "run_001: dataset.packed needs tokenizer.max_seq_len" in outcome.output


def test_several_gpus_take_the_distributed_counterpart_and_say_so(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(dump_yaml(experiment(gpus=2, variables={"lora_rank": [8, 16]})))
    outcome = run("lacuna", "generate", file, "--no-validate", output=tmp_path / "configs")
    assert outcome.code == 0
    assert re.search(r"note: gpus: 2 .*llama3_2/1B_lora .*lora_finetune_distributed", outcome.output)
    assert "Loaded base config: llama3_2/1B_lora ✓" in outcome.output
    mapping = read(tmp_path / "configs" / "run_mapping.yaml")
    assert (mapping["recipe"], mapping["gpus"]) == ("lora_finetune_distributed", 2)


def test_a_config_without_a_counterpart_stays_under_the_other_recipe() -> None:
    planned = design(experiment(base_config="llama3_2/1B_qlora_single_device", gpus=4, variables={"epochs": [1, 2]}))
    assert planned.base.recipe == "lora_finetune_distributed"
    assert planned.base.name == "llama3_2/1B_qlora_single_device"
    assert planned.runs[0].values["model"]["_component_"] == "torchtune.models.llama3_2.qlora_llama3_2_1b"
    assert any("lora_finetune_distributed" in note and "1B_qlora_single_device" in note for note in planned.notes)


def test_one_gpu_takes_a_distributed_config_back_to_a_single_device() -> None:
    planned = design(experiment(base_config=DISTRIBUTED, gpus=1, variables={"epochs": [1, 2]}))
    assert (planned.base.name, planned.base.recipe) == (LORA, "lora_finetune_single_device")


def test_one_gpu_keeps_a_distributed_recipe_that_has_no_counterpart(environment: torchtune.Environment) -> None:
    planned = design(experiment(base_config="llama3/8B_qat_full", gpus=1, variables={"epochs": [1, 2]}))
    assert planned.base.recipe == "qat_distributed"
    file = torchtune.find_recipe(environment, "llama3/8B_qat_full", "").file
    own = {"experiment_name": "trial", "base_config_file": str(file), "recipe": "qat_distributed", "gpus": 1}
    assert design({**own, "variables": {"epochs": [1, 2]}}).base.recipe == "qat_distributed"


def test_a_distributed_recipe_is_started_by_torchrun_even_on_one_device(environment: torchtune.Environment) -> None:
    command = torchtune.command(environment, "lora_finetune_distributed", 1, "run_000.yaml")
    assert command[1:4] == ["run", "--nproc_per_node", "1"]


def test_a_recipe_without_a_counterpart_is_refused() -> None:
    with pytest.raises(ConfigError, match="ppo_full_finetune_distributed"):
        design(experiment(base_config=PPO, gpus=2, variables={"seed": [1, 2]}))


def test_an_unknown_config_is_told_the_nearest_and_its_whole_family(
    run: Run, environment: torchtune.Environment, tmp_path: Path
) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(dump_yaml(experiment(base_config="llama3_2/1B_lora_singel_device", variables={"seed": [1]})))
    outcome = run("lacuna", "generate", file, output=tmp_path / "configs")
    assert outcome.code == 2
    assert "did you mean 'llama3_2/1B_lora_single_device'?" in outcome.output
    family = [recipe.config for recipe in torchtune.recipes(environment) if recipe.config.startswith("llama3_2/")]
    assert len(family) == 15
    assert all(name in outcome.output for name in family)
    assert f"{file}:2" in outcome.output


LISTS = """
import sys
from lacuna.cli import main as cli
sys.argv = ["lacuna", "recipes", "llama3_2/1B"]
try:
    cli.main()
except SystemExit as end:
    assert not end.code
print(sorted({"torch", "torchtune", "numpy"} & sys.modules.keys()), file=sys.stderr)
"""


def test_recipes_lists_model_method_devices_without_importing_torch(tmp_path: Path) -> None:
    result = python("-c", LISTS, cwd=tmp_path)
    assert result.stderr.strip() == "[]"
    table = [re.split(r"  +", line) for line in result.stdout.splitlines()]
    assert table[0] == ["config", "model", "method", "devices", "recipe"]
    assert [DISTRIBUTED, "llama3_2 1B", "LoRA", "several", "lora_finetune_distributed"] in table
    assert ["llama3_2/1B_qlora_single_device", "llama3_2 1B", "QLoRA", "one", "lora_finetune_single_device"] in table
    assert {row[0].split("_")[1] for row in table[1:]} == {"2/1B"}


def test_an_own_file_is_taken_for_the_recipe_it_resembles(environment: torchtune.Environment, tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    for name in (LORA, FULL, DISTRIBUTED, DISTILLATION, DPO, PPO):
        recipe = torchtune.find_recipe(environment, name, "")
        own.write_text(dump_yaml(merge(read_layer(recipe.file).values, {"seed": 5})))
        gpus = {"gpus": 2} if recipe.distributed else {}
        settings = {"experiment_name": "trial", "base_config_file": str(own), "variables": {"seed": [1, 2]}, **gpus}
        planned = design(settings)
        assert planned.base.recipe == recipe.recipe
        assert any(name in note and recipe.recipe in note for note in planned.notes)


def test_a_python_without_torchtune_is_refused(run: Run) -> None:
    outcome = run("lacuna", "recipes", torchtune_python=sys.executable)
    assert outcome.code == 2
    assert f"{sys.executable}: this Python has no torchtune" in outcome.output
    assert "make torchtune" in outcome.output
    assert run("lacuna", "recipes", torchtune_python="/nonexistent/python").code == 2
    assert run("lacuna", "recipes", "1B_lora", torchtune_python=TORCHTUNE_PYTHON).code == 0


def test_without_torchtune_recipes_says_how_to_get_it_and_an_own_file_still_generates(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    alone = {"PYTHONPATH": str(tmp_path / "src"), "PATH": "/usr/bin:/bin"}
    (tmp_path / "mine.yaml").write_text("output_dir: /runs\nseed: null\noptimizer: {lr: 3e-4}\n")
    own = {"experiment_name": "trial", "base_config_file": "mine.yaml", "variables": {"learning_rate": [1e-4, 3e-4]}}
    (tmp_path / "experiment.yaml").write_text(dump_yaml(own))
    listing = python("-m", "torchtune_config_writer", "recipes", cwd=tmp_path, **alone)
    assert listing.returncode == 2
    assert "make torchtune" in listing.stderr
    assert "lacuna[torchtune]" in listing.stderr
    result = python(*WRITER, cwd=tmp_path, **alone)
    assert result.returncode == 0, result.stderr
    assert "torchtune was not found" in result.stderr
    assert [read(tmp_path / "configs" / f"run_00{index}.yaml")["optimizer"]["lr"] for index in (0, 1)] == [1e-4, 3e-4]
    (tmp_path / "experiment.yaml").write_text(dump_yaml(experiment(variables={"learning_rate": [1e-4]})))
    refused = python(*WRITER, "--output", "others", cwd=tmp_path, **alone)
    assert refused.returncode == 2
    assert "make torchtune" in refused.stderr


# The builder.


def test_all_methods_of_the_builder_make_a_valid_config(llama: Path, rows: Path) -> None:
    builder = (
        TorchtuneConfigBuilder(LORA)
        .with_dataset(str(rows))
        .with_dataset_template("torchtune.data.SummarizeTemplate")
        .with_output_dir("results/all")
        .with_learning_rate(1e-4)
        .with_batch_size(2)
        .with_epochs(3)
        .with_lora_params(32, 64)
        .with_gradient_accumulation_steps(4)
        .with_max_seq_length(512)
        .with_seed(42)
        .with_dtype("fp32")
        .with_activation_checkpointing(True)
        .with_packed(True)
        .with_compile(True)
    )
    assert builder.validate() is builder
    base = read_layer(torchtune.find_recipe(torchtune.need_environment(None), LORA, "").file).values
    before, after = dict(leaves(base)), dict(leaves(builder.build()))
    assert {path: value for path, value in after.items() if before.get(path, ...) != value} == {
        "dataset._component_": "torchtune.datasets.instruct_dataset", "dataset.source": "json",
        "dataset.data_files": str(rows), "dataset.split": "train", "dataset.packed": True,
        "tokenizer.prompt_template": "torchtune.data.SummarizeTemplate", "tokenizer.max_seq_len": 512,
        "output_dir": "results/all", "optimizer.lr": 1e-4, "batch_size": 2, "epochs": 3, "model.lora_rank": 32,
        "model.lora_alpha": 64, "seed": 42, "dtype": "fp32", "enable_activation_checkpointing": True, "compile": True,
        "gradient_accumulation_steps": 4,
    }  # fmt: skip


def test_the_builder_raises_all_problems_at_once() -> None:
    builder = TorchtuneConfigBuilder(LORA).with_dtype("fp16").with_packed(True).override({"+model.lora_rnk": 4})
    with pytest.raises(ConfigError) as caught:
        builder.validate()
    (problem,) = caught.value.problems
    assert "model.lora_rnk" in problem
    with pytest.raises(ConfigError) as caught:
        builder.validate(here=True)
    found = "\n".join(caught.value.problems)
    missing = ("tokenizer.path", "checkpointer.checkpoint_dir")
    assert all(f"config: {path} " in found for path in ("dtype", "dataset.packed", "model.lora_rnk", *missing))


def test_a_template_that_torchtune_has_dropped_is_written_as_what_gives_the_same_prompts(
    environment: torchtune.Environment,
) -> None:
    """The right texts are those of torchtune 0.2.1's own classes, for a system text, two questions and two answers."""
    chat = [["system", "S"], ["user", "U1"], ["assistant", "A1"], ["user", "U2"], ["assistant", "A2"]]
    begin = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    system = "<<SYS>>\nS\n<</SYS>>\n\n"
    im = "<|im_start|>{}\n{}<|im_end|>"
    right = {
        "AlpacaInstructTemplate": [f"{begin}\n\n### Instruction:\nU1\n\n### Response:\n"],
        "StackExchangedPairedTemplate": ["Question: U1\n\nAnswer: "],
        "ChatMLFormat": [
            im.format("system", "S") + "\n", im.format("user", "U1") + "\n", im.format("assistant", "A1"),
            im.format("user", "U2") + "\n", im.format("assistant", "A2"),
        ],
        "Llama2ChatFormat": [f"[INST] {system}U1 [/INST] ", "A1", f"[INST] {system}U2 [/INST] ", "A2"],
        "MistralChatFormat": ["[INST] U1 [/INST] ", "A1", "[INST] U2 [/INST] ", "A2"],
    }  # fmt: skip
    assert right.keys() == DROPPED.keys()
    asked = {}
    for name, texts in right.items():
        with pytest.warns(UserWarning, match=f"torchtune 0.6.1 has no torchtune.data.{name}: it is written as"):
            builder = TorchtuneConfigBuilder(LORA).with_dataset_template(f"torchtune.data.{name}")
        messages = chat[1:2] if len(texts) == 1 else chat[1:] if name.startswith("Mistral") else chat
        asked[name] = (builder.build()["tokenizer"]["prompt_template"], messages)
    code = (
        "import json, sys\nfrom torchtune.data import Message\n"
        "from torchtune.data._prompt_templates import _get_prompt_template as get\n"
        "print(json.dumps({name: [m.text_content for m in get(template)([Message(role=r, content=c) for r, c in chat])]"
        " for name, (template, chat) in json.load(sys.stdin).items()}))"
    )
    words = [environment.python, "-c", code]
    answer = subprocess.run(words, input=json.dumps(asked), capture_output=True, text=True, check=True).stdout
    assert json.loads(answer) == right


def test_a_dropped_template_is_translated_in_an_experiment_and_a_base_file_too(run: Run, tmp_path: Path) -> None:
    text = experiment(base_config="gemma/2B_lora_single_device", variables={"learning_rate": [1e-4, 2e-4]})
    text["controls"] = {"+prompt_template": "torchtune.data.AlpacaInstructTemplate", "seed": 1}
    (tmp_path / "experiment.yaml").write_text(dump_yaml(text))
    outcome = run("lacuna", "generate", tmp_path / "experiment.yaml", output=tmp_path / "configs")
    assert outcome.code == 0, outcome.output
    assert outcome.output.count("note: tokenizer.prompt_template: torchtune 0.6.1 has no torchtune.data.Alpaca") == 1
    template = read(tmp_path / "configs" / "run_001.yaml")["tokenizer"]["prompt_template"]
    assert template == DROPPED["AlpacaInstructTemplate"]
    old = {**read(tmp_path / "configs" / "run_000.yaml"), "seed": 3}
    old["tokenizer"]["prompt_template"] = "ChatMLFormat"
    with pytest.warns(UserWarning, match="torchtune 0.6.1 has no ChatMLFormat"):
        builder = TorchtuneConfigBuilder.from_dict(old)
    assert builder.build()["tokenizer"]["prompt_template"] == DROPPED["ChatMLFormat"]


def test_line_breaks_that_llama_3s_tokenizer_strips_from_a_template_are_told(run: Run, tmp_path: Path) -> None:
    """findings/torchtune_llama3_prompt_template.sh shows what the model sees of them."""
    told = "tokenizer.prompt_template has line breaks or spaces next to the text, which torchtune's Llama 3 tokenizer"
    for template, is_told in (
        ("torchtune.data.SummarizeTemplate", True), ({"user": ["Q: ", "A:"]}, True), ({"user": ["Q:", "A:"]}, False),
    ):  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            TorchtuneConfigBuilder(LORA).override({"+prompt_template": template}).validate()
        assert [str(warning.message).startswith(f"config: {told}") for warning in caught] == [True] * is_told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gemma = TorchtuneConfigBuilder("gemma/2B_lora_single_device")
        gemma.override({"+prompt_template": "torchtune.data.SummarizeTemplate"}).validate()


def test_the_usage_patterns_of_the_builders_plan_work_as_written(tmp_path: Path, monkeypatch: Any) -> None:
    """Patterns 1 and 2; the third is test_a_base_adapted_once_is_swept_from_its_file."""
    monkeypatch.chdir(tmp_path)
    builder = TorchtuneConfigBuilder("llama3_1/8B_lora_single_device")
    builder.with_dataset("data/my_data.json")
    with pytest.warns(UserWarning, match="it is written as the texts before and after each role's"):
        builder.with_dataset_template("torchtune.data.AlpacaInstructTemplate")
    builder.with_learning_rate(3e-4)
    builder.with_lora_params(32, 64)  # rank=32, alpha=64
    builder.with_gradient_accumulation_steps(8)
    builder.with_epochs(3)
    builder.with_seed(42)
    assert dict(leaves(builder.build())).items() >= {
        "dataset.data_files": "data/my_data.json", "dataset.source": "json", "optimizer.lr": 3e-4,
        "model.lora_rank": 32, "model.lora_alpha": 64, "gradient_accumulation_steps": 8, "epochs": 3, "seed": 42,
        "tokenizer.prompt_template.user": DROPPED["AlpacaInstructTemplate"]["user"],
    }.items()  # fmt: skip
    builder.with_batch_size(2)
    builder.with_activation_checkpointing(True)
    builder.with_output_dir("results/exp_001")
    builder.override({"dtype": "bf16"})
    builder.override({"packed": True})  # Enable packing for speed
    builder.override({"compile": True})  # Enable torch.compile for speed
    with pytest.warns(UserWarning, match=r"torchtune would refuse to start config: dataset\.packed needs"):
        assert builder.validate() is builder
    assert builder.build()["dataset"]["packed"] is builder.build()["compile"] is True


def test_the_checks_of_the_builder_can_do_without_torchtunes_process(tmp_path: Path) -> None:
    """As when one run starts, and torchtune will say the rest by itself: nothing is asked, so no file is needed."""
    base = load_recipe(LORA, "", None, None)
    values = merge(base.values, {"dataset": {"packed": True}, "model": {"lora_rnk": 4}})
    found = check_configs(base, {"config": values}, [], tmp_path, asks_torchtune=False)
    assert {problem.path for problem in found if problem.kind != "here"} == {"dataset.packed"}


def test_the_builder_lists_what_is_available() -> None:
    available = TorchtuneConfigBuilder.list_available()
    assert len(available) == 155
    assert TorchtuneConfigBuilder.list_available("3_2/1B_lora") == [LORA, DISTRIBUTED]


def test_a_base_adapted_once_is_swept_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    builder = TorchtuneConfigBuilder("llama3_1/8B_lora_single_device")
    builder.with_batch_size(1)
    builder.with_activation_checkpointing(True)
    builder.save("configs/v100_base.yaml")
    rates = [1e-4, 3e-4, 5e-4, 1e-3]
    for lr in rates:
        builder = TorchtuneConfigBuilder.from_file("configs/v100_base.yaml")
        builder.with_learning_rate(lr)
        builder.with_output_dir(f"results/lr_{lr}")
        builder.save(f"configs/lr_{lr}.yaml")
        builder.validate()
    saved = [read(Path(f"configs/lr_{lr}.yaml")) for lr in rates]
    assert [config["optimizer"]["lr"] for config in saved] == rates
    assert [config["output_dir"] for config in saved] == [f"results/lr_{lr}" for lr in rates]
    assert {(config["batch_size"], config["enable_activation_checkpointing"]) for config in saved} == {(1, True)}
    assert read(Path("configs/lr_0.001.meta.yaml"))["source"]["file"] == "configs/v100_base.yaml"


# Training.


def test_four_learning_rates_train_to_four_different_losses(llama: Path, rows: Path, tmp_path: Path) -> None:
    controls = {**tiny_controls(llama, rows, "lora_llama3_2"), "output_dir": str(tmp_path / "runs")}
    lora = experiment(variables={"learning_rate": [1e-3, 3e-3, 1e-2, 3e-2]}, controls=controls)
    done = generate(lora, tmp_path / "configs")
    commands = [[*done.command[:-1], str(tmp_path / "configs" / f"{run.id}.yaml")] for run in done.runs]
    assert commands[0] == done.command
    train(*commands[:2])
    train(*commands[2:])
    curves = [losses(run.output_dir) for run in done.runs]
    assert [len(curve) for curve in curves] == [8] * 4
    assert all(curve[-1] < curve[0] for curve in curves)
    assert len({curve[0] for curve in curves}) == 1
    assert len({curve[-1] for curve in curves}) == 4
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [run.id for run in done.runs]


def test_full_fine_tuning_and_lora_on_two_processes_train(llama: Path, rows: Path, tmp_path: Path) -> None:
    tiny = tiny_controls(llama, rows, "llama3_2")
    full = {**tiny, "optimizer": {"_component_": "torch.optim.AdamW"}, "optimizer_in_bwd": False}
    lora = tiny_controls(llama, rows, "lora_llama3_2")
    (tmp_path / "gloo.py").write_text(GLOO)
    for name, controls, settings in (("full", full, {"base_config": FULL}), ("two", lora, {"gpus": 2})):
        controls = {**controls, "output_dir": str(tmp_path / "runs" / name)}
        settings = experiment(variables={"learning_rate": [1e-2]}, controls=controls, **settings)
        done = generate(settings, tmp_path / name, validate=False)
        train(["gloo.py" if word == "lora_finetune_distributed" else word for word in done.command], cwd=tmp_path)
        curve = losses(done.runs[0].output_dir)
        assert len(curve) == 8
        assert curve[-1] < curve[0]
    assert done.command[1:5] == ["run", "--nproc_per_node", "2", "lora_finetune_distributed"]


def pretended_environment(folder: Path, version: str) -> str:
    """A Python that finds a torchtune of this version, which has nothing in it."""
    (folder / "torchtune").mkdir()
    (folder / "torchtune" / "__init__.py").write_text("")
    (folder / f"torchtune-{version}.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: torchtune\nVersion: {version}\n"
    (folder / f"torchtune-{version}.dist-info" / "METADATA").write_text(metadata)
    (folder / "python").write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} -S "$@"\n')
    (folder / "python").chmod(0o755)
    return str(folder / "python")


def test_another_version_of_torchtune_is_refused(run: Run, tmp_path: Path) -> None:
    outcome = run("lacuna", "recipes", torchtune_python=pretended_environment(tmp_path, "0.5.0"))
    assert outcome.code == 2
    assert "has torchtune 0.5.0; lacuna knows 0.6.1" in outcome.output


def test_an_environment_that_cannot_run_the_checks_is_named(tmp_path: Path) -> None:
    python = pretended_environment(tmp_path, "0.6.1")
    with pytest.raises(ConfigError, match=f"could not run with {re.escape(python)}: ModuleNotFoundError"):
        torchtune.validate(torchtune.Environment(python, tmp_path), [{"id": "a", "file": "a.yaml", "touched": []}])


def test_the_recipe_of_an_own_file_can_be_named(environment: torchtune.Environment, tmp_path: Path) -> None:
    file = torchtune.find_recipe(environment, LORA, "").file
    own = {"experiment_name": "trial", "base_config_file": str(file), "variables": {"epochs": [1, 2]}}
    named = design({**own, "recipe": "lora_finetune_single_device", "gpus": 2})
    assert named.base.recipe == "lora_finetune_distributed"
    assert "gpus: 2 takes the recipe lora_finetune_distributed" in named.notes
    with pytest.raises(ConfigError, match="no 'lora_finetune'; did you mean 'lora_finetune_"):
        design({**own, "recipe": "lora_finetune"})
    with pytest.raises(ConfigError, match="recipe goes with base_config_file"):
        design(experiment(recipe="lora_finetune_single_device", variables={"epochs": [1, 2]}))


def test_an_own_recipe_script_says_what_it_reads(
    environment: torchtune.Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_recipe.py").write_text("def main(cfg):\n    return cfg.epochs, cfg.get('my_key'), cfg['other']\n")
    Path("mine.yaml").write_text("output_dir: out\nepochs: 1\nmy_key: 1\nother: 2\nmy_kee: 3\n")
    own = {"experiment_name": "trial", "base_config_file": "mine.yaml", "recipe": "my_recipe.py"}
    planned = design({**own, "variables": {"epochs": [1, 2]}})
    assert planned.base.recipe == "my_recipe.py"
    facts = torchtune.facts_of(environment, "my_recipe.py")
    found = list(check_recipe(facts, planned.runs[0].values, planned.touched, is_shipped=False))
    assert [problem.path for problem in found] == ["output_dir", "my_kee"]
    assert "did you mean 'my_key'?" in found[1].what


def test_a_distributed_config_asks_for_the_number_of_devices() -> None:
    planned = design(experiment(base_config=DISTRIBUTED, variables={"epochs": [1, 2]}))
    assert any(
        "is for several devices (lora_finetune_distributed): say how many, as gpus: 2" in n for n in planned.notes
    )
