"""What SLURM knows about jobs: one `squeue` and one `sacct` for all, kept for a while, for schedulers are busy."""

import json
import os
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lacuna.files import digest, write_whole

KEPT_SECONDS = 30
OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip
"""States in which a job no longer is in the queue; `squeue` still tells them for some minutes."""

WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD"}


@dataclass(frozen=True)
class JobState:
    """state: in SLURM's words, such as PENDING. reason: why it waits, or nothing."""

    state: str
    reason: str = ""

    @property
    def is_waiting(self) -> bool:
        return self.state in WAITING

    @property
    def is_over(self) -> bool:
        return self.state in OVER


@dataclass(frozen=True)
class Queue:
    """Job id (`123`, or `123_4` in an array) to state; time: when SLURM said so; None where there is no SLURM."""

    jobs: dict[str, JobState]
    time: float | None


def read_queue() -> Queue:
    """The user's jobs that wait, run, or have just ended."""
    words = ["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%T|%r"]
    answer, when = _ask(words)
    rows = [line.strip().split("|", 2) for line in answer.splitlines()]
    jobs = {row[0]: JobState(row[1], "" if row[2] == "None" else row[2]) for row in rows if len(row) == 3}
    return Queue(jobs, when)


def read_past(jobs: Iterable[str]) -> dict[str, JobState]:
    """How jobs ended, from the accounting; empty where there is none."""
    wanted = sorted({job.partition("_")[0] for job in jobs})
    if not wanted:
        return {}
    words = [
        "sacct",
        "--allocations",
        "--noheader",
        "--parsable2",
        "--format=JobID,State",
        f"--jobs={','.join(wanted)}",
    ]
    rows = [line.split("|") for line in _ask(words)[0].splitlines()]
    states = {row[0]: JobState(row[1].partition(" ")[0]) for row in rows if len(row) == 2}
    return {job: state for job, state in states.items() if state.is_over}


def _ask(words: Sequence[str]) -> tuple[str, float | None]:
    """What a program printed, now or within the last half minute; nothing, and no time, where it cannot answer."""
    cluster = os.environ.get("SLURM_CONF", "")
    name = digest("\0".join([cluster, *words]).encode())[:16]
    file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lacuna" / f"slurm_{name}.json"
    try:
        kept = json.loads(file.read_text())
        if 0 <= time.time() - kept["time"] < KEPT_SECONDS:
            return kept["answer"], kept["time"]
    except (OSError, ValueError):
        pass
    now = time.time()
    try:
        answer = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return "", None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"time": now, "answer": answer}))
    except OSError:
        pass
    return answer, now
