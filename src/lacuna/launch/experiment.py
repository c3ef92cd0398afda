"""`lacuna run`: the runs of an experiment that are missing or unfinished, here or on a SLURM cluster."""

import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lacuna.config.files import read_layer
from lacuna.errors import ConfigError, OtherInputsError, Problem
from lacuna.experiment.folder import span_of
from lacuna.experiment.generator import generate
from lacuna.launch.board import Board
from lacuna.launch.devices import shares, visible_devices
from lacuna.launch.lease import is_leased
from lacuna.launch.pool import execute
from lacuna.launch.selection import choose, missing_and_finished, with_other_inputs
from lacuna.launch.slurm import distinct_configs, with_configs, write_scripts
from lacuna.launch.start import processes_of
from lacuna.machine.detect import read_host
from lacuna.preflight.ready import problems_of, refuse
from lacuna.runs.folder import OUTPUT_LOG, is_held, job_of, put_aside
from lacuna.runs.mapping import MAPPING, GeneratedRun, RunMapping, read_mapping
from lacuna.runs.status import RunStatus, table
from lacuna.visible import visible

QUEUED = {"pending", "submitted", "starting", "running", "requeued", "restarting"}
NOT_STARTED = "not submitted"
"""What `lacuna status` says of a run that neither SLURM nor a process has begun."""
SHOWN_FAILURES = 20


@dataclass(frozen=True)
class Outcome:
    """rows: of the runs that were asked for, as `lacuna status` has them. jobs: the ids of what SLURM was given.

    exit_code: 0 all finished (or submitted), 1 some failed or are missing, 128 + signal when told to stop.
    """

    configs: str
    rows: list[RunStatus]
    exit_code: int
    jobs: list[str]


def run(
    target: str | Path | Mapping[str, Any],
    *,
    configs: str | None = None,
    force: bool = False,
    only: str | Sequence[str] = (),
    jobs: int | None = None,
    slurm: bool = False,
    cluster: str | None = None,
    output: str | None = None,
    torchtune_python: str | None = None,
    again: bool = False,
) -> Outcome:
    """Run what is missing or unfinished of an experiment, and show how it goes; finished runs are left as they are.

    target: an experiment (a file, or the same as a mapping), or the folder of its configs or their run_mapping.yaml.
    configs, force: as output and force of `generate`, for an experiment; configs is "configs" by default.
    only: ids of runs. jobs: runs at the same time, 1 by default. slurm: submit the runs as an array instead, with the
    settings of the experiment's slurm section over those of the file `cluster`; output: where its scripts and logs go.

    again: train those anew that are finished, but whose data or model have changed since; their folders are put aside.
    Raises ConfigError with all problems before anything is started, and OtherInputsError for such runs without again.
    """
    _check_options(target, configs, force, jobs, slurm, cluster, output)
    console = Console(highlight=False)
    mapping, problems = _generated(target, configs or "configs", force, torchtune_python, console)
    chosen = choose(mapping, [only] if isinstance(only, str) else only)
    missing, finished = missing_and_finished(mapping, chosen)
    stale = with_other_inputs(mapping, finished)
    if stale and not again:
        raise OtherInputsError(list(_tell_stale(stale, len(finished))))
    wanted = [*_unqueued(missing, _rows(mapping, chosen), console), *(run for run, _ in stale)]
    if problems is None:
        problems = problems_of(mapping, [run.index for run in wanted], torchtune_python)
    refuse(problems, [run.id for run in wanted])
    for run, _ in stale:
        _note(f"{run.id}, finished, is kept: {put_aside(run.folder)}", console)
    missing = sorted(wanted, key=lambda run: run.index)
    started_anew = {run.id for run, _ in stale}
    finished = [run for run in finished if run.id not in started_anew]
    place = os.path.relpath(mapping.file.parent)
    if slurm:
        return _submit(mapping, chosen, missing, place, cluster, output or "slurm", torchtune_python, console)
    if not missing:
        rows = _rows(mapping, chosen)
        console.print(f"already finished: {len(finished)} of {len(rows)} runs")
        return Outcome(place, rows, int(len(finished) < len(rows)), [])
    parts = _shares(mapping, jobs or 1)
    with Board(missing, finished, len(parts), console) as board:
        signals = execute(missing, _words(mapping, torchtune_python), mapping.directory, parts, board)
    rows = [_known(row, board) for row in _rows(mapping, chosen)]
    _tell(rows, missing, _same_again(place, rows, only, jobs), bool(signals), console)
    if signals:
        return Outcome(place, rows, 128 + signals[0], [])
    return Outcome(place, rows, int(any(row.state != "finished" for row in rows)), [])


