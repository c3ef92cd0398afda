"""docs/experiments.md: its commands, snippets, tables and messages are what the program has."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import SCRIPTS, Run
from lacuna.config.finetune import FinetuneConfig
from lacuna.config.names import TORCHTUNE, parameters
from lacuna.config.training import MAY_CHANGE_ON_RESUME

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "experiments.md").read_text()


def blocks(language: str) -> list[str]:
    fences = PAGE.split("```")[1::2]
    return [fence.removeprefix(language + "\n") for fence in fences if fence.startswith(language + "\n")]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("examples", "configs", "Makefile", "pyproject.toml", ".venv-torchtune"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "configs").unlink()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sft_qwen.toml").symlink_to(ROOT / "configs" / "sft_qwen.toml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_print_what_the_page_shows(here: Path) -> None:
    outputs = []
    for line in blocks("bash")[0].splitlines():
        words = ["bash", "-c", f"PATH={SCRIPTS}:$PATH; {line}"]
        outcome = subprocess.run(words, capture_output=True, text=True, check=False)
        assert outcome.returncode == 0, outcome.stderr
        outputs.append(outcome.stdout)
    assert "llama3_2/1B_lora_single_device" in outputs[0]
    assert "Generated 12 configs in configs/" in outputs[1]
    assert outputs[2] == blocks("")[0]


def test_the_first_example_generates(here: Path, run: Run) -> None:
    (here / "experiment.yaml").write_text(blocks("yaml")[0])
    outcome = run("lacuna", "generate", "experiment.yaml")
    assert (outcome.code, "Generated 12 configs" in outcome.output) == (0, True), outcome.output


def test_one_changed_line_takes_the_experiment_to_lacunas_trainer(here: Path, run: Run) -> None:
    text = blocks("yaml")[1]
    (here / "there.yaml").write_text(text)
    (here / "here.yaml").write_text(re.sub(r"^base_config: .*$", "", text, flags=re.M).replace("# base", "base"))
    for name, trainer in (("there", "torchtune"), ("here", "sft")):
        outcome = run("lacuna", "generate", f"{name}.yaml", output=name)
        assert (outcome.code, "Generated 4 configs" in outcome.output) == (0, True), outcome.output
        assert yaml.safe_load((here / name / "run_mapping.yaml").read_text())["trainer"] == trainer


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_the_python_of_the_page_runs(here: Path, index: int) -> None:
    words = [sys.executable, "-c", blocks("python")[index]]
    outcome = subprocess.run(words, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_the_table_has_every_parameter_of_torchtune_and_every_engineering_setting_of_ours() -> None:
    for name, parameter in TORCHTUNE.items():
        paths = ", ".join(f"`{path}`" for path in parameter.paths)
        assert f"| `{name}` | {paths} | {parameter.kind} | {parameter.note} |" in PAGE
    section = PAGE.partition("## lacuna's parameters")[2].partition("\n## ")[0]
    flat, _, nested = section.partition("Of a finetune config")
    ours = {name for name, parameter in parameters("sft").items() if parameter.kind == "engineering"}
    assert set(re.findall(r"`(\w+)`", flat)) == ours == MAY_CHANGE_ON_RESUME
    paths = {parameter.paths[0] for parameter in parameters("finetune").values() if parameter.kind == "engineering"}
    listed = re.findall(r"`(\w+)`", nested.partition("Engineering")[2].replace("`training`", ""))
    assert (
        {name if name in ("device", "max_restarts") else f"training.{name}" for name in listed}
        == paths
        == FinetuneConfig.may_change
    )


def test_every_message_of_the_troubleshooting_table_is_one_that_the_program_prints() -> None:
    source = "".join(path.read_text() for path in (ROOT / "src" / "lacuna").rglob("*.py"))
    rows = re.findall(r"^\| `([^`]+)` \|", PAGE.partition("## Troubleshooting")[2], re.MULTILINE)
    assert len(rows) == 9
    for row in rows:
        for part in re.split(r"…|'x'|'fused'|0\.6\.1", row):
            assert part.strip(" ;") in source, part
