"""From experiment.yaml to configs, without any torchtune: names, values, runs, notes, and the folder they go to."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import yaml

import lacuna
from conftest import SCRIPTS, Outcome, Run, spawn
from lacuna.config.names import find_path, value_problem
from lacuna.config.training import FLAT as TRAINERS
from lacuna.config.yaml_format import dump_yaml
from lacuna.errors import ConfigError
from lacuna.experiment.base import Base
from lacuna.experiment.checks import check_run
from lacuna.experiment.confounds import find_confounds
from lacuna.experiment.design import Design, design
from lacuna.runs.mapping import read_mapping

ROOT = Path(__file__).parents[2]
BASE = """\
output_dir: /tmp/out
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: /models/tokenizer.model
  max_seq_len: null
model:
  _component_: torchtune.models.llama3_2.lora_llama3_2_1b
  lora_attn_modules: [q_proj, v_proj]
  lora_rank: 64
  lora_alpha: 128
optimizer:
  _component_: torch.optim.AdamW
  lr: 3e-4
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: false
dataloader:
  shuffle: true
metric_logger:
  log_dir: ${output_dir}/logs
prompts: {system: none}
batch_size: 2
gradient_accumulation_steps: 8
epochs: 1
max_steps_per_epoch: null
seed: null
dtype: bf16
"""
OWN = {"experiment_name": "study", "base_config_file": "base.yaml", "recipe": "lora_finetune_single_device"}
SFT = {"experiment_name": "study", "base_config_file": str(ROOT / "configs" / "sft_qwen.toml")}
PRETRAIN = {"experiment_name": "study", "base_config_file": str(ROOT / "configs" / "pretrain_qwen.toml")}
RANKS = {"lora_rank": [8, 16]}
RATES = {"learning_rate": [1e-4, 3e-4]}
Settings = dict[str, Any]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "data.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    return tmp_path


def plan(base: Settings = OWN, **changes: Any) -> Design:
    return design({**base, **changes})


def problems(base: Settings = OWN, **changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        plan(base, **changes)
    return "\n".join(error.value.problems)


def write(text: str | Settings, name: str = "experiment.yaml") -> str:
    Path(name).write_text(text if isinstance(text, str) else dump_yaml(text))
    return name


def everything(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def column(found: Design, path: str) -> list[Any]:
    values = []
    for run in found.runs:
        value: Any = run.values
        for key in path.split("."):
            value = value[key]
        values.append(value)
    return values


GRID = """\
experiment_name: lr_batch_sweep
base_config_file: base.yaml  # Pre-adapted for V100 GPUs

variables:
  learning_rate: [1e-4, 3e-4, 5e-4]
  batch_size: [2, 4, 8]

controls:
  epochs: 5
  seed: 42
