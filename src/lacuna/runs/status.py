"""The state of every run, from the run folders, their locks, and what SLURM knows."""

import json
import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lacuna.errors import RunError
from lacuna.runs.folder import is_held, read_status, starts_of
from lacuna.runs.identity import CHANGED, changed_inputs
from lacuna.runs.jobs import Submission, read_submissions
from lacuna.runs.logs import last_words, tail
from lacuna.runs.mapping import MAPPING, RunMapping, read_mapping
from lacuna.runs.queue import JobState, Queue, read_past, read_queue
from lacuna.visible import visible
from lacuna.words import aligned

DEPTH = 3
"""Levels of folders in which runs are looked for."""
ENDS = {
    "TIMEOUT": ("timeout", "the time limit came before the save was over: a longer lead, or a longer time"),
    "OUT_OF_MEMORY": ("out of memory", "the node's memory: raise memory, or lower micro_batch_size"),
    "NODE_FAIL": ("node failed", ""),
    "BOOT_FAIL": ("node failed", ""),
    "PREEMPTED": ("preempted", ""),
    "CANCELLED": ("cancelled", ""),
    "DEADLINE": ("timeout", "the job's deadline"),
    "REVOKED": ("cancelled", ""),
}
"""How a job ended, in SLURM's words: the run's state, and what to say where nothing better is known."""


@dataclass(frozen=True)
class RunStatus:
    """How a run is. tokens_per_second and loss: of the last logged step. reason: of a failure, or of waiting."""

    run: str
    folder: str | None
    state: str
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    restarts: int | None = None
    job: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Watched:
    """A run that exists or shall: submission and task say where a job of it is, or was, in the queue."""

    name: str
    folder: Path | None
    submission: Submission | None = None
    task: int = 0
    directory: Path = Path()
    """From which relative paths in its config are."""

    @property
    def job(self) -> str | None:
        return f"{self.submission.job}_{self.task}" if self.submission is not None else None


def table(where: str | Path) -> list[RunStatus]:
    """A row for each run of a run folder, a folder of run folders, or a run mapping. Raises RunError, ConfigError."""
    queue = read_queue()
    watched = find_runs(Path(where))
    found = [(run, read_status(run.folder) if run.folder is not None else None) for run in watched]
    alive = {
        run.folder
        for run, status in found
        if run.folder is not None and (status or {}).get("state") in ("starting", "running") and is_held(run.folder)
    }
    unclear = [job for run, status in found if (job := _unclear(run, status, queue, run.folder in alive))]
    past = {job: state for job, state in queue.jobs.items() if state.is_over}
    past |= read_past([job for job in unclear if job not in past]) if queue.time is not None else {}
    return [_status_of(run, status, run.folder in alive, queue, past) for run, status in found]


def _job(run: Watched, status: Mapping[str, Any] | None, queue: Queue) -> str | None:
    """The job of a run: the one that it was submitted as last, if that waits or runs, else the one that it names."""
    named = (status or {}).get("job")
    submitted = queue.jobs.get(run.job or "")
    return run.job if named is None or (submitted is not None and not submitted.is_over) else str(named)


def _unclear(run: Watched, status: Mapping[str, Any] | None, queue: Queue, alive: bool) -> str | None:
    """The job to ask the accounting about: where a run is not done and its job is not in the queue."""
    job = _job(run, status, queue)
    is_told = (status or {}).get("state") in ("finished", "failed") or alive or job in queue.jobs
    return None if is_told else job


def _status_of(
    run: Watched, status: Mapping[str, Any] | None, alive: bool, queue: Queue, past: Mapping[str, JobState]
) -> RunStatus:
    job = _job(run, status, queue)
    active = queue.jobs.get(job or "")
    active = None if active is not None and active.is_over else active
    folder = str(run.folder) if run.folder is not None else None
    if status is None and run.folder is not None and (run.folder / "status.json").exists():
        return RunStatus(
            run.name, folder, "died", job=job, reason="status.json cannot be read; starting the run mends it"
        )
    if status is None:
        state, reason = _unstarted(run, queue.time, active, past.get(job or ""))
        return RunStatus(run.name, folder, state, job=job, reason=reason)
    is_newer = queue.time is not None and status.get("time", 0) > queue.time
    state, reason = _started(status, alive or is_newer, active, past.get(job or ""))
    if state == "finished" and run.folder is not None:
        reason = _changed(run.folder, run.directory) or reason
    return RunStatus(
        run.name,
        folder,
        state,
        status.get("step"),
        status.get("total_steps"),
        status.get("loss"),
        status.get("tokens_per_second"),
        status.get("restarts"),
        job,
        reason,
    )


