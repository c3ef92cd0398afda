"""Every file of examples/ is an experiment that generates what it says; the small ones are run, on tiny data."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import Run, spawn
from fixtures import write_texts
from lacuna.config.files import read_layer
from lacuna.config.yaml_format import dump_yaml
from lacuna.runs.folder import read_status

ROOT = Path(__file__).parents[2]
EXAMPLES = {
    "lora_rank_first": ("torchtune", 4),
    "lora_rank_wandb": ("torchtune", 4),
    "lora_rank": ("torchtune", 12),
    "lr_batch_sweep": ("torchtune", 9),
    "lora_rank_adapters": ("finetune", 12),
    "learning_rate": ("sft", 3),
    "pretraining": ("pretrain", 8),
    "batch_size": ("pretrain", 4),
    "slurm": ("sft", 6),
    "quickstart/experiment": ("sft", 6),
}
"""The trainer of each, and the number of its runs."""
BASES = {"v100_optimized", "quickstart/finetune"}
"""What a run begins with, and no experiment."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("examples", "configs", ".venv-torchtune"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mapping(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "run_mapping.yaml").read_text())
    return found


def test_every_example_is_listed_and_begins_with_its_question_and_its_command() -> None:
    found = {str(path.relative_to(ROOT / "examples").with_suffix("")) for path in ROOT.glob("examples/**/*.yaml")}
    assert found == EXAMPLES.keys() | BASES
    for name in EXAMPLES:
        question, command = (ROOT / "examples" / f"{name}.yaml").read_text().splitlines()[:2]
        assert "?" in question
        assert re.match(rf"#   lacuna (generate|run|slurm) examples/{name}\.yaml( |$)", command)


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - {"lora_rank"}))  # docs/test_experiments.py generates that
def test_an_example_generates_its_runs(here: Path, run: Run, name: str) -> None:
    trainer, count = EXAMPLES[name]
    outcome = run("lacuna", "generate", f"examples/{name}.yaml", output="out")
    assert (outcome.code, f"Generated {count} configs" in outcome.output) == (0, True), outcome.output
    made = mapping(here / "out")
    assert made.get("recipe", made["trainer"]) == ("lora_finetune_single_device" if trainer == "torchtune" else trainer)
    assert len({entry["output_dir"] for entry in made["runs"]}) == count


SMALL = {"max_steps": 2, "learning_rate": 1e-3, "batch_size": 2, "gradient_accumulation_steps": 1, "warmup_steps": 1}
TINY = {
    "quickstart/experiment": {"steps": 4},
    "batch_size": {"sequence_length": 32},
    "lora_rank_adapters": {"target_modules": ["q_proj"], "device": "cpu", **SMALL},
}
"""What the small runs of an example change, besides model and data."""


def shortened(name: str, model: Path, data: Path, validation: Path) -> str:
    """The example with a tiny model, two runs of one seed, and a few steps, all by its controls."""
    experiment = dict(read_layer(ROOT / "examples" / f"{name}.yaml").values)
    there: dict[str, Any] = {"model_name": model, "dataset": data, "validation_dataset": validation}
    if EXAMPLES[name][0] == "finetune":
        model_paths = {"path": str(model), "base_model": str(model)}
        experiment["variables"]["lora_r"] = [8, 16]
        experiment["controls"] |= {"model": model_paths, "dataset": {"path": str(data)}, "sequence_length": 64}
    else:
        experiment["controls"] |= {key: str(value) for key, value in there.items()} | {"save_every": 4}
    experiment["seeds"] = [1]
    if name == "batch_size":
        experiment["paired"] = [{"batch_size": 2, "steps": 4}, {"batch_size": 4, "steps": 2}]
    experiment["controls"] |= {**TINY[name], "output_dir": "runs"}
    return dump_yaml(experiment)


@pytest.mark.parametrize("name", TINY)
def test_a_small_example_is_run_by_lacuna_start(
    here: Path, run: Run, model_folder: Path, chat_file: Path, text_file: Path, name: str
) -> None:
    trainer = EXAMPLES[name][0]
    data = text_file if trainer == "pretrain" else chat_file
    validation = write_texts(here / "validation.jsonl", rows=4, seed=1) if trainer == "pretrain" else chat_file
    (here / "experiment.yaml").write_text(shortened(name, model_folder, data, validation))
    outcome = run("lacuna", "generate", "experiment.yaml", output="out")
    assert outcome.code == 0, outcome.output
    entries = mapping(here / "out")["runs"]
    assert len(entries) == 2
    started = spawn("lacuna", "start", "out", "0")
    output = started.wait()
    assert started.popen.returncode == 0, output
    words = ["--config"] if trainer == "finetune" else ["@"]
    assert run(trainer, *words, f"out/{entries[1]['config']}").code == 0
    for entry in entries:
        folder = Path(entry["output_dir"])
        assert (read_status(folder) or {})["state"] == "finished"
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert all(math.isfinite(row["loss"]) for row in metrics if "loss" in row)
