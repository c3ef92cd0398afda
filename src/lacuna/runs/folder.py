"""The run folder: config, provenance, status, metrics, checkpoints, final. Nothing here imports torch.

config.toml        every setting, the defaults too; can be run again as it stands (torchtune: config.yaml)
provenance.json    what each start was made of: see provenance.py
status.json        state, step, seconds, reason
metrics.jsonl      a line for each logged step
output.log         what a run of `lacuna run` has printed
evaluation.json    what the user's own evaluation found, if there is one
checkpoints/       step-00000500 …, each whole or absent
final/             a Hugging Face folder
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import tomli_w

from lacuna.config.training import TrainingConfig
from lacuna.errors import RunError
from lacuna.files import digest, is_locked, try_lock, write_json, write_whole

OUTPUT_LOG = "output.log"
"""What the starts of `lacuna run` have printed."""

KEPT = ("loss", "tokens_per_second", "restarts")
"""What a status says until it says something newer."""
NUMBERS = ("time", "seconds", "loss", "tokens_per_second")
COUNTS = ("step", "total_steps", "process", "restarts")


def patience(environment: Mapping[str, str]) -> float:
    """Seconds to wait for a run folder: a job that SLURM restarted may find a lost node's process still holding it.

    Otherwise a moment, in which `lacuna status` may look at the lock.
    """
    return 600.0 if int(environment.get("SLURM_RESTART_COUNT", 0)) > 0 else 0.5


@contextmanager
def locked(folder: Path, seconds: float | None = None, whose: type[TrainingConfig] = TrainingConfig) -> Iterator[None]:
    """Hold the run folder; the lock goes with the process, however that ends.

    whose: the kind of config, by whose spelling messages name settings.
    Raises RunError if another still holds it after so many seconds; `patience` says how many where none are given.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock: IO[str] = (folder / ".lock").open("a+")
    except OSError as error:
        raise RunError(f"{whose.spelled('output_dir')} {folder}: cannot be written: {error.strerror}") from error
    with lock:
        end = time.monotonic() + (patience(os.environ) if seconds is None else seconds)
        while not try_lock(lock):
            if time.monotonic() > end:
                lock.seek(0)
                raise RunError(
                    f"{whose.spelled('output_dir')} {folder} is being trained by process "
                    f"{lock.read().strip() or '(unknown)'}: wait for it, or choose another {whose.flag('output_dir')}"
                )
            time.sleep(0.1)
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        for leftover in folder.glob(".*.*.partial"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        yield


def is_held(folder: Path) -> bool:
    """Whether a process is training in the run folder, as far as this machine can see."""
    return is_locked(folder / ".lock")


def refuse_foreign_folder(folder: Path, whose: type[TrainingConfig] = TrainingConfig) -> None:
    """Raise RunError where the folder holds something that is not a run: nothing of it may be mixed up or lost."""
    where = f"{whose.spelled('output_dir')} {folder}"
    if not folder.exists() or (folder / "status.json").exists():
        return
    if (folder / "provenance.json").exists() and (folder / "config.toml").exists():  # a run that has lost its status
        return
    if not folder.is_dir():
        raise RunError(f"{where} is a file")
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if not name.startswith(".") and name != OUTPUT_LOG]
    if foreign:
        raise RunError(
            f"{where} is not empty and not a run folder (it holds {', '.join(foreign[:5])}): "
            f"choose another {whose.flag('output_dir')}"
        )


def put_aside(folder: Path) -> Path:
    """Give a run folder another name beside it, so that a new run may have its place; returns the new name."""
    aside = name_aside(folder)
    folder.rename(aside)
    return aside


def name_aside(path: Path) -> Path:
    """The first free name for what has stood there before."""
    names = (path.with_name(f"{path.name}.before-{number}") for number in range(1, 10000))
    return next(name for name in names if not name.exists())


def write_config(folder: Path, config: TrainingConfig) -> str:
    """config.toml; returns its SHA-256."""
    text = tomli_w.dumps(config.written(exclude_none=True))
    write_whole(folder / "config.toml", text)
    return digest(text.encode())


def starts_of(folder: Path) -> list[dict[str, Any]]:
    """The entries of provenance.json, one for each start of the run. Raises RunError where it cannot be read."""
    path = folder / "provenance.json"
    if not path.exists():
        return []
    try:
        starts: list[dict[str, Any]] = json.loads(path.read_bytes())["starts"]
        is_whole = all(type(start.get("devices") or 1) is int for start in starts)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise RunError(f"{path}: is damaged, so nothing says what the run was made of: restore it, or move it away")
    return starts


def job_of(environment: Mapping[str, str]) -> dict[str, Any]:
    """The SLURM job of this process, `123` or `123_4`; empty outside SLURM."""
    if "SLURM_JOB_ID" not in environment:
        return {}
    array = environment.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array is not None else environment["SLURM_JOB_ID"]
    return {"job": job}


def write_status(folder: Path, state: str, step: int, total_steps: int | None, **more: Any) -> None:
    """state: starting, running, finished, interrupted or failed. A SLURM job's id is added, and KEPT stays.

    seconds: that all starts of the run have taken, up to this moment; time between two starts is none of them.
    What another process of the run has said of its failure is not written over; a new start begins with starting.
    """
    before, now = read_status(folder) or {}, time.time()
    if state == "running" and before.get("state") == "failed":
        return
    goes_on = state != "starting" and before.get("process") == os.getpid()
    seconds = before.get("seconds", 0.0) + (max(now - before["time"], 0.0) if goes_on else 0.0)
    facts = {"state": state, "step": step, "total_steps": total_steps, "process": os.getpid(), "time": now}
    kept = {name: before[name] for name in KEPT if name in before}
    write_json(folder / "status.json", {**facts, "seconds": round(seconds, 3), **kept, **job_of(os.environ), **more})


def read_status(folder: Path) -> dict[str, Any] | None:
    """None where there is none, or none that can be read."""
    try:
        status = json.loads((folder / "status.json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(status, dict) or not isinstance(status.get("state"), str):
        return None
    kinds = {**dict.fromkeys(NUMBERS, (float, int)), **dict.fromkeys(COUNTS, (int,))}
    is_whole = all(status.get(name) is None or type(status[name]) in allowed for name, allowed in kinds.items())
    return status if is_whole else None
