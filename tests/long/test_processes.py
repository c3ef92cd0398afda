"""Runs on several processes that torchrun starts by hand, on two nodes, or that are killed while they save."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import SCRIPTS, Process, flags, spawn
from fixtures import make_model
from lacuna.runs.folder import starts_of
from several_processes import (
    assert_close,
    assert_same_bits,
    finished,
    free_port,
    reached,
    torchrun,
    workers,
    write_settings,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_settings(tmp_path_factory.mktemp("processes"))


def test_a_process_killed_amid_a_save(settings: dict[str, Any], tmp_path: Path) -> None:
    """Of the checkpoint that it was part of nothing is left, and nothing is lost."""
    make_model(tmp_path / "large", hidden=384)
    large = {**settings, "model_name": tmp_path / "large", "steps": 4, "save_every": 2, "gpus": 2}
    undisturbed = finished("sft", tmp_path / "undisturbed", large)
    folder = tmp_path / "run"
    process = spawn("sft", output_dir=folder, **{**large, "max_restarts": 2})
    process.wait_until(lambda: list(folder.glob("checkpoints/.step-*2.partial/*.safetensors")))
    workers(process.popen.pid)[1].send_signal(signal.SIGKILL)
    output = process.wait()
    assert process.popen.returncode == 0, output
    assert "restart 1 of 2" in output
    assert not list(folder.glob("checkpoints/.*.partial"))
    assert_same_bits(folder, undisturbed)


def test_torchrun_by_hand(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own restarts need a variable, and it is said; scripts/launch.sh sets it."""
    folder = tmp_path / "run"
    process = torchrun(folder, settings, "--standalone", "--max-restarts", "1")
    process.wait_until(reached(folder, 5))
    workers(process.popen.pid)[1].send_signal(signal.SIGKILL)
    output = process.wait()
    assert process.popen.returncode == 1
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun" in output
    monkeypatch.setenv("PATH", f"{SCRIPTS}:{os.environ['PATH']}")
    process = Process(str(ROOT / "scripts/launch.sh"), "2", "sft", *flags(output_dir=folder, **settings))
    process.wait_until(reached(folder, 25))
    workers(process.popen.pid)[1].send_signal(signal.SIGKILL)
    output = process.wait()
    assert process.popen.returncode == 0, output
    assert_same_bits(folder, finished("sft", tmp_path / "two", settings, gpus=2))


@pytest.fixture
def nodes(settings: dict[str, Any]) -> Iterator[Callable[..., list[Process]]]:
    """Start a run on two nodes, which are two torchruns on this machine."""
    started: list[Process] = []

    def start(folder: Path, processes: int, **more: Any) -> list[Process]:
        place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--local-addr", "localhost"]
        for _ in range(2):
            words = ["--nnodes", "2", "--rdzv-id", "test", *place]
            started.append(torchrun(folder, {**settings, **more}, *words, processes=processes))
        return started

    yield start
    for process in started:
        process.popen.kill()


def test_two_nodes(nodes: Callable[..., list[Process]], settings: dict[str, Any], tmp_path: Path) -> None:
    """Hybrid sharding: two nodes of two processes, each node with all weights."""
    for process in nodes(tmp_path / "run", 2, sharding="hybrid"):
        output = process.wait()
        assert process.popen.returncode == 0, output
    assert_close(tmp_path / "run", finished("sft", tmp_path / "one", settings))
    assert starts_of(tmp_path / "run")[-1]["devices"] == 4