def _changed(folder: Path, directory: Path) -> str:
    """What a finished run was made of that is something else now; nothing where that is not known."""
    try:
        changed = changed_inputs((starts_of(folder) or [{}])[-1], directory)
    except RunError:
        return ""
    return CHANGED + ", ".join(changed) if changed else ""


def _unstarted(run: Watched, asked: float | None, active: JobState | None, end: JobState | None) -> tuple[str, str]:
    """asked: when SLURM was, which may have been before the job was submitted."""
    if active is not None:
        return ("pending", active.reason) if active.is_waiting else ("starting", "")
    if run.submission is None:
        return "not submitted", ""
    if asked is None or asked < run.submission.time:
        return "submitted", ""
    state, why = ENDS.get(end.state, ("failed", "")) if end is not None else ("failed", "")
    log = Path(run.submission.logs, f"{run.job}.log")
    return state, last_words(tail(log)) or why or f"job {run.job} is over, and has left no log at {log}"


def _started(status: Mapping[str, Any], alive: bool, active: JobState | None, end: JobState | None) -> tuple[str, str]:
    state, reason = str(status.get("state")), str(status.get("reason", ""))
    if state == "finished" or alive:
        return state, reason
    if active is not None and active.is_waiting:
        return "requeued", active.reason or reason
    if active is not None:
        return ("restarting", "") if state in ("interrupted", "failed") else (state, reason)
    if state == "failed":
        return state, reason
    if end is not None and end.state in ENDS:
        ended, why = ENDS[end.state]
        return ended, why or reason
    if state == "interrupted":
        return state, reason
    return "died", f"process {status.get('process')} is gone, and did not say why"


def find_runs(where: Path) -> list[Watched]:
    """Raises RunError where there is no run, ConfigError where a mapping was changed."""
    if where.name == MAPPING or (where / MAPPING).is_file():
        return _of_mapping(read_mapping(where))
    if not where.is_dir():
        raise RunError(f"{where}: no such folder; status takes a run folder, a folder of them, or a {MAPPING}")
    if (where / "status.json").is_file():
        return [Watched(where.name or str(where.resolve().name), where)]
    found = [Watched(folder[len(str(where)) :].lstrip("/"), Path(folder)) for folder in _run_folders(str(where), DEPTH)]
    if not found:
        raise RunError(f"{where}: no run is in it, and no {MAPPING}")
    return found


def _run_folders(folder: str, depth: int) -> Iterator[str]:
    with os.scandir(folder) as entries:
        inner = sorted(entry.path for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    for path in inner:
        if os.path.exists(f"{path}/status.json"):
            yield path
        elif depth > 1:
            yield from _run_folders(path, depth - 1)


def _of_mapping(mapping: RunMapping) -> list[Watched]:
    submissions = [done for done in read_submissions(mapping.file) if done.sha256 == mapping.sha256]
    tasks = {done.offset + task: (done, task) for done in submissions for task in done.numbers()}
    watched = []
    for index, (run, folder) in enumerate(mapping.folders.items()):
        submission, task = tasks.get(index, (None, 0))
        watched.append(Watched(run, folder, submission, task, mapping.directory))
    return watched


SHOWN_REASON = 120
HEADER = ("run", "state", "step", "loss", "tokens/s", "restarts", "job", "reason")


def as_json(rows: Iterable[RunStatus]) -> str:
    return json.dumps([asdict(row) for row in rows], ensure_ascii=False)


def as_text(rows: Sequence[RunStatus]) -> str:
    """A table, and how many runs are in which state."""
    lines = aligned([HEADER, *map(_cells, rows)])
    counts = Counter(row.state for row in rows)
    total = f"{len(rows)} run{'s' * (len(rows) != 1)}: " + ", ".join(f"{n} {state}" for state, n in counts.items())
    return "\n".join([*lines, total])


def _cells(row: RunStatus) -> tuple[str, ...]:
    steps = "" if row.step is None else f"{row.step}/{row.total_steps if row.total_steps is not None else '?'}"
    cells = (
        row.run,
        row.state,
        steps,
        f"{row.loss:.4f}" if row.loss is not None else "",
        f"{row.tokens_per_second:,.0f}" if row.tokens_per_second is not None else "",
        str(row.restarts) if row.restarts is not None else "",
        row.job or "",
        textwrap.shorten(row.reason, SHOWN_REASON, placeholder=" …"),
    )
    return tuple(map(visible, cells))
