"""Runs that an older version of lacuna began go on as they were begun."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import Run
from lacuna.runs.folder import starts_of
from lacuna.runs.metrics import read_metrics

OLDER = Path(__file__).parents[1] / "older_runs"
FLAT = {
    "model_name": "model", "validation_share": 0.25, "steps": 6, "batch_size": 4, "micro_batch_size": 2,
    "sequence_length": 96, "learning_rate": 1e-2, "save_every": 2, "keep_last": 9, "log_every": 1, "device": "cpu",
    "seed": 7,
}  # fmt: skip
STARTS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "sft": ([], {**FLAT, "dataset": "chat.jsonl", "output_dir": "sft"}),
    "pretrain": ([], {**FLAT, "dataset": "texts.jsonl", "output_dir": "pretrain"}),
    "finetune": (["--config", "finetune.yaml"], {}),
}
NUMBERS = ("loss", "validation_loss", "gradient_norm")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(OLDER, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def numbers_of(folder: Path) -> list[dict[str, float]]:
    return [{name: line[name] for name in NUMBERS if name in line} for line in read_metrics(folder)]


@pytest.mark.parametrize("command", STARTS)
def test_it_ends_as_it_did_then(run: Run, here: Path, command: str) -> None:
    folder = here / command
    before = numbers_of(folder)
    shutil.rmtree(folder / "final", ignore_errors=True)
    words, settings = STARTS[command]
    outcome = run(command, *words, **settings)
    assert outcome.code == 0, outcome.output
    assert "step-00000004 (step 4 of 6)" in outcome.output
    for then, now in zip(before, numbers_of(folder), strict=True):
        assert now == pytest.approx(then, rel=1e-4)
    then, now = starts_of(folder)
    assert now["data_sha256"] == then["data_sha256"]
    assert ("data_preparation" in then, now["data_preparation"]) == (False, "1")
    state = json.loads((folder / "checkpoints" / "step-00000006" / "state.json").read_bytes())
    assert state["identity"]["data preparation"] == {"version": "1"}


def test_another_split_is_refused(run: Run, here: Path) -> None:
    words, settings = STARTS["pretrain"]
    outcome = run("pretrain", *words, **settings, split_seed=7)
    assert outcome.code == 2
    assert "split_seed was 42, now 7" in outcome.output


def test_a_finished_one_stays_finished(run: Run, here: Path) -> None:
    words, settings = STARTS["sft"]
    outcome = run("sft", *words, **settings)
    assert (outcome.code, "already finished" in outcome.output) == (0, True), outcome.output


def test_what_it_will_read_is_counted_as_it_was_begun(run: Run, here: Path) -> None:
    def validation_documents() -> int:
        outcome = run("lacuna", "plan", "sft/config.toml", "--json")
        assert outcome.code == 0, outcome.output
        (planned,) = json.loads(outcome.output)["runs"]
        return int(planned["data"]["validation_documents"])

    assert validation_documents() == 9
    shutil.rmtree("sft/checkpoints")
    assert validation_documents() in range(6, 13)