"""


def test_the_grid_of_the_plan_gives_nine_configs(run: Run, folder: Path) -> None:
    outcome = run("lacuna", "generate", write(GRID), "--no-validate")
    assert outcome.code == 0, outcome.output
    shown = [f"- configs/run_{i:03d}.yaml" for i in range(9)]
    assert all(line in outcome.output for line in shown)
    assert "✓ Loaded base config: base.yaml ✓ Generated 9 configs in configs/ - configs/run_000" in outcome.output
    assert "- configs/run_000.yaml (learning_rate=0.0001, batch_size=2) - configs/run_001.yaml" in outcome.output
    assert "- configs/run_008.yaml (learning_rate=0.0005, batch_size=8) ✓ Created run_mapping.yaml" in outcome.output
    assert "start one: " in outcome.output
    assert "not validated" in outcome.output
    configs = [yaml.safe_load((folder / "configs" / f"run_{i:03d}.yaml").read_text()) for i in range(9)]
    grid = [(config["optimizer"]["lr"], config["batch_size"]) for config in configs]
    assert grid == [(lr, batch) for lr in (1e-4, 3e-4, 5e-4) for batch in (2, 4, 8)]
    base = yaml.safe_load(BASE)
    for index, config in enumerate(configs):
        changed = {"output_dir": f"/tmp/out/run_{index:03d}", "epochs": 5, "seed": 42, "batch_size": grid[index][1]}
        assert config == {**base, **changed, "optimizer": {**base["optimizer"], "lr": grid[index][0]}}


def test_the_mapping_says_what_each_run_is(run: Run, folder: Path) -> None:
    text = {**OWN, "question": "why?", "variables": RANKS, "seeds": [7], "controls": {"output_dir": "out"}}
    assert run("lacuna", "generate", write(text), "--no-validate", output="made").code == 0
    mapping = yaml.safe_load((folder / "made" / "run_mapping.yaml").read_text())
    assert list(mapping) == ["experiment", "trainer", "base", "directory", "recipe", "gpus", "runs"]
    assert mapping["directory"] == ".."
    assert mapping["experiment"] == text
    assert (mapping["trainer"], mapping["recipe"], mapping["gpus"]) == ("torchtune", text["recipe"], 1)
    digest = hashlib.sha256((folder / "made" / "run_001.yaml").read_bytes()).hexdigest()
    assert mapping["runs"][1] == {
        "id": "run_001", "params": {"lora_rank": 16}, "seed": 7, "config": "run_001.yaml", "sha256": digest,
        "output_dir": "out/run_001",
    }  # fmt: skip
    assert len(mapping["runs"]) == 2


def test_runs_are_found_from_any_directory_and_after_a_move(
    run: Run, folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    study = write({**OWN, "variables": RANKS, "controls": {"output_dir": "out"}})
    monkeypatch.setenv("HOME", str(folder.parent))
    for output in (folder / "made", elsewhere / "made"):
        assert run("lacuna", "generate", study, "--no-validate", output=output).code == 0
    assert f"\ndirectory: ~/{folder.name}\n" in (elsewhere / "made" / "run_mapping.yaml").read_text()
    assert read_mapping("made").run(1).folder == Path("out/run_001")
    monkeypatch.chdir(elsewhere)
    for made in (folder / "made", elsewhere / "made"):
        assert Path(str(read_mapping(made).run(1).folder)).resolve() == folder / "out/run_001"
    folder.rename(elsewhere / "moved")
    assert read_mapping("moved/made").run(1).folder == Path("moved/out/run_001")
    assert read_mapping("made").run(1).folder == Path("out/run_001")


def test_the_mapping_keeps_how_the_runs_start_on_the_cluster(run: Run, folder: Path) -> None:
    slurm = {"partition": "gpu", "environment": {"HF_HUB_OFFLINE": "1"}}
    (folder / "study.yaml").write_text(dump_yaml({**OWN, "variables": RANKS, "slurm": slurm}))
    assert run("lacuna", "generate", "study.yaml", "--no-validate").code == 0
    written = yaml.safe_load((folder / "configs" / "run_mapping.yaml").read_text())
    assert written["experiment"]["slurm"] == slurm


def test_json_is_the_mapping_alone_on_standard_output(folder: Path) -> None:
    words = [str(SCRIPTS / "lacuna"), "generate", write({**OWN, "variables": RANKS}), "--json", "--no-validate"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["output"] == "configs"
    assert [run["params"] for run in answer["runs"]] == [{"lora_rank": 8}, {"lora_rank": 16}]
    assert any("lora_alpha is 128 in every run" in note for note in answer["notes"])
    assert "note: confound" in done.stderr


def test_the_same_experiment_gives_the_same_bytes(folder: Path) -> None:
    write({**OWN, "variables": {**RANKS, **RATES}, "seeds": [1, 2], "tags": ["a", "b"]})
    for seed in ("1", "2"):
        words = [str(SCRIPTS / "lacuna"), "generate", "experiment.yaml", "--no-validate", "--output", f"out{seed}/c"]
        subprocess.run(words, check=True, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
    assert everything(folder / "out1") == everything(folder / "out2")
    assert len(everything(folder / "out1")) == 9


def test_a_long_list_is_cut_and_numbers_grow_wider(run: Run, folder: Path) -> None:
    write({**OWN, "variables": {"epochs": list(range(1, 1002))}})
    outcome = run("lacuna", "generate", "experiment.yaml", "--no-validate")
    assert "… and 981 more, to run_1000.yaml" in outcome.output
    assert (folder / "configs" / "run_0000.yaml").exists()


def test_an_experiment_in_toml_with_its_base_beside_it(run: Run, folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "base.yaml").rename(folder / "sub" / "base.yaml")
    write('experiment_name = "e"\nbase_config_file = "base.yaml"\n[variables]\nlora_rank = [8]\n', "sub/e.toml")
    outcome = run("lacuna", "generate", "sub/e.toml", "--no-validate")
    assert outcome.code == 0, outcome.output
    assert "Generated 1 config in configs/ - configs/run_000.yaml (lora_rank=8)" in outcome.output


def test_python_gets_what_the_command_writes(run: Run, folder: Path) -> None:
    experiment = {**OWN, "variables": RANKS}
    before = json.dumps(experiment)
    done = lacuna.generate(experiment, "python", validate=False)
    assert run("lacuna", "generate", write(experiment), "--no-validate", output="command").code == 0
    assert everything(folder / "python") == everything(folder / "command")
    assert [made.settings for made in done.runs] == [{"lora_rank": 8}, {"lora_rank": 16}]
    assert json.dumps(experiment) == before
    with pytest.raises(AttributeError):
        _ = lacuna.nothing


def test_flat_dotted_nested_and_new_names_go_to_their_places() -> None:
    controls = {"model": {"lora_alpha": 16}, "dataset.packed": True, "+max_seq_len": 512, "+a.b": [1], "shuffle": False}
    found = plan(variables={"optimizer.lr": [1e-3], **RANKS}, controls=controls)
    (values, _) = (run.values for run in found.runs)
    assert (values["optimizer"]["lr"], values["model"]["lora_rank"], values["model"]["lora_alpha"]) == (1e-3, 8, 16)
    assert (values["dataset"]["packed"], values["tokenizer"]["max_seq_len"], values["a"]) == (True, 512, {"b": [1]})
    assert values["dataloader"]["shuffle"] is False
    assert values["model"]["lora_attn_modules"] == ["q_proj", "v_proj"]
    assert found.touched == [
        "a.b", "dataloader.shuffle", "dataset.packed", "model.lora_alpha", "model.lora_rank", "optimizer.lr",
        "tokenizer.max_seq_len",
    ]  # fmt: skip


def test_the_caller_and_the_base_stay_as_they_are() -> None:
    modules = ["q_proj"]
    found = plan(variables=RANKS, controls={"lora_attn_modules": modules})
    assert column(found, "model.lora_attn_modules") == [["q_proj"], ["q_proj"]]
    assert found.base.values == yaml.safe_load(BASE.replace("3e-4", "0.0003"))
    assert modules == ["q_proj"]


def test_seeds_are_a_factor_of_their_own() -> None:
    found = plan(variables=RANKS, seeds=[1, 2])
    assert column(found, "seed") == [1, 2, 1, 2]
    assert [(run.settings, run.seed) for run in found.runs][1] == ({"lora_rank": 8}, 2)
    assert any("seeds vary the adapters' start" in note for note in found.notes)
    assert column(plan(variables={"seed": [3, 4]}), "seed") == [3, 4]


def test_derived_values_follow_variables_controls_and_the_base() -> None:
    derived = {"lora_alpha": "2 * lora_rank", "+half": "lora_alpha / 4", "max_steps_per_epoch": "epochs * 8 / 2"}
    found = plan(variables=RANKS, derived=derived)
    assert (column(found, "model.lora_alpha"), column(found, "half")) == ([16, 32], [4.0, 8.0])
    assert column(found, "max_steps_per_epoch") == [4, 4]
    assert not any("lora_alpha is" in note for note in found.notes)


def test_paired_settings_move_together_and_excluded_ones_stay_away() -> None:
    paired = [{"lora_rank": 8, "batch_size": 4}, {"lora_rank": 64, "batch_size": 1}]
    found = plan(paired=paired, variables=RATES, exclude=[{"lora_rank": 8, "learning_rate": 3e-4}])
    rows = zip(*(column(found, name) for name in ("optimizer.lr", "model.lora_rank", "batch_size")), strict=True)
    assert list(rows) == [(1e-4, 8, 4), (1e-4, 64, 1), (3e-4, 64, 1)]
    assert [run.id for run in found.runs] == ["run_000", "run_001", "run_002"]


def test_a_tilde_deletes_and_the_place_can_be_filled_anew() -> None:
    found = plan(variables=RANKS, controls={"~dataset": None, "+dataset": {"_component_": "x"}, "~learning_rate": None})
    assert column(found, "dataset")[0] == {"_component_": "x"}
    assert column(found, "optimizer")[0] == {"_component_": "torch.optim.AdamW"}


def test_names_in_texts_are_filled_wherever_they_stand() -> None:
    controls = {
        "prompts": {"system": "rank {lora_rank}"}, "+notes": [{"a": "{experiment_name} {seed}"}, 1],
        "metric_logger.log_dir": "${output_dir}/{{x}}",
    }  # fmt: skip
    found = plan(variables={**RANKS, "+text": ["r{lora_rank}"]}, seeds=[5], controls=controls)
    assert column(found, "prompts.system") == ["rank 8", "rank 16"]
    assert column(found, "notes")[1] == [{"a": "study 5"}, 1]
    assert column(found, "text") == ["r8", "r16"]
    assert column(found, "metric_logger.log_dir")[0] == "${output_dir}/{{x}}"


@pytest.mark.parametrize(
    ("given", "folders"),
    [
        ("/s/out", ["/s/out/run_000", "/s/out/run_001"]),
        ("/s/out/", ["/s/out/run_000", "/s/out/run_001"]),
        ("out/rank_{lora_rank}", ["out/rank_8", "out/rank_16"]),
        ("out/alpha_{lora_alpha}", ["out/alpha_16", "out/alpha_32"]),
        ("out/own_{own}", ["out/own_9", "out/own_17"]),
        ("{experiment_name}", ["study/run_000", "study/run_001"]),
        ("{name}/x", ["org_m/x/run_000", "org_m/x/run_001"]),
    ],
)
def test_each_run_has_its_own_folder(given: str, folders: list[str]) -> None:
    controls = {"output_dir": given, "+name": "org/m"}
    found = plan(variables=RANKS, derived={"lora_alpha": "2 * lora_rank", "+own": "lora_rank + 1"}, controls=controls)
    assert column(found, "output_dir") == [run.output_dir for run in found.runs] == folders


def test_an_output_dir_that_varies_is_taken_as_it_is() -> None:
    assert column(plan(variables={"output_dir": ["a", "b"]}), "output_dir") == ["a", "b"]


def test_a_base_without_output_dir_gives_none(folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE.replace("output_dir: /tmp/out\n", "").replace("${output_dir}", "/x"))
    assert [run.output_dir for run in plan(variables={"epochs": [1]}).runs] == [None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variables": {**RANKS, **RATES}, "controls": {"output_dir": "out/{lora_rank}"}}, "run_001 share out/8"),
        ({"variables": RANKS, "seeds": [1, 2], "controls": {"output_dir": "out/{lora_rank}"}}, "share out/8"),
        ({"variables": {"output_dir": ["out", "out/"]}}, "run_000 and run_001 share out"),
        ({"variables": {"output_dir": ["out", "out/b"]}}, "out/b, lies in that of run_000"),
        ({"variables": {"output_dir": ["out/b", "out"]}}, "out/b, lies in that of run_001"),
        ({"variables": RANKS, "controls": {"output_dir": "out/{lora_rnk}"}}, "{lora_rnk} is unknown; did you mean"),
        ({"variables": RANKS, "controls": {"metric_logger": {"log_dir": "logs"}}}, "run_000 and run_001 share logs"),
    ],
)  # fmt: skip
def test_runs_never_share_a_folder(changes: Settings, message: str) -> None:
    assert message in problems(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_config": "a/b"}, "either base_config"),
        ({"base_config_file": None}, "either base_config"),
        ({"experiment_name": ""}, "'experiment_name' is ''"),
        ({"variable": {}}, "unknown setting 'variable'; did you mean 'variables'?"),
        ({"variables": {"lora_rank": 8, "epochs": []}}, "'lora_rank' needs a list of values, not 8"),
        ({"variables": {"lora_rank": 8, "epochs": []}}, "'epochs' needs a list of values, not []"),
        ({"variables": [1]}, "'variables' is [1]"),
        ({"variables": {"epochs": [1, 2, 1]}}, "'epochs' has 1 twice"),
        ({"variables": {"learning_rate": [1, 1.0]}}, "'learning_rate' has 1.0 twice"),
        ({"seeds": [1, 1]}, "seeds: the same seed twice"),
        ({"variables": {f"a{i}": list(range(10)) for i in range(8)}}, "100000000 combinations; the limit is 100000"),
        ({"seeds": [-1]}, "'seeds' is -1"),
        ({"paired": [{"epochs": 1}, {"seed": 1}]}, "paired: every entry sets the same names"),
        ({"paired": [{}]}, "paired: every entry sets the same names"),
        ({"paired": [{"epochs": 1}, {"epochs": 1}]}, "paired: the same entry twice"),
        ({"variables": RANKS, "exclude": [{}]}, "exclude: an empty entry"),
        ({"variables": RANKS, "exclude": [{"lora_rnk": 8}]}, "'lora_rnk' does not vary; did you mean 'lora_rank'?"),
        ({"variables": RANKS, "exclude": [{"lora_rank": 9}]}, "exclude, entry 1 fits no run"),
        ({"variables": RANKS, "exclude": [{"lora_rank": 8}, {"lora_rank": 16}]}, "exclude leaves no run"),
        ({"variables": {"lora_rnk": [8]}}, "the base config has no 'lora_rnk'; did you mean 'lora_rank'?; '+lora_rnk'"),
        ({"variables": {"model.lora_rnk": [8]}}, "did you mean 'model.lora_rank'?"),
        ({"controls": {"weight_decay": 0.1}}, "no 'weight_decay' (optimizer.weight_decay); '+weight_decay' adds it"),
        ({"controls": {"prompts": {"sistem": "x"}}}, "no 'prompts.sistem'; did you mean 'prompts.system'?"),
        ({"variables": {"lora_rank": [8, 0, "x"]}}, "'lora_rank' is 0 (int): should be greater than 0"),
        ({"variables": {"lora_rank": [8, 0, "x"]}}, "'lora_rank' is 'x' (str): should be a valid integer"),
        ({"controls": {"batch_size": True}}, "'batch_size' is True (bool)"),
        ({"controls": {"learning_rate": float("nan")}}, "'learning_rate' is nan"),
        ({"controls": {"metric_logger": "x"}}, "metric_logger is a mapping in the base config (…), here text ('x')"),
        ({"controls": {"metric_logger": "x"}}, "'~path: null'"),
        ({"controls": {"+optimizer.lr.x": 1}}, "optimizer.lr is a number in the base config"),
        ({"controls": {"lora_rank": 8, "model.lora_rank": 8}}, "lora_rank both set model.lora_rank: keep one"),
        ({"variables": RANKS, "controls": {"model": {"lora_rank": 8}}}, "both set model.lora_rank"),
        ({"variables": {"prompts": [{"system": "x"}]}, "controls": {"prompts.system": "y"}}, "both set prompts.system"),
        ({"variables": {"+x.y": [1]}, "controls": {"+x": 2}}, "both set x"),
        ({"variables": {"+x": [1]}, "controls": {"+x.y": 2}}, "both set x.y"),
        ({"seeds": [1], "variables": {"seed": [2]}}, "both set seed"),
        ({"derived": {"lora_rank": "8"}, "variables": RANKS}, "both set model.lora_rank"),
        ({"controls": {"~model.rank": None}}, "nothing to delete there; did you mean 'model.lora_rank'?"),
        ({"controls": {"~epochs": 3}}, "'~epochs' deletes, so its value is null (in TOML: true), not 3"),
        ({"variables": RANKS, "derived": {"lora_alpha": "lora_rank / 0"}}, "cannot be worked out: division by zero"),
        ({"variables": RANKS, "derived": {"lora_alpha": "8 - lora_rank"}}, "gives -8 (int): should be greater"),
        ({"variables": RANKS, "derived": {"metric_logger.log_dir": "3"}}, "gives is text in the base config"),
        ({"controls": {"prompts.system": "{experiment_nam}"}}, "{experiment_nam} is unknown; did you mean"),
        ({"base_config_file": "base.yml"}, "base.yml: no such config file; did you mean 'base.yaml'?"),
    ],
)  # fmt: skip
def test_what_an_experiment_cannot_say(changes: Settings, message: str) -> None:
    assert message in problems(**changes)


def test_all_problems_come_at_once_with_their_lines(run: Run, folder: Path) -> None:
    write(
        GRID.replace("batch_size:", "batchsize:")
        .replace("epochs: 5", "epochs: 0")
        .replace("seed: 42", "~nothing: 1\n  x: 1")
    )
    outcome = run("lacuna", "generate", "experiment.yaml", "--no-validate")
    assert outcome.code == 2
    assert not (folder / "configs").exists()
    for line, words in {6: "'batchsize'", 9: "'epochs' is 0", 10: "'~nothing'", 11: "no 'x'"}.items():
        assert f"error: experiment.yaml:{line}: " in outcome.output
        assert words in outcome.output
    write("experiment_name: e\nvariables:\n  epochs: 3\nseeds: [1, 1]\ntypo: 1\n")
    outcome = run("lacuna", "generate", "experiment.yaml")
    assert "experiment.yaml:5: unknown setting 'typo'" in outcome.output
    assert "experiment.yaml:2: variables: 'epochs' needs a list" in outcome.output


def test_whole_numbers_are_compared_exactly() -> None:
    assert len(plan(variables={"+large": [2**53, 2**53 + 1]}).runs) == 2
    assert len(plan(variables={"+big": [10**400, 1]}).runs) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variables": RANKS}, "lora_alpha is 128 in every run while lora_rank varies"),
        ({"variables": {"batch_size": [2, 4]}}, "averages 16, 32 samples (batch_size × gradient"),
        ({"variables": {"batch_size": [2, 4]}, "controls": {"max_steps_per_epoch": 5}}, "so the samples seen differ"),
        ({"variables": {"batch_size": [2, 4]}, "gpus": 2}, "averages 32, 64 samples"),
        ({"variables": {"packed": [True, False]}}, "dataset.packed varies"),
        ({"variables": {"max_seq_len": [64, 128]}}, "max_seq_len varies; longer samples are cut"),
        ({"variables": {"max_seq_len": [64, 128]}, "controls": {"packed": True}}, "so do the samples in a packed row"),
        ({"variables": {"batch_size": [8, 16]}, "base": SFT}, "a step holds 32768, 65536 tokens"),
        ({"variables": {"batch_size": [8, 16]}, "base": PRETRAIN}, "so the tokens seen differ"),
        ({"paired": [{"batch_size": 8, "steps": 4}, {"batch_size": 16, "steps": 2}], "base": PRETRAIN},
         "so the optimizer steps differ"),
        ({"variables": {"packing": [True, False]}, "base": SFT}, "packing varies"),
    ],
)  # fmt: skip
def test_a_confound_is_said_aloud(changes: Settings, words: str) -> None:
    assert words in "\n".join(plan(changes.pop("base", OWN), **changes).notes)


@pytest.mark.parametrize(
    "changes",
    [
        {"variables": RATES},
        {"variables": RANKS, "derived": {"lora_alpha": "2 * lora_rank"}},
        {"paired": [{"batch_size": rows, "gradient_accumulation_steps": 16 // rows} for rows in (2, 4)]},
        {"variables": RANKS, "controls": {"~lora_alpha": None}},
        {"variables": RATES, "base": SFT},
        {"paired": [{"batch_size": 8, "sequence_length": 64}, {"batch_size": 16, "sequence_length": 32}], "base": SFT},
        {"variables": RATES, "controls": {"~batch_size": None}},
    ],
)  # fmt: skip
def test_what_is_no_confound_is_not_called_one(changes: Settings) -> None:
    notes = "\n".join(plan(changes.pop("base", OWN), **changes).notes)
    assert "confound" not in notes.replace("confound: seed is null, so every run draws its own", "")


def test_a_rank_of_zero_in_the_base_is_a_problem_and_no_crash(folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE.replace("lora_rank: 64", "lora_rank: 0"))
    (found, _) = plan(variables=RATES).runs
    assert next(check_run("torchtune", found.id, found.values, 1)).path == "model.lora_rank"


CANDIDATES: list[Any] = [
    True, False, 8, 16, 0.25, 0.5, "cpu", "cuda", "bf16", "fp32", "sdpa", "eager", "pretrained", "random", "last",
    "best", "none", "wandb", "chat", "text", "drop", "stop",
    "full", "hybrid",
]  # fmt: skip
VALIDATED = {"validation_dataset": "v.jsonl"}
NEEDS: dict[str, Settings] = {
    "epochs": {"streaming": False}, "validation_share": {"streaming": False}, "tracker_project": {"tracker": "wandb"},
    "streaming_window": {"streaming": True}, "validation_split": VALIDATED, "evaluate_every": VALIDATED,
    "keep_best": VALIDATED, "final_weights": VALIDATED, "max_restarts": {"gpus": 2},
    "split_seed": {"validation_share": 0.5, "streaming": False},
}  # fmt: skip


@pytest.mark.parametrize(("trainer", "base"), [("sft", SFT), ("pretrain", PRETRAIN)])
def test_every_setting_of_lacunas_trainers_can_vary(run: Run, folder: Path, trainer: str, base: Settings) -> None:
    for name in TRAINERS[trainer].model_fields.keys() - {"trainer"}:
        values = [value for value in CANDIDATES if value_problem(trainer, name, value) is None][:2]
        controls = {key: value for key, value in NEEDS.get(name, {}).items() if key in TRAINERS[trainer].model_fields}
        if name == "streaming_window" or (trainer == "pretrain" and name == "steps"):
            controls.pop("streaming", None)
        found = plan(base, variables={name: values}, controls=controls)
        assert column(found, name) == values, name
        for made in found.runs:
            (folder / "run.yaml").write_text(dump_yaml(made.values))
            outcome = run("lacuna", "explain", "run.yaml")
            assert outcome.code == 0, (name, outcome.output)
            shown = str(made.values[name]).lower() if isinstance(made.values[name], bool) else made.values[name]
            assert f"{name} {shown} run.yaml:" in outcome.output


def test_runs_of_lacuna_are_whole_configs_with_folders_of_their_own() -> None:
    found = plan(SFT, variables=RATES, seeds=[1], controls={"steps": 5, "warmup_steps": 2})
    assert column(found, "output_dir") == ["runs/sft_qwen/run_000", "runs/sft_qwen/run_001"]
    for run in found.runs:
        assert {"epochs", "warmup_share"}.isdisjoint(run.values)
        assert (run.values["trainer"], run.values["steps"], run.values["seed"]) == ("sft", 5, 1)
        assert TRAINERS["sft"].model_validate(run.values).warmup_steps == 2


def test_epochs_and_steps_replace_each_other_from_layer_to_layer() -> None:
    assert "epochs" not in plan(SFT, variables={"steps": [5, 6]}).runs[0].values
    assert "steps" not in plan(PRETRAIN, variables={"epochs": [5, 6]}, controls={"streaming": False}).runs[0].values
    assert "give epochs or steps, not both" in problems(SFT, controls={"epochs": 1, "steps": 2})
    assert "epochs or steps" in problems(SFT, controls={"epochs": 1}, variables={"steps": [2, 3]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variables": {"learning_rat": [1]}}, "sft has no setting 'learning_rat'; did you mean 'learning_rate'?"),
        ({"controls": {"dataset": {"data_files": "x"}}}, "'dataset"),
        ({"controls": {"optimizer.lr": 1}}, "sft has no setting 'optimizer.lr'"),
        ({"variables": {"batch_size": [4, 6]}}, "batch_size 6 is not a multiple of micro_batch_size 4"),
        ({"variables": {"precision": ["fp16", "bf16"]}}, "'precision' is 'fp16'"),
        ({"gpus": 2}, "gpus is for torchtune"),
        ({"recipe": "x"}, "recipe is for torchtune"),
        ({"controls": {"trainer": "pretrain"}}, "trainer"),
    ],
)  # fmt: skip
def test_what_lacunas_trainers_cannot_take(changes: Settings, message: str) -> None:
    assert message in problems(SFT, **changes)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("own.toml", "batch_size = 1\n", "no `trainer` key says what this is for"),
        ("own.toml", 'trainer = "stf"\n', "own.toml:1: no trainer is called 'stf'; did you mean 'sft'?"),
        ("own.yaml", "{}\n", "the config is empty"),
        ("own.toml", 'trainer = "sft"\nbatchsize = 4\n', "own.toml:2: unknown setting 'batchsize'; did you mean"),
    ],
)  # fmt: skip
def test_bases_that_are_none(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    assert message in problems({"experiment_name": "e", "base_config_file": name}, variables={"epochs": [1]})


def test_recipe_belongs_to_an_own_file() -> None:
    base = {"experiment_name": "e", "base_config": "a/b", "recipe": "c"}
    assert "recipe goes with base_config_file" in problems(base)


def test_without_any_torchtune_an_own_file_works_and_a_recipe_says_how(folder: Path) -> None:
    """A copy of the source elsewhere, beside which there is no environment."""
    shutil.copytree(ROOT / "src" / "lacuna", folder / "copy" / "src" / "lacuna")
    environment = {**os.environ, "PYTHONPATH": str(folder / "copy" / "src"), "PATH": "/nowhere"}

    def generate(force: bool = False, **experiment: Any) -> Any:
        words = ["lacuna", "generate", "e.yaml", *["--force"] * force]
        program = f"import sys; from lacuna.cli import main as cli; sys.argv = {words}; cli.main()"
        write(experiment, "e.yaml")
        words = [sys.executable, "-c", program]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)

    done = generate(experiment_name="e", base_config_file="base.yaml", variables=RANKS)
    assert "torchtune was not found, so its arguments go unchecked" in done.stderr
    assert "warning: not on this machine, 2 runs (run_000 … run_001): tokenizer.path there is no file /m" in done.stderr
    assert done.returncode == 0
    done = generate(experiment_name="e", base_config_file="base.yaml", controls={"~tokenizer.path": None}, force=True)
    assert done.returncode == 0, done.stderr
    assert "start one: tune run RECIPE --config configs/run_000.yaml" in done.stderr
    assert "`make torchtune` builds" in generate(experiment_name="e", base_config="llama3_2/1B_full").stderr


def sft(run: Run, *flags: str, output: str = "configs", dataset: str = "data.jsonl", **changes: Any) -> Outcome:
    """Generate over a base of lacuna's own, whose validation needs no torchtune."""
    controls = {"dataset": dataset, **changes.pop("controls", {})}
    experiment = {**SFT, "variables": RATES, **changes, "controls": controls}
    return run("lacuna", "generate", write(experiment), *flags, output=output)