def _generated(
    target: str | Path | Mapping[str, Any], configs: str, force: bool, torchtune_python: str | None, console: Console
) -> tuple[RunMapping, list[Problem] | None]:
    """The mapping of an experiment's runs, and what keeps them from starting here, where generating has shown that."""
    problems: list[Problem] | None
    if isinstance(target, Mapping):
        done = generate(target, configs, force=force, torchtune_python=torchtune_python)
        target, notes, problems = done.output, done.notes, done.warnings
    else:
        target, notes, problems = with_configs(target, configs, force, torchtune_python)
    for note in notes:
        _note(note, console)
    return read_mapping(target), problems


def _note(text: str, console: Console) -> None:
    console.print(f"note: {text}", soft_wrap=True, markup=False)


def _unqueued(missing: Sequence[GeneratedRun], rows: Sequence[RunStatus], console: Console) -> list[GeneratedRun]:
    """The runs that SLURM has in no job; of the others it is said."""
    queued = {row.run: row for row in rows if _is_queued(row)}
    for row in list(queued.values())[:SHOWN_FAILURES]:
        _note(f"{row.run} is {row.state} in SLURM's job {row.job}: left to it", console)
    return [run for run in missing if run.id not in queued]


def _words(mapping: RunMapping, torchtune_python: str | None) -> list[str]:
    """Of `lacuna start`, before the run's index."""
    words = ["--sha256", mapping.sha256, str(mapping.file)]
    if mapping.head["trainer"] == "torchtune" and torchtune_python is not None:
        return ["--torchtune-python", torchtune_python, *words]
    return words


def _same_again(place: str, rows: Sequence[RunStatus], only: str | Sequence[str], jobs: int | None) -> str:
    """The command that goes on with these runs."""
    words = ["lacuna", "run", place]
    if only:
        words += ["--only", ",".join(row.run for row in rows)]
    if jobs is not None:
        words += ["--jobs", str(jobs)]
    return shlex.join(words)


def _tell_stale(stale: Sequence[tuple[GeneratedRun, Sequence[str]]], finished: int) -> Iterator[str]:
    runs: dict[str, list[str]] = {}
    for run, changed in stale:
        runs.setdefault(", ".join(changed), []).append(run.id)
    for changed, ids in runs.items():
        yield f"{span_of(ids)}: finished, but made of something else: {changed} changed since"
    yield (
        f"{len(stale)} of {finished} finished runs: nothing was started; --again trains these anew and keeps their "
        "folders beside the new ones, --only starts others"
    )


def _check_options(
    target: str | Path | Mapping[str, Any],
    configs: str | None,
    force: bool,
    jobs: int | None,
    slurm: bool,
    cluster: str | None,
    output: str | None,
) -> None:
    is_generated = isinstance(target, str | Path) and (Path(target).is_dir() or Path(target).name == MAPPING)
    problems = []
    if jobs is not None and jobs < 1:
        problems.append(f"--jobs {jobs}: at least 1")
    if slurm and jobs is not None:
        problems.append(
            "--jobs is for runs here; with --slurm, `parallel` in the slurm section says how many at a time"
        )
    if not slurm and (cluster is not None or output is not None):
        problems.append("--cluster and --output are for --slurm")
    if is_generated and (configs is not None or force):
        problems.append(f"--configs and --force are for an experiment, and {target} is generated already")
    if problems:
        raise ConfigError(problems)


