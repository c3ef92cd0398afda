"""A command in a process of its own, forked from one that has imported torch: five seconds of a core less than exec."""

import atexit
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TextIO

from lacuna.cli import main as cli

COMMANDS: dict[str, Callable[[], None]] = {
    "lacuna": cli.main,
    "pretrain": cli.main_pretrain,
    "sft": cli.main_sft,
    "finetune": cli.main_finetune,
    "chat": cli.main_chat,
}


def serve(answers: TextIO) -> list[str]:
    """Start a command, or look for its end, for each line of standard input; returns in the process of a command."""
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "words" not in request:
            ended, status = os.waitpid(request["pid"], os.WNOHANG)
            running.discard(ended)
            print(json.dumps(os.waitstatus_to_exitcode(status) if ended else None), file=answers, flush=True)
        elif pid := os.fork():
            running.add(pid)
            print(pid, file=answers, flush=True)
        else:
            become(request["folder"], request["environment"], request["output"])
            return list(request["words"])
    for pid in running:
        os.kill(pid, 9)
    sys.exit()


def become(folder: str, environment: Mapping[str, str], output: str) -> None:
    """output: the file at whose end is written what the command prints."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)


class Server:
    """A process that has imported modules in its environment, and from which commands are forked."""

    def __init__(self, environment: Mapping[str, str], *modules: str) -> None:
        self.environment = environment
        words = [sys.executable, __file__, *modules]
        self._process = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.close)

    def ask(self, **request: object) -> int | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: int | None = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End it, with all that it has started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@cache
def trainers() -> Server:
    """The one for commands in the environment of the tests."""
    return Server(os.environ, "lacuna.train.start", "lacuna.finetune.start")


class Forked:
    """The process, with those methods of subprocess.Popen that tests use. Its output goes to the end of a file.

    environment: what the command finds; what modules read when they are imported was decided by the server's.
    """

    def __init__(
        self,
        words: list[str],
        output: str,
        server: Server | None = None,
        folder: Path | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._server = server or trainers()
        pid = self._server.ask(
            words=words, folder=str(folder or Path.cwd()), environment=dict(environment), output=output
        )
        assert pid is not None
        self.pid: int = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask(pid=self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(["forked"], timeout)
            time.sleep(0.002)
        return code


if __name__ == "__main__":
    del sys.path[0]  # tests/
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what modules print when they are imported is no answer
    for name in sys.argv[1:]:
        import_module(name)
    sys.argv = serve(answers)
    COMMANDS[os.path.basename(sys.argv[0])]()
