"""What a person sees while it trains: one line that moves in a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn

from lacuna.words import format_duration

Describe = Callable[[Mapping[str, float], int, str], str]
"""(metrics, total steps, time that is left or "") → a line."""


def step_line(metrics: Mapping[str, float], total_steps: int, left: str) -> str:
    parts = [f"step {metrics['step']}/{total_steps}", f"loss {metrics['loss']:.4f}"]
    parts += [f"lr {metrics['learning_rate']:.2e}", f"grad {metrics['gradient_norm']:.2f}"]
    parts += [f"{metrics['tokens_per_second']:,.0f} tok/s"]
    if "mfu" in metrics:
        parts.append(f"MFU {metrics['mfu']:.1%}")
    return " | ".join([*parts, f"ETA {left}"] if left else parts)


STEP_COLUMNS = (
    TextColumn("step {task.completed}/{task.total}"),
    BarColumn(),
    TextColumn("{task.percentage:.0f}% | {task.fields[line]}"),
)


class TrainingProgress:
    """Lines of metrics above one that moves, which only exists in a terminal."""

    def __init__(
        self,
        console: Console,
        total_steps: int,
        start_step: int,
        describe: Describe = step_line,
        columns: tuple[ProgressColumn, ...] = STEP_COLUMNS,
    ) -> None:
        self.console = console
        self.total_steps = total_steps
        self.describe = describe
        self._first: tuple[int, float] | None = None
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task("train", total=total_steps, completed=start_step, line="")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Note that a step is done; the time before the first one, with its validation, says nothing of the rest."""
        self._first = self._first or (step, time.monotonic())
        self._bar.update(self._task, completed=step)

    def show(self, metrics: Mapping[str, float]) -> None:
        """Print a line of metrics, with the time that is left."""
        step = int(metrics["step"])
        first_step, first_time = self._first or (step, 0.0)
        left = ""
        if step > first_step:
            left = format_duration((time.monotonic() - first_time) / (step - first_step) * (self.total_steps - step))
        line = self.describe(metrics, self.total_steps, left)
        self._bar.update(self._task, line=line)
        self.console.print(line)
