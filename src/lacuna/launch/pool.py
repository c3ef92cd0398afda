"""Runs as children of this process, so many at a time. Each ends by itself, or because it was told to."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from lacuna.errors import LacunaError, RunError
from lacuna.launch.board import Board
from lacuna.launch.lease import take
from lacuna.launch.selection import is_finished
from lacuna.processes import Asked, how_killed, send
from lacuna.runs.folder import OUTPUT_LOG, is_held, read_status, write_status
from lacuna.runs.logs import last_words, tail
from lacuna.runs.mapping import GeneratedRun

LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Child:
    """A run that was started, at a time in seconds since 1970. size: of its log before."""

    run: GeneratedRun
    process: subprocess.Popen[bytes]
    lease: int
    size: int
    time: float


def execute(
    runs: Sequence[GeneratedRun],
    words: Sequence[str],
    directory: Path,
    shares: Sequence[Mapping[str, str]],
    board: Board,
) -> list[int]:
    """Run them, one for each of the shares at a time, and return the signals that came.

    words: of `lacuna start`, before the run's index. shares: variables of the runs at the same time.
    A run that another caller has is left to that one; when it is free again, and neither finished nor failed since
    this call began, it is run here. Raises RunError where a folder cannot be written.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RunError("runs are started from a program's main thread: only there can they be told to stop")
    began = time.time()
    waiting, children = list(runs), dict[int, Child]()
    told = killed = False
    with Asked() as asked:
        try:
            while children or (waiting and not asked.signals):
                for slot in [] if asked.signals else [slot for slot in range(len(shares)) if slot not in children]:
                    if (child := _start_next(waiting, began, words, directory, shares[slot], board)) is not None:
                        children[slot] = child
                for slot, child in list(children.items()):
                    if child.process.poll() is not None:
                        _end(children.pop(slot), bool(asked.signals), board)
                if asked.signals and not told:
                    told = True
                    board.say(f"stopping: {len(children)} running, which save what they have")
                    for child in children.values():
                        child.process.send_signal(asked.signals[0])
                if asked.signals.count(signal.SIGINT) > 1 and not killed:
                    killed = True
                    for child in children.values():
                        _kill(child.process.pid)
                board.refresh()
                time.sleep(LOOK_SECONDS)
        finally:
            for child in children.values():
                os.close(child.lease)
        return list(asked.signals)


def _start_next(
    waiting: list[GeneratedRun],
    began: float,
    words: Sequence[str],
    directory: Path,
    share: Mapping[str, str],
    board: Board,
) -> Child | None:
    """Start the first of those that wait and that no other has. What others have finished or failed waits no more."""
    for run in list(waiting):
        lease = None
        try:
            lease = take(run.folder)
            if lease is None:
                board.is_elsewhere(run)
                continue
            waiting.remove(run)
            if not _is_over(run, began, board):
                return _start(run, lease, words, directory, share, board)
        except (LacunaError, OSError) as error:
            waiting[:] = [other for other in waiting if other != run]
            board.ended(run, "failed", str(error))
        if lease is not None:
            os.close(lease)
    return None


def _is_over(run: GeneratedRun, began: float, board: Board) -> bool:
    """Whether another caller has finished the run, or failed to since this call began; that is said then."""
    status = read_status(run.folder) or {}
    if is_finished(run):
        board.ended(run, "finished", "by another caller")
        return True
    has_failed = status.get("state") == "failed" and status.get("time", 0) >= began
    if has_failed:
        board.ended(run, "failed", f"by another caller: {status.get('reason', '')}")
    return has_failed


def _start(
    run: GeneratedRun, lease: int, words: Sequence[str], directory: Path, share: Mapping[str, str], board: Board
) -> Child:
    board.started(run, again=run.trainer == "torchtune" and read_status(run.folder) is not None)
    environment = {**os.environ, **share}
    environment.pop("SLURM_NNODES", None)  # in a job of several nodes, a run here still is on this one only
    with (run.folder / OUTPUT_LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lacuna", "start", *words, str(run.index)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=environment,
            pass_fds=[lease],
            start_new_session=True,
        )
        return Child(run, process, lease, os.fstat(log.fileno()).st_size, time.time())


def _end(child: Child, is_stopping: bool, board: Board) -> None:
    """Say how a run ended, and write it down for one that could not."""
    run, code, reason = child.run, child.process.returncode, ""
    status = read_status(run.folder) or {}
    is_told = status.get("time", 0) >= child.time and status.get("state") not in ("starting", "running")
    if code != 0 and not is_told and not is_stopping and not is_held(run.folder):
        said = last_words(tail(run.folder / OUTPUT_LOG, child.size))
        reason = how_killed(-code) if code < 0 else said or f"exit code {code}"
        with suppress(OSError):
            write_status(run.folder, "failed", status.get("step", 0), status.get("total_steps"), reason=reason)
    os.close(child.lease)
    status = read_status(run.folder) or {}
    state = "finished" if code == 0 else "stopped" if is_stopping else str(status.get("state", "failed"))
    board.ended(run, state, str(status.get("reason") or reason) if code else "")


def _kill(pid: int) -> None:
    """At once, with everything that it has started."""
    with suppress(psutil.NoSuchProcess):
        run = psutil.Process(pid)
        send(signal.SIGKILL, [run, *run.children(recursive=True)])
