"""A clone of the last commit under the real uv: what it installs, and that the commands work.

Versions are those of constraints.txt; packages come from where pip takes them on this machine.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from conftest import SCRIPTS
from fixtures import write_chat
from hub_contents import MODEL, TEXTS, write_fineweb, write_qwen
from hub_server import serve
from lacuna.runs.metrics import read_metrics

ROOT = Path(__file__).parents[2]
SEED = "uv run pretrain @ configs/pretrain_qwen.toml --model-name Qwen/Qwen2.5-0.5B --batch-size 4 --steps 100"


def surroundings() -> dict[str, str]:
    """Environment variables for uv: what is said to pip, and nothing of the environment that runs the tests."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    pip: dict[str, list[str]] = {}
    for line in sorted(listed, key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        pip[name.rpartition(".")[2]] = ast.literal_eval(value).split()
    named = {
        "UV_DEFAULT_INDEX": pip.get("index-url"),
        "UV_INDEX": pip.get("extra-index-url"),
        "UV_FIND_LINKS": [",".join(pip.get("find-links", []))],
        "SSL_CERT_FILE": pip.get("cert"),
    }
    hidden = ("UV_", "HF_", "VIRTUAL_ENV", "PYTHONPATH")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(hidden) or name == "UV_CACHE_DIR"},
        **{name: " ".join(words) for name, words in named.items() if words},
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_PYTHON": sys.executable,
        "UV_PYTHON_DOWNLOADS": "never",
        "PATH": f"{SCRIPTS}:{os.environ['PATH']}",
    }


@dataclass
class Checkout:
    folder: Path
    environment: dict[str, str]

    def call(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    def do(self, command: str) -> str:
        outcome = self.call(command)
        assert outcome.returncode == 0, f"{command}\n{outcome.stdout}\n{outcome.stderr}"
        return outcome.stdout


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """A clone, for which uv may install the packages of all commands. It is deleted: its packages take 1.6 GB."""
    folder = tmp_path_factory.mktemp("uv") / "lacuna"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    settings = (folder / "pyproject.toml").read_text()
    assert settings.count("[tool.uv]\n") == 1
    (folder / "pyproject.toml").write_text(
        settings.replace("[tool.uv]\n", f"[tool.uv]\nconstraint-dependencies = {pins}\n")
    )
    checkout = Checkout(folder, surroundings())
    planned = checkout.call("uv sync --dry-run")
    if "Failed to fetch" in planned.stderr:
        pytest.skip(f"uv's packages can't be had here: {planned.stderr.strip().splitlines()[-1]}")
    assert planned.returncode == 0, planned.stderr
    if " + nvidia-" in planned.stderr:
        pytest.skip("here uv would download torch's CUDA build: pip's configuration names no place of the CPU's")
    yield checkout
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def checkout(fresh: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """The clone, after the seed's command for one step, with a model of the name that is small."""
    root = tmp_path_factory.mktemp("hub")
    write_qwen(root / "models" / MODEL / "main", seed=0)
    write_fineweb(root / "datasets" / TEXTS / "main", seed=0)
    with serve(root) as hub:
        fresh.environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(root / "home")}
        assert not (fresh.folder / ".venv").exists()
        fresh.do(SEED.replace("--steps 100", "--steps 1"))
        yield fresh


def test_the_seeds_command_in_a_fresh_checkout(checkout: Checkout) -> None:
    assert SEED in (ROOT / "README.md").read_text().splitlines()
    run = checkout.folder / "runs" / "pretrain_qwen"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert [line["step"] for line in read_metrics(run) if "loss" in line] == [1]
    assert checkout.do("git status --porcelain").splitlines() == [" M pyproject.toml"]


def test_the_other_trainers(checkout: Checkout) -> None:
    chats = write_chat(checkout.folder / "runs" / "chats.jsonl")
    model, small = "runs/pretrain_qwen/final", "--steps 1 --batch-size 4 --sequence-length 64"
    command = f"uv run sft --model-name {model} --dataset {chats} --output-dir runs/sft {small} --dry-run"
    assert f"runs/sft: sft of {model} on" in checkout.do(command)
    config = {
        "model": {"path": model},
        "dataset": {"path": str(chats)},
        "training": {"method": "qlora", "output_dir": "runs/qlora", "max_steps": 1, "sequence_length": 64},
    }
    (checkout.folder / "runs" / "qlora.yaml").write_text(yaml.safe_dump(config))
    assert f" of {model} on " in checkout.do("uv run finetune --config runs/qlora.yaml --dry-run")


def test_a_chat(checkout: Checkout) -> None:
    answer = json.loads(checkout.do("echo river | uv run chat --model runs/pretrain_qwen --json --max-tokens 2"))
    assert (answer["prompt"], answer["answer_tokens"]) == ("river", 2)


def test_reports_trackers_and_endpoints(checkout: Checkout) -> None:
    checkout.do("uv run python -c 'import openai, plotly, scipy, tensorboard, wandb'")


def test_a_missing_extra_is_installed_by_the_command_that_is_named(fresh: Checkout) -> None:
    """In uv's environment of a checkout, and in one that uv made elsewhere."""
    folder = fresh.folder.parent / "elsewhere"
    fresh.do(f"uv venv --quiet {folder}; uv pip install --quiet --python {folder} {fresh.folder}")
    (fresh.folder / ".venv").rename(fresh.folder.parent / "kept")
    try:
        report = "lacuna report configs"
        for command, expected in (
            (f"uv run --no-default-groups {report}", "uv sync --extra report"),
            (f"{folder}/bin/{report}", f"uv pip install --python {folder} 'lacuna[report]'"),
        ):
            outcome = fresh.call(command)
            said = re.search(r"this command needs 'scipy', which is not installed: (.*)\n", outcome.stderr)
            assert said is not None, outcome.stderr
            assert said[1] == expected
            fresh.do(expected)
            assert "not installed" not in fresh.call(command).stderr
    finally:
        shutil.rmtree(fresh.folder / ".venv")
        (fresh.folder.parent / "kept").rename(fresh.folder / ".venv")