def test_the_same_again_needs_no_force_and_another_one_does(run: Run, folder: Path) -> None:
    assert sft(run).code == 0
    before = everything(folder / "configs")
    assert sft(run).code == 0
    assert everything(folder / "configs") == before
    outcome = sft(run, variables={"seed": [1, 2, 3]})
    assert (outcome.code, everything(folder / "configs")) == (2, before)
    assert "holds the configs of another experiment" in outcome.output
    assert "--force" in outcome.output


def test_force_replaces_and_removes_stale_runs_but_nothing_else(run: Run, folder: Path) -> None:
    assert sft(run, variables={"seed": [1, 2, 3]}).code == 0
    (folder / "configs" / "notes.txt").write_text("mine")
    assert sft(run, "--force").code == 0
    assert sorted(everything(folder / "configs")) == ["notes.txt", "run_000.yaml", "run_001.yaml", "run_mapping.yaml"]
    assert sft(run, output="clean").code == 0
    (folder / "configs" / "notes.txt").unlink()
    assert everything(folder / "configs") == everything(folder / "clean")


@pytest.mark.parametrize("name", ["run_000.yaml", "run_002.yaml", "run_mapping.yaml"])
@pytest.mark.parametrize("flags", [[], ["--force"]])
def test_what_was_edited_by_hand_is_never_replaced(run: Run, folder: Path, name: str, flags: list[str]) -> None:
    assert sft(run, variables={"seed": [1, 2, 3]}).code == 0
    file = folder / "configs" / name
    file.write_text(file.read_text() + "# my note\n")
    before = everything(folder / "configs")
    outcome = sft(run, *flags)
    assert (outcome.code, everything(folder / "configs")) == (2, before)
    assert name in outcome.output
    assert "was not generated, or was changed since" in outcome.output