def _rows(mapping: RunMapping, chosen: Sequence[int]) -> list[RunStatus]:
    rows = table(mapping.file)
    return [rows[index] for index in chosen]


def _is_queued(row: RunStatus) -> bool:
    """Whether SLURM has the run in a job, other than this one; what a process here has is not SLURM's."""
    is_in_a_job = row.job is not None and row.state in QUEUED and row.job != job_of(os.environ).get("job")
    return is_in_a_job and not is_leased(Path(str(row.folder)))


def _shares(mapping: RunMapping, jobs: int) -> list[dict[str, str]]:
    """The variables of the runs at the same time."""
    configs = distinct_configs(mapping)
    is_torchtune = mapping.head["trainer"] == "torchtune"
    gpus = mapping.head["gpus"] if is_torchtune else max(map(processes_of, configs))
    wanted = {str(read_layer(config).values.get("device", "auto")).partition(":")[0] for config in configs}
    wants = next((kind for kind in ("cuda", "auto") if kind in wanted), "cpu")
    devices = visible_devices(os.environ) if wants != "cpu" else []
    return shares(jobs, gpus, wants, devices, read_host().cores, os.environ)


def _submit(
    mapping: RunMapping,
    chosen: Sequence[int],
    missing: Sequence[GeneratedRun],
    place: str,
    cluster: str | None,
    output: str,
    torchtune_python: str | None,
    console: Console,
) -> Outcome:
    """Give SLURM those of the missing runs that no process here has."""
    free = [run for run in missing if not (is_leased(run.folder) or is_held(run.folder))]
    for run in missing:
        if run not in free:
            _note(f"{run.id} runs in another process: left to it", console)
    jobs = []
    if free:
        runs = [run.index for run in free]
        written = write_scripts(str(mapping.file), cluster, output, torchtune_python=torchtune_python, runs=runs)
        jobs = written.submit()
        for id, job in zip(jobs, written.jobs, strict=True):
            console.print(f"submitted: job {id}, {len(job.tasks)} runs", soft_wrap=True)
    else:
        console.print("nothing to submit: all runs are finished, or run or wait already")
    console.print(f"how they are: lacuna status {shlex.quote(place)}", soft_wrap=True, markup=False)
    return Outcome(place, _rows(mapping, chosen), 0, jobs)


def _known(row: RunStatus, board: Board) -> RunStatus:
    """A run that failed before it had a status of its own."""
    if board.states.get(row.run) == "failed" and row.state != "failed":
        return replace(row, state="failed", reason=board.reasons[row.run])
    return row


def _tell(
    rows: Sequence[RunStatus], started: Sequence[GeneratedRun], again: str, is_stopped: bool, console: Console
) -> None:
    """How it ended: what failed and why, and what goes on."""

    def say(text: str) -> None:
        console.print(visible(text), soft_wrap=True, markup=False)

    counts = Counter("not started" if row.state == NOT_STARTED else row.state for row in rows)
    say(f"{len(rows)} run{'s' * (len(rows) != 1)}: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    logs = {run.id: run.folder / OUTPUT_LOG for run in started}
    unharmed = {"finished", *(("interrupted", NOT_STARTED) if is_stopped else ())}
    failed = [row for row in rows if row.state not in unharmed and row.run in logs]
    for row in failed[:SHOWN_FAILURES]:
        say(f"{row.run} {row.state}: {row.reason or 'it did not say why'}\n  log: {logs[row.run]}")
    if len(failed) > SHOWN_FAILURES:
        say(f"… and {len(failed) - SHOWN_FAILURES} more: lacuna status")
    if is_stopped:
        saved = sum(row.state == "interrupted" and bool(row.step) for row in rows)
        say(f"stopped; {saved} run{'s are' if saved != 1 else ' is'} saved; go on with: {again}")
    elif failed:
        say(f"finished runs stay as they are; start the others again with: {again}")
