"""From a config to a running loop: everything that can fail is tried here, the cheap things first."""

import errno
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lacuna.config.files import check, merge_layers, read_layer
from lacuna.config.training import MAY_CHANGE_ON_RESUME, PretrainConfig, TrainingConfig
from lacuna.data.chat import Renderer
from lacuna.data.loader import check_data_settings, load_rows
from lacuna.data.stream import check_stream, stream_fingerprint
from lacuna.errors import ConfigError, Interrupted, LacunaError, RunError
from lacuna.platform.detect import choose_device
from lacuna.runs.folder import (
    locked,
    read_status,
    refuse_foreign_folder,
    write_config,
    write_provenance,
    write_status,
)
from lacuna.runs.metrics import read_metrics, validation_losses
from lacuna.train.checkpoint import damage, newest_whole, read_state
from lacuna.train.loop import Prepared, make_loss_model, train_steps
from lacuna.train.model import load_model, load_model_config, load_tokenizer, resolve_execution
from lacuna.train.optimizer import warmup_steps
from lacuna.train.signals import StopRequest
from lacuna.train.trackers import check_tracker

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def train(config: TrainingConfig, command: list[str]) -> None:
    """Train what the config says and leave a run folder with `final/` in it.

    command: what the user typed; shown as what resumes the run, and kept in the provenance.
    Raises LacunaError for what the user can mend, Interrupted after a signal. status.json tells the same.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False)
    folder = Path(config.output_dir).expanduser()
    refuse_foreign_folder(folder)
    with StopRequest() as stop, locked(folder):
        if _is_finished(folder, config):
            if (read_status(folder) or {}).get("state") != "finished":
                write_status(folder, "finished", **_last_step(folder))
            console.print(f"already finished: {folder / 'final'}")
            return
        try:
            _train(config, folder, command, console, stop)
        except Interrupted as interruption:
            _finish_status(folder, "interrupted", str(interruption))
            raise Interrupted(
                interruption.signal_number, f"{interruption}; go on with: {resume_command(config, command)}"
            ) from None
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                problem = f"output_dir {folder}: {error}; the checkpoints are whole: make room, then go on with: "
                error = RunError(problem + resume_command(config, command))
            elif isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
                error = RunError(_out_of_memory(config))
            _finish_status(folder, "failed", str(error) or type(error).__name__)
            raise error


def _finish_status(folder: Path, state: str, reason: str) -> None:
    try:
        write_status(folder, state, **_last_step(folder), reason=reason)
    except OSError as error:
        print(f"status.json could not be written: {error}", file=sys.stderr)


def _last_step(folder: Path) -> dict[str, Any]:
    status = read_status(folder) or {}
    return {"step": status.get("step", 0), "total_steps": status.get("total_steps")}


def _out_of_memory(config: TrainingConfig) -> str:
    return (
        f"out of memory: lower --micro-batch-size (now {config.micro_batch_size}), set --activation-checkpointing true "
        f"(now {config.activation_checkpointing}), or start anew in another --output-dir with a smaller "
        f"--sequence-length (now {config.sequence_length})"
    )


def _train(config: TrainingConfig, folder: Path, command: list[str], console: Console, stop: StopRequest) -> None:
    write_status(folder, "starting", **_last_step(folder))
    device = choose_device(config.device)
    tokenizer, model_config, execution = _cheap_checks(
        lambda: load_tokenizer(config),
        lambda: load_model_config(config),
        lambda: resolve_execution(config, device),
        lambda: check_data_settings(config),
        lambda: check_tracker(config),
        lambda: check_stream(config, console.print),
        lambda: _check_resume_path(config),
    )[:3]
    renderer = Renderer(tokenizer)
    rows = validation_rows = None
    if isinstance(config, PretrainConfig) and config.streaming:
        if config.validation_dataset is not None:
            held_out = {"dataset": config.validation_dataset, "dataset_split": config.validation_split}
            alone = {**held_out, "validation_dataset": None, "batch_size": 1}
            validation_rows, _ = load_rows(config.model_copy(update=alone), renderer, console.print)
    else:
        rows, validation_rows = load_rows(config, renderer, console.print)
    total_steps = config.steps or math.ceil((config.epochs or 1) * len(rows or []) / config.batch_size)
    if warmup_steps(config, total_steps) >= total_steps:
        raise ConfigError(
            f"warmup takes {warmup_steps(config, total_steps)} of {total_steps} steps, so the learning rate would "
            "never reach its peak: lower --warmup-steps"
        )
    fingerprint = rows.fingerprint() if rows is not None else stream_fingerprint(config, tokenizer)
    prepared = Prepared(
        folder, execution, tokenizer, renderer, rows, validation_rows, total_steps, fingerprint,
        _find_checkpoint(config, folder, fingerprint, str(execution.dtype), console),
    )  # fmt: skip
    write_config(folder, config)
    write_provenance(folder, command, {"device": device.name, "data_sha256": fingerprint})
    causal_lm = load_model(config, model_config, tokenizer, execution)
    _check_disk(folder, causal_lm)
    model = make_loss_model(config, prepared, causal_lm, console)
    train_steps(config, prepared, model, console, stop)
    _summarise(folder, console)


def _cheap_checks(*checks: Callable[[], Any]) -> list[Any]:
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


def _is_finished(folder: Path, config: TrainingConfig) -> bool:
    """Whether the folder's run is finished. Raises RunError where the folder holds a run with other settings."""
    has_run = (folder / "config.toml").exists() and (read_metrics(folder) or any(folder.glob("checkpoints/step-*")))
    if not has_run:
        return False
    if config.resume == "never":
        raise RunError(f"output_dir {folder} holds a run already, and resume is 'never': choose another --output-dir")
    layer = read_layer(folder / "config.toml")
    values, origins = merge_layers([layer], [])
    before = check(type(config), values, origins) if values.get("trainer") == config.model_dump()["trainer"] else None
    if before is None:
        raise RunError(f"output_dir {folder} holds a {values.get('trainer')} run: choose another --output-dir")
    refuse_other_settings(before.model_dump(), config.model_dump(), f"the run in {folder}")
    return (folder / "final").is_dir()


