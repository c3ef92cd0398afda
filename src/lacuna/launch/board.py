"""What a person sees while the runs of an experiment go on: a table in a terminal, a line for each event elsewhere."""

import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lacuna.runs.folder import OUTPUT_LOG, read_status
from lacuna.runs.mapping import GeneratedRun
from lacuna.visible import visible
from lacuna.words import format_duration

REFRESH_SECONDS = 0.5
SHOWN_RUNS = 20
"""Up to so many are all shown; of more, those that run or have failed last."""
SHOWN_REASON = 80
"""Characters of a reason; all of it is said at the end."""


class Board:
    """States of the runs of one call, by id: waiting, running, elsewhere, finished, failed, stopped …"""

    def __init__(
        self, runs: Sequence[GeneratedRun], finished: Sequence[GeneratedRun], jobs: int, console: Console
    ) -> None:
        self.states = {run.id: "waiting" for run in runs} | {run.id: "finished" for run in finished}
        self._runs = {run.id: run for run in sorted([*runs, *finished], key=lambda run: run.index)}
        self._jobs = jobs
        self._console = console
        self._starts: dict[str, tuple[float, float]] = {}
        self._seconds: list[float] = []
        self._failed: list[str] = []
        self.reasons: dict[str, str] = {}
        self._shown = 0.0
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "Board":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self.render(), refresh=True)
            self._live.stop()

    def say(self, text: str) -> None:
        """A line, above the table where there is one."""
        self._console.print(Text(visible(text)), soft_wrap=True)

    def started(self, run: GeneratedRun, again: bool) -> None:
        """again: it cannot go on where it was, and begins anew."""
        self.states[run.id] = "running"
        self._starts[run.id] = (time.monotonic(), _share(read_status(run.folder) or {}))
        own = ", ".join(
            [*([run.varies] if run.varies else []), *([f"seed {run.seed}"] if run.seed is not None else [])]
        )
        if again:
            self.say(f"{run.id} begins again: torchtune cannot go on where it stopped")
        self._event(f"{run.id} started{f' ({own})' if own else ''}")

    def is_elsewhere(self, run: GeneratedRun) -> None:
        if self.states[run.id] != "elsewhere":
            self.states[run.id] = "elsewhere"
            self._event(f"{run.id} runs in another process")

    def ended(self, run: GeneratedRun, state: str, reason: str) -> None:
        self.states[run.id], self.reasons[run.id] = state, reason
        start = self._starts.pop(run.id, None)
        if state == "finished":
            self._seconds += [time.monotonic() - start[0]] if start is not None else []
            loss = (read_status(run.folder) or {}).get("loss")
            said = ", ".join([*([f"loss {loss:.4f}"] if loss is not None else []), *([reason] if reason else [])])
            done = f"{Counter(self.states.values())['finished']} of {len(self.states)}"
            self._event(f"{run.id} finished{f', {said}' if said else ''} ({done})")
            return
        self._failed += [run.id] if state != "stopped" else []
        said = textwrap.shorten(reason, SHOWN_REASON, placeholder=" …")
        said = said or ("as it was told to" if state == "stopped" else "it did not say why")
        self._event(f"{run.id} {state}: {said}; log: {run.folder / OUTPUT_LOG}")

    def _event(self, text: str) -> None:
        if self._live is None:
            self.say(text)

    def refresh(self) -> None:
        """Draw the table anew, if it is time to."""
        if self._live is not None and time.monotonic() - self._shown >= REFRESH_SECONDS:
            self._shown = time.monotonic()
            self._live.update(self.render(), refresh=True)

    def render(self) -> Group:
        """The table as it is now."""
        names = list(self._runs)
        if len(names) > SHOWN_RUNS:
            names = [*self._failed[-SHOWN_RUNS // 2 :], *self._starts]
        table = Table(box=None, pad_edge=False)
        for name in ("run", "settings", "seed", "state", "step", "loss", "tokens/s", "reason"):
            table.add_column(name, no_wrap=name not in ("settings", "reason"))
        for id in names:
            run, state = self._runs[id], self.states[id]
            status = (read_status(run.folder) or {}) if state != "waiting" else {}
            loss, speed = status.get("loss"), status.get("tokens_per_second")
            cells = [
                id, run.varies, str(run.seed) if run.seed is not None else "", state,
                f"{status['step']}/{status.get('total_steps') or '?'}" if "step" in status else "",
                f"{loss:.4f}" if loss is not None else "", f"{speed:,.0f}" if speed is not None else "",
                visible(textwrap.shorten(self.reasons.get(id, ""), SHOWN_REASON, placeholder=" …")),
            ]  # fmt: skip
            table.add_row(*map(Text, cells))
        return Group(table, Text(self.summary()))

    def summary(self) -> str:
        """How many runs are in which state, and the time that is left."""
        found = Counter(self.states.values())
        counts = ", ".join(f"{found[state]} {state}" for state in sorted(found))
        now = time.monotonic()
        going = [
            (now - began, share, _share(read_status(self._runs[id].folder) or {}))
            for id, (began, share) in self._starts.items()
        ]
        left = seconds_left(self._seconds, going, found["waiting"], self._jobs)
        runs = f"{len(self.states)} run{'s' * (len(self.states) != 1)}"
        return f"{runs}: {counts}" + (f"; about {format_duration(left)} left" if left is not None else "")


def _share(status: dict[str, Any]) -> float:
    """Of its steps that a run has done."""
    return status.get("step", 0) / status["total_steps"] if status.get("total_steps") else 0.0


def seconds_left(
    done: Sequence[float], going: Sequence[tuple[float, float, float]], waiting: int, jobs: int
) -> float | None:
    """Until all runs are over; None before there is anything to tell by.

    done: seconds of those that finished. going: of each that runs, its seconds, and its share of steps done at its
    start and now. waiting: how many have not begun.
    """
    if not done and not any(now > before for _, before, now in going):
        return None
    rests = [seconds * (1 - now) / (now - before) for seconds, before, now in going if now > before]
    whole = [*done, *(seconds / (now - before) for seconds, before, now in going if now > before)]
    mean = sum(whole) / len(whole)
    rests += [mean] * (len(going) - len(rests) + waiting)
    return max([sum(rests) / jobs, *rests[: len(going)]]) if rests else 0.0
