"""One process for each GPU of this machine, by torchrun's engine."""

import logging
import os
import signal
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lacuna.errors import ConfigError, Interrupted, LacunaError, LostProcessError
from lacuna.platform.detect import choose_device
from lacuna.runs.folder import read_status, write_json

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


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
    for number in STOP:
        signal.signal(number, lambda number, _: _pass_on(number, asked))
    for restart in range(max_restarts + 1):
        try:
            elastic_launch(settings, sys.executable)("-m", "lacuna", *command)
            return
        except ChildFailedError as error:
            code, reason = cause(error.failures)
        if asked:
            raise Interrupted(asked[0], "stopped before anything was trained" if code < 0 else "")
        if code < 0:
            _note(output_dir, reason)
        if code < 0 or code == LostProcessError.exit_code:
            click.echo(f"error: {reason}", err=True)
        is_last = restart == max_restarts or code == LacunaError.exit_code or code > 128
        if is_last:
            sys.exit(code if code >= 0 else 128 - code)
        click.echo(f"restart {restart + 1} of {max_restarts}", err=True)


def _pass_on(number: int, asked: list[int]) -> None:
    """Tell the processes to stop. torchrun's engine would wait for their save until a second signal comes, and SLURM
    sends several; and it would tell their helpers too, such as W&B's."""
    asked.append(number)
    processes = psutil.Process().children()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
    if not processes:
        raise Interrupted(number, "stopped before anything was started")


def cause(failures: dict[int, ProcessFailure]) -> tuple[int, str]:
    """Exit code and description of the process that failed first, not of those that were ended with it."""
    ended = {LostProcessError.exit_code, -signal.SIGTERM, 128 + signal.SIGTERM}
    rank, failure = min(failures.items(), key=lambda item: (item[1].exitcode in ended, item[1].timestamp, item[0]))
    code = failure.exitcode
    if code >= 0:
        return code, f"process {rank} has ended with exit code {code}"
    reason = f"process {rank} was killed by {signal.Signals(-code).name}"
    return code, reason + (" (the system does that when memory runs out)" if code == -signal.SIGKILL else "")


def check_gpus(gpus: int, device: str) -> None:
    """Raise ConfigError where this machine has fewer GPUs than are asked for."""
    import torch

    found = choose_device(device).type
    if device == "auto" and found != "cuda":
        raise ConfigError(f"gpus = {gpus}: no CUDA device is here; for {gpus} processes on the CPU say --device cpu")
    if found == "mps":
        raise ConfigError(f"gpus = {gpus}: there is one GPU here; for {gpus} processes on the CPU say --device cpu")
    if found == "cuda" and gpus > torch.cuda.device_count():
        raise ConfigError(f"gpus = {gpus}: there are {torch.cuda.device_count()} CUDA devices here")


def _note(output_dir: str | None, reason: str) -> None:
    """Who was killed could not say so: write it into the run folder's status."""
    folder = Path(output_dir).expanduser() if output_dir else None
    status: dict[str, Any] | None = read_status(folder) if folder else None
    if folder is not None and status is not None and status["state"] != "finished":
        write_json(folder / "status.json", {**status, "state": "failed", "reason": reason})