def refuse_other_settings(before: dict[str, Any], now: dict[str, Any], whose: str) -> None:
    """Raise RunError that lists every setting that would make the resumed run another one."""
    different = [name for name in now if name not in MAY_CHANGE_ON_RESUME and before.get(name) != now[name]]
    if different:
        changes = "; ".join(f"{name} was {before.get(name)!r}, now {now[name]!r}" for name in different)
        raise RunError(
            f"{whose} has other settings ({changes}): give the same ones to go on with it, or choose another "
            "--output-dir for a new run"
        )


def _check_resume_path(config: TrainingConfig) -> None:
    if config.resume not in ("auto", "never") and not (Path(config.resume) / "manifest.json").is_file():
        raise RunError(
            f"resume {config.resume}: there is no checkpoint (a folder such as RUN/checkpoints/step-00000500)"
        )


def _find_checkpoint(
    config: TrainingConfig, folder: Path, fingerprint: str, precision: str, console: Console
) -> Path | None:
    if config.resume == "never":
        return None
    if config.resume == "auto":
        found = newest_whole(folder / "checkpoints", lambda text: console.print(f"warning: {text}", style="yellow"))
    else:
        found = Path(config.resume)
        if (reason := damage(found)) is not None:
            raise RunError(f"resume {found}: {reason}")
        newer = [path for path in folder.glob("checkpoints/step-*") if path.name > found.name]
        if newer:
            raise RunError(
                f"resume {found}: {folder} already holds {newer[0].name}, which is newer: choose another --output-dir"
            )
    if found is None:
        return None
    state = read_state(found)
    refuse_other_settings(state.config, config.model_dump(), f"the checkpoint {found}")
    if state.data != fingerprint:
        raise RunError(f"{found}: the data or the tokenizer have changed since it was written; restore them to resume")
    if state.precision != precision:
        raise RunError(f"{found} was trained in {state.precision}, this would be {precision}: set --precision")
    return found


def _check_disk(folder: Path, causal_lm: torch.nn.Module) -> None:
    """Raise RunError where not even one checkpoint and the final folder would fit."""
    needed = sum(parameter.numel() for parameter in causal_lm.parameters()) * (12 + 4)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"output_dir {folder}: one checkpoint and the final model take {needed / 2**30:.2f} GiB, but only "
            f"{free / 2**30:.2f} GiB are free on that disk"
        )


def _summarise(folder: Path, console: Console) -> None:
    if losses := list(validation_losses(folder).values()):
        console.print(f"validation loss: {losses[-1]:.4f} (before: {losses[0]:.4f})")
    console.print(f"model: {folder / 'final'}")


def resume_command(config: TrainingConfig, command: list[str]) -> str:
    """The command that goes on with this run."""
    program = Path(command[0])
    name = program.name if shutil.which(program.name) == str(program) else os.path.relpath(program)
    more = [] if config.resume == "auto" else ["--resume", "auto"]
    return shlex.join([name, *command[1:], *more])
