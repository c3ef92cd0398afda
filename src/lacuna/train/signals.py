"""Ctrl-C, SIGTERM and SIGUSR1: stop at the next safe point, with everything saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lacuna.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While entered, a signal ends the program at once as long as `at_once` is set, and is only noted otherwise.

    A second Ctrl-C never waits. Signals that a launcher blocked (lacuna.processes) are let through.
    """

    def __init__(self) -> None:
        self.at_once = True
        self.signal_number: int | None = None
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def _handle(self, number: int, _: FrameType | None) -> None:
        again = self.signal_number == signal.SIGINT == number
        self.signal_number = number
        if self.at_once or again:
            raise Interrupted(number, "stopped before anything was trained" if self.at_once else "stopped at once")

    @contextmanager
    def ends_the_wait(self) -> Iterator[None]:
        """Within it a signal raises Interrupted at once: for what may hang and has nothing to save."""
        self.at_once = True
        try:
            if self.signal_number is not None:
                raise Interrupted(self.signal_number, "stopped at once")
            yield
        finally:
            self.at_once = False

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
