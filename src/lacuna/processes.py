"""A command as a child of this process: signals reach what has to save, and its exit code says who wanted the end.

close_fds=False: the lease that `lacuna run` handed down (lacuna.launch.lease) goes on to the child, and nothing else.
"""

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LOOK_SECONDS = 0.5
TAIL_CHUNKS = 64


def how_killed(number: int) -> str:
    """`killed by SIGKILL (the system does that when memory runs out)`"""
    hint = " (the system does that when memory runs out)" if number == signal.SIGKILL else ""
    return f"killed by {signal.Signals(number).name}{hint}"


def send(number: int, processes: "Iterable[psutil.Process]") -> None:
    """A signal to those of them that are still there."""
    import psutil

    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


class Asked:
    """While entered, signals are noted, and passed on to the child, once there is one."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self.child: subprocess.Popen[bytes] | None = None

    def _note(self, number: int, _: object) -> None:
        self.signals.append(number)
        if self.child is not None:
            self.child.send_signal(number)

    def exit_code(self, code: int) -> int:
        """128 + signal where the end was asked for, which torchrun's own exit code hides."""
        return 128 + self.signals[0] if self.signals and code else 128 - code if code < 0 else code

    def __enter__(self) -> "Asked":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def run_watched(words: Sequence[str]) -> tuple[int, str]:
    """Run a command that gets every signal too; returns its exit code, and the end of its standard error."""
    with Asked() as asked:
        child = asked.child = subprocess.Popen(words, stderr=subprocess.PIPE, close_fds=False)
        for number in asked.signals:
            child.send_signal(number)
        assert child.stderr is not None
        end: deque[bytes] = deque(maxlen=TAIL_CHUNKS)
        while chunk := os.read(child.stderr.fileno(), 4096):
            end.append(chunk)
            sys.stderr.buffer.write(chunk)
            sys.stderr.buffer.flush()
        return asked.exit_code(child.wait()), b"".join(end).decode(errors="replace")


def run_torchrun(words: Sequence[str]) -> int:
    """Run a torchrun of lacuna's trainers, and tell the trainers themselves when to stop; returns the exit code.

    torchrun gives up waiting for their save when a signal comes twice, and SLURM sends it to every process of a step,
    or to the first one only. So it starts with the signals blocked; the trainers unblock them (`StopRequest`), which
    also keeps a signal that comes while they are still importing.
    """
    import psutil

    with Asked() as asked:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        child = subprocess.Popen(words, close_fds=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        told: set[psutil.Process] = set()
        while True:
            with suppress(subprocess.TimeoutExpired):
                return asked.exit_code(child.wait(LOOK_SECONDS))
            if asked.signals:
                untold = set(psutil.Process(child.pid).children()) - told
                send(asked.signals[0], untold)
                told |= untold