@pytest.mark.parametrize("name", ["run_001.yaml", "run_mapping.yaml"])
def test_foreign_files_are_never_replaced(run: Run, folder: Path, name: str) -> None:
    (folder / "configs").mkdir()
    (folder / "configs" / name).write_text("runs: []\n")
    outcome = sft(run, "--force")
    assert outcome.code == 2
    assert f"{name} was not generated" in outcome.output
    assert everything(folder / "configs") == {name: b"runs: []\n"}


@pytest.mark.parametrize("name", ["run_001.yaml", "run_mapping.yaml"])
def test_a_folder_in_the_way_is_refused(run: Run, folder: Path, name: str) -> None:
    (folder / "configs" / name / "deep").mkdir(parents=True)
    outcome = sft(run, "--force")
    assert outcome.code == 2, outcome.output
    assert name in outcome.output
    assert sorted(path.name for path in (folder / "configs").iterdir()) == [name]


@pytest.mark.parametrize(("output", "message"), [("data.jsonl", "is a file"), ("/proc/x", "cannot be written")])
def test_an_output_that_cannot_be_a_folder(run: Run, output: str, message: str) -> None:
    outcome = sft(run, output=output)
    assert outcome.code == 2
    assert message in outcome.output


def test_a_failed_validation_leaves_the_folder_and_a_report_beside_it(run: Run, folder: Path) -> None:
    report = folder / "validation_report.txt"
    outcome = sft(run, "--strict", dataset="missing.jsonl")
    assert outcome.code == 2
    assert "2 runs (run_000 … run_001): dataset missing.jsonl: no such file" in outcome.output
    assert str(report.name) in outcome.output
    assert not (folder / "configs").exists()
    assert report.read_text().count("missing.jsonl") == 2
    assert sft(run).code == 0
    assert not report.exists()
    before = everything(folder / "configs")
    assert sft(run, "--force", "--strict", dataset="missing.jsonl").code == 2
    assert everything(folder / "configs") == before
    assert sft(run, output="other").code == 0
    assert report.exists()


