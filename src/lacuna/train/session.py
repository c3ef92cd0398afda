"""What every trainer does around its steps: one process in a run folder, and whatever ends it is written down."""

import errno
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lacuna.config.training import TrainingConfig
from lacuna.data.chat import Renderer
from lacuna.data.split import PREPARATION
from lacuna.errors import ConfigError, Interrupted, LacunaError, LostProcessError, OtherInputsError, RunError
from lacuna.runs.final import damage_of_final
from lacuna.runs.folder import locked, put_aside, read_status, refuse_foreign_folder, starts_of, write_status
from lacuna.runs.identity import Identity, changed_inputs, differences, first_day_of, preparation_of
from lacuna.runs.metrics import read_metrics, validation_losses
from lacuna.runs.same import changes, difference, has_run, with_defaults
from lacuna.train.checkpoint import read_state
from lacuna.train.distributed import World
from lacuna.train.kept import damage, free_name, newest_whole
from lacuna.train.signals import StopRequest

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DISK_ERRORS = {*FULL, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE}
RESTARTS = ("LACUNA_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
"""Variables that count how often our launcher, torchrun or SLURM has started a command again."""
UNCHANGED = "; none of its files has changed: was one added, or is this another version of lacuna?"
LOST_PROCESS = re.compile(r"Connection (closed|reset) by peer|Broken pipe|NCCL \w+ error|remote process exited", re.I)
"""What gloo and NCCL say where another process is gone."""


def supervise(
    config: TrainingConfig,
    resume_with: str,
    out_of_memory: Callable[[], str],
    work: Callable[[Path, Console, StopRequest], None],
    world: World,
    again: bool = False,
) -> None:
    """Do the work in the run folder, unless that is done; status.json tells how it ended.

    again: put a finished run aside and train anew. resume_with: the command that goes on with the run. world: the
    processes that train together; all but the first are silent, and write nothing but why they failed.
    Raises LacunaError for what the user can mend, Interrupted after a signal.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False, quiet=not world.is_first)
    folder = Path(config.output_dir).expanduser()
    with StopRequest() as stop, ExitStack() as held:

        def enter() -> bool:
            refuse_foreign_folder(folder, type(config))
            if again and (read_status(folder) or {}).get("state") == "finished":
                with locked(folder, whose=type(config)):
                    console.print(f"the finished run is kept: {put_aside(folder)}")
            held.enter_context(locked(folder, whose=type(config)))
            if is_finished := _is_finished(folder, config, world.size, console.print):
                if (read_status(folder) or {}).get("state") != "finished":
                    write_status(folder, "finished", **_last_step(folder))
                refuse_other_inputs(folder, config)
                console.print(f"already finished: {folder / 'final'}")
            else:
                _refuse_hopeless_restart(folder)
            return is_finished

        if world.first(enter):
            return
        try:
            if world.is_first:
                write_status(folder, "starting", **_last_step(folder), restarts=len(starts_of(folder)))
            work(folder, console, stop)
        except Interrupted as interruption:
            if world.is_first:
                _finish_status(folder, "interrupted", str(interruption))
            raise Interrupted(interruption.signal_number, f"{interruption}; go on with: {resume_with}") from None
        except BaseException as error:
            if world.size > 1 and stop and not isinstance(error, LacunaError):
                raise Interrupted(stop.signal_number or 0, f"stopped; go on with: {resume_with}") from None
            if isinstance(error, OSError) and is_of_folder(error, folder):
                todo = "make room" if error.errno in FULL else "mend that"
                where = f"{config.spelled('output_dir')} {folder}"
                error = RunError(f"{where}: {error}; the checkpoints are whole: {todo}, then go on with: {resume_with}")
            elif isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
                error = RunError(out_of_memory())
            elif world.size > 1 and (lost := LOST_PROCESS.search(str(error))):
                raise LostProcessError(f"another process of this run has ended ({lost[0]})") from None
            can_be_mended = isinstance(error, LacunaError)
            if world.is_first or not isinstance(error, LacunaError) or not error.is_shared:
                _finish_status(folder, "failed", str(error) or type(error).__name__, can_be_mended=can_be_mended)
            raise error
        if losses := list(validation_losses(folder).values()):
            console.print(f"validation loss: {losses[-1]:.4f} (before: {losses[0]:.4f})")


def is_of_folder(error: OSError, folder: Path) -> bool:
    """Whether the disk has failed, or it is about a file of the run folder."""
    named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return error.errno in DISK_ERRORS or any(path.absolute().is_relative_to(folder.absolute()) for path in named)


def refuse_other_inputs(folder: Path, config: TrainingConfig) -> None:
    """Raise OtherInputsError where a finished run's files hold something else now than when its weights were made."""
    if changed := changed_inputs((starts_of(folder) or [{}])[-1]):
        raise OtherInputsError(
            f"{folder} is finished, but was made of something else: {', '.join(changed)} changed since; --again trains "
            f"anew and keeps the old folder beside it, or choose another {config.flag('output_dir')}"
        )


def _refuse_hopeless_restart(folder: Path) -> None:
    """torchrun starts a failed run again; where the user must mend something first, it would fail again."""
    status = read_status(folder) or {}
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and status.get("can_be_mended"):
        raise RunError(status["reason"])


def _finish_status(folder: Path, state: str, reason: str, **more: Any) -> None:
    try:
        write_status(folder, state, **_last_step(folder), reason=reason, **more)
    except OSError as error:
        print(f"status.json could not be written: {error}", file=sys.stderr)


def _last_step(folder: Path) -> dict[str, Any]:
    """By status.json; where that was lost, by what else the folder holds."""
    if (status := read_status(folder)) is not None:
        return {"step": status.get("step", 0), "total_steps": status.get("total_steps")}
    step = max((line["step"] for line in read_metrics(folder)), default=0)
    return {"step": step, "total_steps": (starts_of(folder) or [{}])[-1].get("total_steps")}


def together(*checks: Callable[[], Any]) -> list[Any]:
    """Run all of them and raise what they found together."""
    results, problems = [], []
    for check_one in checks:
        try:
            results.append(check_one())
        except LacunaError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ConfigError(problems)
    return results


def _is_finished(
    folder: Path, config: TrainingConfig, processes: int,
    report: Callable[[str], None],
) -> bool:  # fmt: skip
    """Whether the folder's run is finished. Raises RunError where the folder holds a run with other settings, or final
    weights without the config that they were trained by."""
    where, flag = f"{config.spelled('output_dir')} {folder}", config.flag("output_dir")
    if (folder / "final").is_dir() and not (folder / "config.toml").exists():
        raise RunError(f"{where} holds a finished run without its config.toml: restore that, or choose another {flag}")
    if (folder / "config.yaml").exists():
        raise RunError(f"{where} holds a torchtune run: choose another {flag}")
    if not has_run(folder):
        return False
    if resume_now(config, folder) == "never":
        raise RunError(f"{where} holds a run already, and resume is 'never': choose another {flag}")
    if (other := difference(folder, config, processes)) is not None:
        raise RunError(f"{other}: {_other_folder(flag)}")
    if (folder / "final").is_dir() and (damage := damage_of_final(folder)) is not None:
        _put_final_aside(folder, damage, report)
    return (folder / "final").is_dir()


def _put_final_aside(folder: Path, damage: str, report: Callable[[str], None]) -> None:
    """Raises RunError where there is no checkpoint to make it again from."""
    final = folder / "final"
    if not any(folder.glob("checkpoints/step-*")):
        raise RunError(
            f"{final}: damaged: {damage}, and no checkpoint is there to make it again from: restore it, or --again "
            "trains anew"
        )
    final.rename(free_name(final))
    report(f"warning: {final} is damaged ({damage}): it is made again from the last checkpoint")


def _other_folder(flag: str) -> str:
    return f"give the same settings to go on with it, or choose another {flag} for a new run"


def resume_now(config: TrainingConfig, folder: Path) -> str:
    """The setting `resume`, or auto where the folder's run began with it already and is to go on: a checkpoint to
    begin from holds for the first start, and so does never, if this one is a restart and no new command."""
    began = any(start.get("resume") == config.resume for start in starts_of(folder))
    is_restart = any(int(os.environ.get(name, 0)) for name in RESTARTS)
    return "auto" if began and (config.resume != "never" or is_restart) else config.resume


def preparation_now(config: TrainingConfig, folder: Path) -> str:
    """The version by which the data are prepared: a run goes on as it was begun."""
    return preparation_of(folder, resume_now(config, folder)) or PREPARATION


def renderer_now(config: TrainingConfig, folder: Path, tokenizer: Any, report: Callable[[str], None]) -> Renderer:
    """Of a run, which keeps the day of its first start: a template that writes the date would else make other rows of
    the same data tomorrow."""
    renderer = Renderer(tokenizer, config.flag("chat_template"), first_day_of(folder, resume_now(config, folder)))
    if renderer.writes_the_date:
        report(f"the chat template writes the date: {renderer.today} in all of this run")
    return renderer


def check_resume_path(config: TrainingConfig) -> None:
    """Raises RunError where the checkpoint to resume from is not there."""
    if config.resume not in ("auto", "never") and not (Path(config.resume) / "manifest.json").is_file():
        raise RunError(
            f"resume {config.resume}: there is no checkpoint (a folder such as RUN/checkpoints/step-00000500)"
        )


def find_checkpoint(
    config: TrainingConfig,
    folder: Path,
    settings: dict[str, Any],
    fingerprint: str,
    identity: Identity,
    precision: str,
    console: Console,
) -> Path | None:
    """The checkpoint to go on from; None for a new run. Raises RunError where it is damaged, or of another run.

    fingerprint: of the training rows. identity: of what else the run is made.
    """
    resume = resume_now(config, folder)
    if resume == "never":
        return None
    flag = config.flag("output_dir")
    if resume == "auto":
        found = newest_whole(
            folder / "checkpoints", lambda text: console.print(f"warning: {text}", style="yellow"), flag
        )
    else:
        found = Path(resume)
        if (reason := damage(found)) is not None:
            raise RunError(f"resume {found}: {reason}")
        newer = [path for path in folder.glob("checkpoints/step-*") if path.name > found.name]
        if newer:
            raise RunError(
                f"resume {found}: {folder} already holds {newer[0].name}, which is newer: choose another {flag}"
            )
    if found is None:
        return None
    state = read_state(found)
    if (trainer := state.config.get("trainer")) != settings["trainer"]:
        raise RunError(f"{found} is a checkpoint of a {trainer} run, this is {settings['trainer']}")
    before = with_defaults(type(config), state.config)
    if other := changes(before, settings, config.may_change):
        raise RunError(f"the checkpoint {found} has other settings ({other}): {_other_folder(flag)}")
    different = differences(state.identity, identity)
    if state.data != fingerprint:
        files = changed_inputs((starts_of(folder) or [{}])[-1])
        which = f" ({', '.join(files)})" if files else UNCHANGED
        different.insert(0, f"training data: other rows than it was trained on{which}")
    if different:
        problems = [f"{found} was made of something else: {what}" for what in different]
        raise RunError([*problems, f"restore what has changed to resume, or choose another {flag} for a new run"])
    if state.precision != precision:
        wanted = config.flag("precision")
        raise RunError(f"{found} was trained in {state.precision}, this would be {precision}: set {wanted}")
    return found


def check_disk(config: TrainingConfig, folder: Path, parameters: int, bytes_each: int) -> None:
    """Raise RunError where not even one checkpoint and the final folder would fit."""
    needed = parameters * bytes_each
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{config.spelled('output_dir')} {folder}: one checkpoint and the final model take "
            f"{needed / 2**30:.2f} GiB, but only {free / 2**30:.2f} GiB are free on that disk"
        )


def resume_command(command: list[str], gpus: int, *more: str) -> str:
    """What the user types to go on with this run. gpus: of the config; more: flags to add."""
    program = Path(command[0])
    if program.name == "__main__.py":
        processes = os.environ.get("LOCAL_WORLD_SIZE")
        launcher = ["torchrun", "--nproc-per-node", processes] if processes is not None else ["python"]
        starts_itself = processes is not None and gpus > 1
        return shlex.join([*(["lacuna"] if starts_itself else [*launcher, "-m", "lacuna"]), *command[1:], *more])
    name = program.name if shutil.which(program.name) == str(program) else os.path.relpath(program)
    return shlex.join([name, *command[1:], *more])
