"""What the tests share: a tiny model, data, and the real commands in this process or in one of their own."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from forked import COMMANDS, Forked

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

    from browser import Open
    from slurm_cluster import Cluster
    from slurm_project import Project

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

settings.register_profile("short", max_examples=15, deadline=None)
settings.register_profile("long", max_examples=500, deadline=None)  # make test-long
settings.load_profile("short")

SCRIPTS = Path(sys.executable).parent
TESTS = Path(__file__).parent
LONGEST = (
    "docs/test_docs", "commands/test_run", "commands/test_chat", "commands/test_processes", "commands/test_slurm",
    "commands/test_finetune", "commands/test_hub", "commands/test_training", "commands/test_benchmarks",
    "runs/test_folder", "docs/test_examples", "reports/test_page", "torchtune/test_experiments",
    "commands/test_refusals",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take minutes go first, so that none of them is left over for one worker at the end."""
    rank = {TESTS / f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@dataclass
class Outcome:
    code: int
    output: str
    """Standard output and error with line breaks as single spaces, so that wrapping does not matter."""


Run = Callable[..., Outcome]


def flags(**settings: object) -> list[str]:
    """`batch_size=8` → `--batch-size 8`."""
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command as its script would, without the cost of a new process."""

    def call(command: str, *arguments: object, **settings: object) -> Outcome:
        words = [*map(str, arguments), *flags(**settings)]
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS / command), *words])
        capfd.readouterr()
        try:
            COMMANDS[command]()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capfd.readouterr()
        return Outcome(code, re.sub(r"\s+", " ", captured.out + captured.err))

    return call


class Process:
    """A command in a process of its own, which can be waited for and killed. Its output goes to a file.

    place: server, folder and environment of a forked one, where they are not those of the tests.
    """

    def __init__(self, *words: str, forked: bool = False, **place: Any) -> None:
        self._file = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115
        self.popen: subprocess.Popen[str] | Forked
        if forked:
            self.popen = Forked([*words], self._file.name, **place)
        else:
            self.popen = subprocess.Popen(words, stdout=self._file, stderr=subprocess.STDOUT, text=True)

    def output(self) -> str:
        self._file.seek(0)
        return self._file.read()

    def wait_until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Return as soon as the condition holds; fail if the process ends or the time is over before."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.popen.poll() is None, f"the process has ended:\n{self.output()}"
            assert time.monotonic() < end, f"it did not come to that:\n{self.output()}"
            time.sleep(0.002)

    def stop(self, number: int = signal.SIGKILL, seconds: float = 120) -> str:
        """Send a signal, wait for the end, and return all that was printed."""
        self.popen.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds: float = 120) -> str:
        self.popen.wait(timeout=seconds)
        return self.output()


def spawn(command: str, *arguments: object, **settings: object) -> Process:
    """Trainers are forked; `lacuna` imports so little that it starts faster by itself."""
    return Process(str(SCRIPTS / command), *map(str, arguments), *flags(**settings), forked=command != "lacuna")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fixtures import make_model

    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fixtures import write_chat

    return write_chat(tmp_path_factory.mktemp("chat") / "chat.jsonl")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fixtures import write_texts

    return write_texts(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Cluster]":
    from slurm_cluster import start_cluster

    yield from start_cluster(tmp_path_factory)


@pytest.fixture
def project(cluster: "Cluster", tmp_path: Path, model_folder: Path, chat_file: Path) -> "Project":
    from slurm_project import Project

    return Project(tmp_path / "my project", cluster, model_folder, chat_file)


@pytest.fixture(scope="module")
def browser() -> "Iterator[Chrome]":
    from browser import start_browser

    yield from start_browser()


@pytest.fixture
def open_page(browser: "Chrome", tmp_path: Path) -> "Iterator[Open]":
    from browser import page_opener

    yield from page_opener(browser, tmp_path)