def test_a_foreign_report_stays(run: Run, folder: Path) -> None:
    (folder / "validation_report.txt").write_text("mine")
    outcome = sft(run, "--strict", dataset="missing.jsonl")
    assert "is not a report of lacuna's and stays" in outcome.output
    (folder / "configs").mkdir()
    (folder / "configs" / "validation_report.txt").write_text("mine too")
    assert sft(run).code == 0
    outcome = sft(run, "--force", dataset="missing.jsonl")
    assert "note: configs/validation_report.txt is not a report of lacuna's and stays as it is" in outcome.output
    assert (folder / "validation_report.txt").read_text() == "mine"
    assert (folder / "configs" / "validation_report.txt").read_text() == "mine too"


def test_paths_of_another_machine_are_warnings_which_stand_beside_the_mapping(run: Run, folder: Path) -> None:
    outcome = sft(run, dataset="missing.jsonl")
    assert outcome.code == 0
    assert (
        "warning: not on this machine, 2 runs (run_000 … run_001): dataset missing.jsonl: no such file"
        in outcome.output
    )
    assert "start one:" not in outcome.output
    assert "each run's warnings: configs/validation_report.txt" in outcome.output
    report = folder / "configs" / "validation_report.txt"
    rows = [line.split("\t") for line in report.read_text().splitlines() if line.startswith("run_")]
    assert [(run, path, todo) for run, path, _, todo in rows] == [
        ("run_000", "dataset", "correct the path"), ("run_001", "dataset", "correct the path")
    ]  # fmt: skip
    assert sft(run, dataset="missing.jsonl").code == 0
    words = [SCRIPTS / "lacuna", "generate", "experiment.yaml", "--json", "--output", "shown"]
    printed = subprocess.run(words, capture_output=True, text=True, check=True, cwd=folder).stdout
    assert len(json.loads(printed)["warnings"]) == 1
    assert sft(run, "--force").code == 0
    assert not report.exists()


