"""A command in a process of its own, forked from one that has imported torch: five seconds of a core less than exec."""

import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import get_context

from lacuna.cli import main as cli

COMMANDS: dict[str, Callable[[], None]] = {
    "lacuna": cli.main,
    "pretrain": cli.main_pretrain,
    "sft": cli.main_sft,
    "finetune": cli.main_finetune,
    "chat": cli.main_chat,
}
SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["lacuna.train.start", "lacuna.finetune.start"])


def _run(words: list[str], place: str, environment: dict[str, str], output: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    COMMANDS[os.path.basename(words[0])]()


class Forked:
    """The process, with those methods of subprocess.Popen that tests use. Its output goes to the end of a file."""

    def __init__(self, words: list[str], output: str) -> None:
        arguments = (words, os.getcwd(), dict(os.environ), output)
        self._process = SERVER.Process(target=_run, args=arguments, daemon=True)  # ends with the tests
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float) -> None:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(["forked"], timeout)
