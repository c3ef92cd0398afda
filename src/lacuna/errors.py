"""Every failure that a user can cause or mend.

LacunaError            exit 2, one message, no traceback
├── ConfigError        a config file, a flag or a value in it
├── DataError          a data file, its rows, or what the chat template makes of them
├── ModelError         a model folder or name, its tokenizer, or what the model cannot do
│   └── ChangedBaseError   an adapter's base model is not the one that it was trained over
├── RunError           the run folder: in use, of another run, damaged, disk full
│   └── OtherInputsError   exit 1: the run is finished, but its data or its model are other ones now
├── ClusterError       SLURM: not there, or it refused
├── NonFiniteLossError training diverged; the last checkpoint is untouched
├── LostProcessError   another process of the run has ended; its own message says why
└── MissingExtraError  an optional dependency is not installed
Interrupted            exit 128 + signal: stopped on request, everything is saved
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from lacuna.installation import install_command
from lacuna.visible import without_passwords


class LacunaError(Exception):
    """One or several problems, each a sentence that says what, where and what to do, and no password of a URL.

    is_shared: all processes of the run raise it, so that one of them may speak for all.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str], is_shared: bool = False) -> None:
        self.problems = [*map(without_passwords, [problems] if isinstance(problems, str) else problems)]
        self.is_shared = is_shared
        super().__init__("\n".join(self.problems))


class ConfigError(LacunaError):
    """A config file, a flag or a value in it."""


class DataError(LacunaError):
    """A data file, its rows, or what the chat template makes of them."""


class ModelError(LacunaError):
    """A model folder or name, its tokenizer, or what the model cannot do."""


class RunError(LacunaError):
    """The run folder: in use, of another run, damaged, or the disk is full."""


class ChangedBaseError(ModelError):
    """An adapter's base model is not the one that it was trained over."""

    def __init__(self, adapter: object, changed: Sequence[str]) -> None:
        super().__init__(
            f"{adapter}: its base model is not the one that it was trained over: {', '.join(changed)} changed since; "
            "restore it, or pass --allow-changed-base, and know that the adapter was made for other weights"
        )


class OtherInputsError(RunError):
    """The run is finished, but its data, tokenizer or base model are other ones now."""

    exit_code = 1


class ClusterError(LacunaError):
    """SLURM is not there, or it refused."""


class NonFiniteLossError(LacunaError):
    """The loss or the gradient is not a number; the optimizer has not moved."""


class LostProcessError(LacunaError):
    """Another process of the run has ended; its own message says why."""

    exit_code = 75


class MissingExtraError(LacunaError):
    """An optional dependency is not installed."""

    def __init__(self, extra: str, module: str) -> None:
        super().__init__(f"this command needs {module!r}, which is not installed: {install_command(extra)}")


@contextmanager
def needs_extra(extra: str, module: str) -> Iterator[None]:
    """For what is imported within; module: what to name where Python does not say which one it misses.

    Raises MissingExtraError where that is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(extra, error.name or module) from error


class Interrupted(BaseException):
    """A signal asked for the end; `signal_number` gives the exit code.

    No Exception: libraries that catch those, and retry or go on, must not catch this.
    """

    def __init__(self, signal_number: int, message: str) -> None:
        self.signal_number = signal_number
        super().__init__(message)


Kind = Literal["wrong", "start", "here", "unsure"]
"""wrong: everywhere, and where the trainer would not notice it, it would train something else. start: the trainer
refuses it by itself when it starts. here: not on this machine, but it may be on the one that trains. unsure: may be
right, so it is said and stops nothing."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one run's config, and what to do about it."""

    run: str
    path: str
    what: str
    todo: str
    kind: Kind = "wrong"

    @property
    def stops_a_start(self) -> bool:
        return self.kind != "unsure"
