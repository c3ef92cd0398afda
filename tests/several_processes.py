"""Runs on several processes: their settings, what their folders must have in common, and torchrun by hand."""

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.torch import load_file

from conftest import SCRIPTS, Process, flags, spawn
from fixtures import make_model, write_chat
from lacuna.runs.metrics import read_metrics

SFT = {
    "sequence_length": 64, "batch_size": 8, "micro_batch_size": 2, "steps": 40, "learning_rate": 1e-3, "log_every": 1,
    "save_every": 10, "keep_last": 9, "validation_share": 0.2, "device": "cpu", "seed": 3,
}  # fmt: skip
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def finished(command: str, folder: Path, settings: dict[str, Any], **more: Any) -> Path:
    process = spawn(command, output_dir=folder, **{**settings, **more})
    output = process.wait()
    assert process.popen.returncode == 0, output
    return folder


def losses(folder: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_metrics(folder) if name in line]


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "final" / "model.safetensors")


def assert_close(folder: Path, other: Path, tolerance: float = 2e-4) -> None:
    for name in ("loss", "validation_loss", "tokens", "targets", "learning_rate"):
        np.testing.assert_allclose(losses(folder, name), losses(other, name), **CLOSE)
    theirs = weights(other)
    for name, weight in weights(folder).items():
        assert float((weight - theirs[name]).abs().max()) < tolerance, name


def assert_same_bits(folder: Path, other: Path) -> None:
    assert losses(folder) == losses(other)
    assert losses(folder, "validation_loss") == losses(other, "validation_loss")
    names = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json")
    for name in names:
        assert (folder / "final" / name).read_bytes() == (other / "final" / name).read_bytes(), name


def workers(launcher: int) -> dict[int, psutil.Process]:
    """The processes that train, by rank."""
    found = {}
    for child in psutil.Process(launcher).children():
        try:
            environment = child.environ()
        except psutil.Error:
            continue
        if "LOCAL_RANK" in environment:
            found[int(environment["RANK"])] = child
    return found


def reached(folder: Path, step: int) -> Callable[[], bool]:
    return lambda: any(line["step"] >= step for line in read_metrics(folder))


def torchrun(folder: Path, settings: dict[str, Any], *words: str, processes: int = 2, script: str = "") -> Process:
    """torchrun by hand. script: what each process runs before it trains."""
    command = [sys.executable, "-m", "lacuna", "sft", *flags(output_dir=folder, **settings)]
    (folder.parent / "train.sh").write_text(f'{script}\nexec "$@"\n')
    start = ["--nproc-per-node", str(processes), *words, "--no-python", "bash", str(folder.parent / "train.sh")]
    return Process(str(SCRIPTS / "torchrun"), *start, *command)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def write_settings(folder: Path) -> dict[str, Any]:
    """Of a run of SFT, with its model and data in the folder."""
    make_model(folder / "model")
    data = write_chat(folder / "chat.jsonl", rows=120)
    return {**SFT, "model_name": folder / "model", "dataset": data}