def test_many_places_are_counted_in_one_warning(run: Run, folder: Path) -> None:
    write({**SFT, "variables": {"dataset": [f"missing_{index}.jsonl" for index in range(5)]}})
    outcome = run("lacuna", "generate", "experiment.yaml")
    assert outcome.code == 0
    assert "5 runs (run_000 … run_004): dataset missing_0.jsonl: no such file" in outcome.output
    assert "dataset missing_2.jsonl: no such file or folder and 2 more: correct the path" in outcome.output


def test_a_run_that_could_not_start_is_not_started(run: Run, folder: Path) -> None:
    assert sft(run, dataset="missing.jsonl").code == 0
    for words in (["run", "configs"], ["slurm", "configs", "--submit"], ["slurm", "configs/run_000.yaml", "--submit"]):
        outcome = run("lacuna", *words)
        assert outcome.code == 2
        assert "dataset missing.jsonl: no such file" in outcome.output
        assert "no run was started" in outcome.output
    outcome = run("lacuna", "doctor", "configs")
    assert outcome.code == 1
    assert "2 runs (run_000 … run_001): dataset missing.jsonl: no such file" in outcome.output


def test_a_disk_that_is_full_leaves_nothing(folder: Path) -> None:
    """A limit on the size of written files stands in for the disk."""
    write({**SFT, "controls": {"dataset": "data.jsonl"}, "variables": {"seed": list(range(30))}})
    words = ["bash", "-c", f"ulimit -f 2; exec {SCRIPTS / 'lacuna'} generate experiment.yaml --output made"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert not (folder / "made").exists()


def killed_while_moving(run: Run, folder: Path) -> None:
    """The folder as a kill leaves it: one of the new files is in place, the others wait with their mapping."""
    assert sft(run, variables={"seed": [1, 2, 3]}).code == 0
    assert sft(run, output="new").code == 0
    stage = folder / "configs" / ".generating"
    shutil.copytree(folder / "new", stage)
    (stage / "run_000.yaml").replace(folder / "configs" / "run_000.yaml")


def test_a_kill_while_files_are_moved_is_mended_by_force(run: Run, folder: Path) -> None:
    killed_while_moving(run, folder)
    outcome = sft(run)
    assert outcome.code == 2
    assert "--force" in outcome.output
    assert sft(run, "--force", "--strict", dataset="missing.jsonl").code == 2
    outcome = sft(run, "--force")
    assert outcome.code == 0, outcome.output
    assert everything(folder / "configs") == everything(folder / "new")
    assert not (folder / "configs" / ".generating").exists()


def test_a_real_kill_at_any_time_is_mended_by_force(run: Run, folder: Path) -> None:
    many = list(range(1500))
    assert sft(run, variables={"seed": many}).code == 0
    first = folder / "configs" / "run_0000.yaml"
    before = first.read_bytes()
    write({**SFT, "variables": {"seed": many}, "controls": {"dataset": "data.jsonl", "epochs": 1}})
    process = spawn("lacuna", "generate", "experiment.yaml", "--force")
    process.wait_until(lambda: first.read_bytes() != before)
    process.stop(signal.SIGKILL)
    outcome = run("lacuna", "generate", "experiment.yaml", "--force")
    assert outcome.code == 0, outcome.output
    assert run("lacuna", "generate", "experiment.yaml", output="clean").code == 0
    assert everything(folder / "configs") == everything(folder / "clean")


def test_derived_values_are_worked_out_in_the_order_they_need() -> None:
    derived = {"learning_rate": "0.1 / lora_alpha", "lora_alpha": "2 * lora_rank"}
    runs = plan(variables={"lora_rank": [4, 8]}, derived=derived).runs
    assert [(run.values["model"]["lora_alpha"], run.values["optimizer"]["lr"]) for run in runs] == [
        (8, 0.0125), (16, 0.00625)
    ]  # fmt: skip
    circle = {"learning_rate": "0.1 / lora_alpha", "lora_alpha": "2 / optimizer.lr"}
    assert "derived in a circle: " in problems(variables={"lora_rank": [4, 8]}, derived=circle)
    assert "did you mean 'lora_rank'?" in problems(variables=RANKS, derived={"lora_alpha": "2 * lora_rnk"})


def test_two_runs_that_are_the_same_are_refused() -> None:
    values = [{"packed": False}, {"_component_": "torchtune.datasets.alpaca_cleaned_dataset"}]
    assert "run_000 and run_001 are the same run" in problems(variables={"dataset": values})


def test_inner_folders_are_not_shared_either() -> None:
    grid = {"lora_rank": [4, 8], "learning_rate": [1e-3, 2e-3]}
    shared = problems(variables=grid, controls={"metric_logger.log_dir": "logs/{lora_rank}"})
    assert "metric_logger.log_dir: run_000 and run_001 share logs/4" in shared
    assert "name all that varies in it, as {lora_rank}_{learning_rate}" in shared
    apart = plan(variables=grid, controls={"metric_logger.log_dir": "logs/{lora_rank}_{learning_rate}"})
    assert apart.runs[3].values["metric_logger"]["log_dir"] == "logs/8_0.002"


def test_seeds_that_change_nothing_are_told() -> None:
    for recipe, words in {
        "full_finetune_single_device": "seeds change nothing here",
        "lora_x": "vary the adapters",
        "ppo_full_finetune_single_device": "vary what the recipe draws",
    }.items():
        base = Base("b", "torchtune", {}, {}, recipe, None, False, 1, ())
        notes = find_confounds(base, [{"seed": 1}, {"seed": 2}])
        assert len(notes) == 1
        assert words in notes[0]
    assert any("seed is null" in note for note in plan(variables=RANKS).notes)
    assert any("the data vary" in note for note in plan(variables={"+dataset.source": ["a", "b"]}).notes)


def test_one_generate_at_a_time_writes_into_a_folder(run: Run, folder: Path) -> None:
    (folder / "experiment.yaml").write_text(dump_yaml({**OWN, "variables": RANKS}))
    (folder / "configs").mkdir()
    handle = os.open(folder / "configs", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    Timer(0.5, os.close, [handle]).start()
    began = time.monotonic()
    outcome = run("lacuna", "generate", "experiment.yaml", "--no-validate")
    assert outcome.code == 0
    assert "another process generates into configs: waiting for it" in outcome.output
    assert time.monotonic() - began > 0.4


def test_names_of_the_other_trainer_are_translated() -> None:
    for name, ours in {"packed": "packing", "max_seq_len": "sequence_length", "dataset.data_files": "dataset"}.items():
        assert find_path(name, "sft", {})[1] == f"sft has no setting {name!r}; what torchtune calls so is {ours} here"
    assert "trains whole models" in str(find_path("lora_rank", "sft", {})[1])
    assert "did you mean 'learning_rate'?" in str(find_path("lr", "torchtune", {})[1])
    assert "trains no adapters" in str(find_path("lora_rank", "torchtune", {"model": {"_component_": "m"}})[1])


def test_an_empty_output_is_refused(run: Run, folder: Path) -> None:
    (folder / "experiment.yaml").write_text(dump_yaml({**OWN, "variables": RANKS}))
    assert "--output is empty" in run("lacuna", "generate", "experiment.yaml", "--output", "").output


def test_run_folders_that_hold_something_are_told(run: Run, folder: Path) -> None:
    (folder / "out" / "run_001").mkdir(parents=True)
    (folder / "out" / "run_000").mkdir()
    (folder / "out" / "run_001" / "epoch_0").mkdir()
    (folder / "experiment.yaml").write_text(dump_yaml({**OWN, "variables": RANKS, "controls": {"output_dir": "out"}}))
    outcome = run("lacuna", "generate", "experiment.yaml", "--no-validate")
    assert (
        "note: 1 of the run folders hold something already (out/run_001 …): a run would write over it" in outcome.output
    )


ADAPTER = {"experiment_name": "study", "base_config_file": "adapter.yaml"}


class TestFinetuneBase:
    @pytest.fixture(autouse=True)
    def base(self, folder: Path) -> None:
        """A file without a `trainer` key: its sections say what it is for."""
        text = "model: {path: tiny}\ndataset: {path: data.jsonl}\ntraining: {learning_rate: 1e-3, warmup_steps: 2}\n"
        (folder / "adapter.yaml").write_text(text)

    def test_names_reach_their_places(self) -> None:
        """A setting's last part, its path, the other trainers' name, and a whole section."""
        controls = {"epochs": 2, "training.weight_decay": 0.1, "training": {"lora_dropout": 0.2}}
        derived = {"lora_alpha": "2 * lora_rank"}
        planned = plan(ADAPTER, variables=RANKS, controls=controls, derived=derived, seeds=[1, 2])
        assert planned.base.trainer == "finetune"
        training = [run.values["training"] for run in planned.runs]
        varied = [(t["lora_r"], t["lora_alpha"], t["seed"]) for t in training]
        assert varied == [(8, 16, 1), (8, 16, 2), (16, 32, 1), (16, 32, 2)]
        assert all((t["num_epochs"], t["weight_decay"], t["lora_dropout"]) == (2, 0.1, 0.2) for t in training)
        assert all((t["learning_rate"], t["warmup_steps"]) == (1e-3, 2) for t in training)

    def test_each_run_has_a_folder_also_where_none_is_given(self) -> None:
        runs = plan(ADAPTER, variables=RANKS).runs
        assert [run.output_dir for run in runs] == [f"./checkpoints/tiny-study/run_00{i}" for i in (0, 1)]
        assert [run.values["training"]["output_dir"] for run in runs] == [run.output_dir for run in runs]
        runs = plan(ADAPTER, variables=RANKS, controls={"output_dir": "out/rank_{lora_rank}"}).runs
        assert [run.output_dir for run in runs] == ["out/rank_8", "out/rank_16"]

    def test_an_alternative_replaces_the_bases(self) -> None:
        (run,) = plan(ADAPTER, controls={"warmup_share": 0.5}).runs
        assert (run.values["training"]["warmup_share"], run.values["training"].get("warmup_steps")) == (0.5, None)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"variables": {"lora_rang": [1]}}, "finetune has no setting 'lora_rang'; did you mean 'lora_rank'?"),
            ({"controls": {"training": {"lora_rr": 1}}}, "finetune has no setting 'training.lora_rr'"),
            (
                {"controls": {"lora_r": "8"}},
                "'lora_r' is '8' (str): should be a valid integer; write it without quotes",
            ),
            ({"variables": {"lora_rank": [8], "lora_r": [4]}}, "lora_r"),
        ],
    )
    def test_wrong_names_and_values_are_refused(self, changes: Settings, words: str) -> None:
        with pytest.raises(ConfigError) as caught:
            plan(ADAPTER, **changes)
        assert words in str(caught.value)

    def test_confounds_are_said_aloud(self) -> None:
        notes = " ".join(plan(ADAPTER, variables={"lora_rank": [8, 16], "batch_size": [2, 4]}).notes)
        assert "lora_alpha is 32 in every run while lora_rank varies" in notes
        assert "a step averages 8, 16 samples" in notes
        assert "optimizer steps differ between runs" in notes
        assert "sequence_length varies" in " ".join(plan(ADAPTER, variables={"sequence_length": [64, 128]}).notes)

    def test_missing_data_are_a_problem_at_their_path(self, run: Run, folder: Path) -> None:
        (folder / "e.yaml").write_text(json.dumps({**ADAPTER, "variables": RANKS}))
        outcome = run("lacuna", "generate", "e.yaml", "--output", "configs")
        assert outcome.code == 0, outcome.output
        assert "start one: finetune --config configs/run_000.yaml" in outcome.output
        (folder / "data.jsonl").unlink()
        outcome = run("lacuna", "generate", "e.yaml", "--output", "others", "--strict")
        assert outcome.code == 2
        assert "dataset.path" in outcome.output
        assert "no such file" in outcome.output
