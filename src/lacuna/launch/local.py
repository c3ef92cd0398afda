"""One process for each GPU of this machine, by torchrun's engine."""

import logging
import os
import signal
import sys
import uuid
from pathlib import Path
from threading import Thread
from typing import Any

import click
import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lacuna.errors import Interrupted, LacunaError, LostProcessError
from lacuna.files import write_json
from lacuna.machine.detect import check_gpus
from lacuna.processes import SIGNALS, how_killed, send
from lacuna.runs.folder import is_held, read_status
from lacuna.visible import visible

STOP = (*SIGNALS, signal.SIGHUP)


def launch(command: list[str], gpus: int, max_restarts: int, device: str, output_dir: str | None) -> None:
    """Run `python -m lacuna COMMAND` in so many processes; where one dies, all start again from the last checkpoint.

    An error that says what to do about it is none that goes away by itself: it ends the run.

    Raises ConfigError where there are not so many GPUs, Interrupted after a signal, SystemExit where a process failed.
    # ref: https://docs.pytorch.org/docs/stable/elastic/run.html
    """
    check_gpus(gpus, device)
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // gpus, 1)))
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=gpus,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGQUIT",
    )
    asked: list[int] = []
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    Thread(target=_pass_on, args=(asked,), daemon=True).start()
    for restart in range(max_restarts + 1):
        try:
            elastic_launch(settings, sys.executable)("-m", "lacuna", *command)
            return
        except ChildFailedError as error:
            code, reason = cause(error.failures)
        if asked:
            raise Interrupted(asked[0], "stopped before anything was trained" if code < 0 else "")
        _note(output_dir, reason, is_certain=code < 0)
        if code < 0 or code == LostProcessError.exit_code:
            click.echo(f"error: {visible(reason)}", err=True)
        is_last = restart == max_restarts or code == LacunaError.exit_code or code > 128
        if is_last:
            sys.exit(code if code >= 0 else 128 - code)
        os.environ["LACUNA_RESTART_COUNT"] = str(restart + 1)
        click.echo(f"restart {restart + 1} of {max_restarts}", err=True)


def _pass_on(asked: list[int]) -> None:
    """Tell the processes to stop; at a second Ctrl-C, end them.

    torchrun's engine would wait for their save until a second signal comes, and SLURM sends several; and it would tell
    their helpers too, such as W&B's. The signals are blocked in all but this thread, and so in the processes, until
    they can obey (StopRequest).
    """
    while True:
        number = signal.sigwait(STOP)
        asked.append(number)
        processes = psutil.Process().children()
        ends_at_once = asked.count(signal.SIGINT) > 1
        obeyed = signal.SIGTERM if number == signal.SIGHUP else number
        send(signal.SIGKILL if ends_at_once else obeyed, processes)
        if not processes:
            click.echo("stopped before anything was started", err=True)
            os._exit(128 + number)


def cause(failures: dict[int, ProcessFailure]) -> tuple[int, str]:
    """Exit code and description of the process that failed first, not of those that were ended with it."""
    ended = {LostProcessError.exit_code, -signal.SIGTERM, 128 + signal.SIGTERM}
    rank, failure = min(failures.items(), key=lambda item: (item[1].exitcode in ended, item[1].timestamp, item[0]))
    code = failure.exitcode
    if code >= 0:
        return code, f"process {rank} has ended with exit code {code}"
    return code, f"process {rank} was {how_killed(-code)}"


def _note(output_dir: str | None, reason: str, is_certain: bool) -> None:
    """Who was killed could not say so: write it into the run folder's status, unless that knows better."""
    folder = Path(output_dir).expanduser() if output_dir else None
    status: dict[str, Any] = (read_status(folder) if folder else None) or {"state": "finished"}
    is_open = status["state"] in ("starting", "running") or (is_certain and status["state"] != "finished")
    if folder is not None and is_open and not is_held(folder):
        write_json(folder / "status.json", {**status, "state": "failed", "reason": reason})
