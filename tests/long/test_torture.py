"""Runs that are killed, starved and corrupted at random: by a seed, so that a trial that fails can be looked at.

What holds in each: no traceback, and in the end the undisturbed run's bits, or a message and exit code 2. Another word
in LACUNA_TORTURE makes other trials of them.
"""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random
from time import sleep
from typing import Any

import pytest

from conftest import Process, spawn
from fixtures import make_model, write_chat, write_texts
from lacuna.runs.final import entries_of
from lacuna.runs.metrics import read_metrics

TIMES = {"tokens_per_second", "data_wait", "peak_memory_gib"}
STEPS = 14
OTHERS = os.environ.get("LACUNA_TORTURE", "")
FLAT = {
    "model_name": "model", "steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "sequence_length": 64,
    "learning_rate": 1e-2, "save_every": 4, "keep_last": 2, "evaluate_every": 2, "final_weights": "best",
    "log_every": 1, "device": "cpu", "output_dir": "out",
}  # fmt: skip
FINETUNE = {
    "model": {"path": "model"}, "dataset": {"path": "chat.jsonl"}, "device": "cpu",
    "training": {
        "output_dir": "out", "max_steps": STEPS, "batch_size": 2, "gradient_accumulation_steps": 2,
        "sequence_length": 96, "save_steps": 4, "eval_steps": 2, "logging_steps": 1, "lora_r": 2,
        "learning_rate": 1e-2, "final_weights": "best",
    },
}  # fmt: skip
TRAINERS: dict[str, dict[str, Any]] = {
    "sft": {**FLAT, "dataset": "chat.jsonl", "validation_share": 0.2},
    "pretrain": {
        **FLAT, "dataset": "texts.jsonl", "validation_dataset": "held_out.jsonl", "streaming": "true",
        "streaming_window": 4,
    },
    "finetune": {"config": "finetune.json.yaml"},
}  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, data, and of every trainer the undisturbed run and one that was killed at its tenth step."""
    place = tmp_path_factory.mktemp("torture")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        make_model(Path("model"))
        write_chat(Path("chat.jsonl"))
        write_texts(Path("texts.jsonl"))
        write_texts(Path("held_out.jsonl"), rows=8, seed=3)
        Path("finetune.json.yaml").write_text(json.dumps(FINETUNE))
        for trainer in TRAINERS:
            assert whole(trainer) == ""
            Path("out").rename(f"undisturbed_{trainer}")
            process = start(trainer)
            process.wait_until(lambda: logged() >= 10)
            process.stop()
            Path("out").rename(f"killed_{trainer}")
    return place


@pytest.fixture
def here(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workshop)
    shutil.rmtree("out", ignore_errors=True)
    return workshop


def start(trainer: str) -> Process:
    return spawn(trainer, **TRAINERS[trainer])


def whole(trainer: str) -> str:
    """Run to the end; what was said if that was no success."""
    process = start(trainer)
    said = process.wait()
    return "" if process.popen.returncode == 0 else said


def logged() -> int:
    return max((line["step"] for line in read_metrics(Path("out"))), default=-1)


def results(folder: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Hashes of the weights, and the metrics without what a clock decides."""
    weights = {name: entry["sha256"] for name, entry in entries_of(folder / "final").items() if "safetensors" in name}
    lines = read_metrics(folder)
    return weights, [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def assert_as_undisturbed(trainer: str) -> None:
    weights, lines = results(Path("out"))
    expected, expected_lines = results(Path(f"undisturbed_{trainer}"))
    assert weights == expected
    assert lines == expected_lines
    assert not list(Path("out").glob(".*.partial"))


def when(random: Random, process: Process) -> None:
    """Some moment of the run, or its end."""
    step = random.randint(-1, STEPS)
    while process.popen.poll() is None and logged() < step:
        sleep(0.002)
    sleep(random.random() * 0.03)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("seed", range(8))
def test_killed_and_started_again(here: Path, trainer: str, seed: int) -> None:
    random = Random(f"{OTHERS} {trainer} {seed}")
    for _ in range(random.randint(1, 3)):
        process = start(trainer)
        when(random, process)
        said = process.stop(random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        assert "Traceback" not in said, said
    assert whole(trainer) == ""
    assert_as_undisturbed(trainer)


DAMAGES: dict[str, Callable[[bytes, Random], bytes]] = {
    "emptied": lambda content, random: b"",
    "cut": lambda content, random: content[: random.randrange(len(content) or 1)],
    "flipped": lambda content, random: flipped(content, random.randrange(len(content) or 1)),
    "zeroed": lambda content, random: bytes(len(content)),
    "lengthened": lambda content, random: content + random.randbytes(9),
    "null": lambda content, random: b"null",
}


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] if content else b"\1"


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("seed", range(16))
def test_one_file_of_a_killed_run_is_damaged(here: Path, trainer: str, seed: int) -> None:
    """It goes on to the same weights, or says which file is wrong. Metrics that were lost are told."""
    random = Random(f"{OTHERS} {trainer} damage {seed}")
    shutil.copytree(f"killed_{trainer}", "out")
    files = sorted(path for path in Path("out").rglob("*") if path.is_file() and path.name != ".lock")
    file, how = random.choice(files), random.choice([*DAMAGES, "deleted"])
    if how == "deleted":
        file.unlink()
    else:
        file.write_bytes(DAMAGES[how](file.read_bytes(), random))
    process = start(trainer)
    said = process.wait()
    told = f"{file} {how}: {said}"
    assert "Traceback" not in said, told
    assert process.popen.returncode in (0, 2), told
    if process.popen.returncode == 2:
        assert file.name in said or "other settings" in said or "every checkpoint is damaged" in said, told
        return
    assert results(Path("out"))[0] == results(Path(f"undisturbed_{trainer}"))[0], told
    if "metrics.jsonl" not in said:
        assert_as_undisturbed(trainer)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("seed", range(6))
def test_files_can_be_written_only_so_far(here: Path, trainer: str, seed: int) -> None:
    """As on a disk that is full. Afterwards the run goes on."""
    random = Random(f"{OTHERS} {trainer} full {seed}")
    process = start(trainer)
    when(random, process)
    if process.popen.poll() is None:
        limit = random.randint(20_000, 300_000)
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    said = process.wait()
    assert "Traceback" not in said, said
    assert process.popen.returncode in (0, 2), said
    assert whole(trainer) == ""
    assert_as_undisturbed(trainer)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("seed", range(4))
def test_no_more_files_can_be_opened(here: Path, trainer: str, seed: int) -> None:
    random = Random(f"{OTHERS} {trainer} files {seed}")
    process = start(trainer)
    process.wait_until(lambda: logged() >= 0)
    when(random, process)
    if process.popen.poll() is None:
        opened = len(list(Path(f"/proc/{process.popen.pid}/fd").iterdir()))
        limit = opened + random.randint(0, 3)
        resource.prlimit(process.popen.pid, resource.RLIMIT_NOFILE, (limit, 4096))
    said = process.wait()
    assert "Traceback" not in said, said
    assert process.popen.returncode in (0, 2), said
    assert whole(trainer) == ""
    assert_as_undisturbed(trainer)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("seed", range(4))
def test_the_run_folder_vanishes(here: Path, trainer: str, seed: int) -> None:
    random = Random(f"{OTHERS} {trainer} vanishes {seed}")
    process = start(trainer)
    process.wait_until(lambda: logged() >= 0)
    when(random, process)
    Path("out").rename("gone") if Path("out").exists() else None
    said = process.wait()
    shutil.rmtree("gone", ignore_errors=True)
    assert "Traceback" not in said, said
    assert process.popen.returncode in (0, 2), said
    shutil.rmtree("out", ignore_errors=True)
