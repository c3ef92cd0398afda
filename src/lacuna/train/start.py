"""From a config to a running loop: everything that can fail is tried here, the cheap things first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lacuna.config.training import PretrainConfig, TrainingConfig
from lacuna.data.loader import check_data_settings, load_rows
from lacuna.data.stream import check_stream, stream_fingerprint
from lacuna.machine.detect import Device, choose_device
from lacuna.runs.provenance import config_facts
from lacuna.train.distributed import World, check_world, join, load_once
from lacuna.train.loading import load_model, load_model_config, load_sharded, load_tokenizer
from lacuna.train.loop import Prepared, settle, train_steps
from lacuna.train.model import Execution, LossModel, resolve_execution
from lacuna.train.optimizer import check_warmup, count_steps
from lacuna.train.planned import after_out_of_memory, memory_line, planned_step, predicted_and_measured
from lacuna.train.record import identity_now, record_model, record_start
from lacuna.train.session import (
    check_disk,
    check_resume_path,
    find_checkpoint,
    preparation_now,
    renderer_now,
    resume_command,
    supervise,
    together,
)
from lacuna.train.signals import StopRequest
from lacuna.train.trackers import check_tracker
from lacuna.train.weights import check_vocabulary, check_weights

BYTES_PER_PARAMETER = 12 + 4
"""A checkpoint's weight and two moments in fp32, and the final weight."""


def train(config: TrainingConfig, command: list[str], files: Sequence[str] = (), again: bool = False) -> None:
    """Train what the config says and leave a run folder with `final/` in it.

    command: what the user typed; shown as what resumes the run, and kept in the provenance, as is the hash of the
    files that the config was read from. again: a finished run is put aside, and trained anew.
    Raises LacunaError for what the user can mend, Interrupted after a signal. status.json tells the same.
    """
    resume_with = resume_command(command, config.gpus, *([] if config.resume == "auto" else ["--resume", "auto"]))
    given = config_facts(files)
    with join() as world:

        def work(folder: Path, console: Console, stop: StopRequest) -> None:
            _train(config, folder, command, given, console, stop, world)
            console.print(f"model: {folder / 'final'}")

        supervise(config, resume_with, lambda: after_out_of_memory(config), work, world, again)


def check_before(
    config: TrainingConfig, device: Device, report: Callable[[str], None], world: World
) -> tuple[Any, Any, Execution]:
    """What costs seconds, all of it together: tokenizer, model config, and settings as this machine can run them.

    Raises ConfigError with everything that is wrong.
    """
    tokenizer, model_config, execution = together(
        lambda: load_tokenizer(config),
        lambda: load_model_config(config),
        lambda: resolve_execution(config, device, report),
        lambda: check_world(config, world, device.type),
        lambda: check_data_settings(config),
        lambda: check_tracker(config, report) if world.is_first else None,
        lambda: check_stream(config, report),
        lambda: check_resume_path(config),
        lambda: check_weights(config),
    )[:3]
    check_vocabulary(config, model_config, len(tokenizer))
    return tokenizer, model_config, execution


def _train(
    config: TrainingConfig, folder: Path, command: list[str], given: Mapping[str, Any], console: Console,
    stop: StopRequest, world: World,
) -> None:  # fmt: skip
    device = world.agreed(lambda: choose_device(config.device))
    tokenizer, model_config, execution = world.agreed(lambda: check_before(config, device, console.print, world))
    renderer = renderer_now(config, folder, tokenizer, console.print)
    preparation = world.first(lambda: preparation_now(config, folder))
    rows = validation_rows = None
    if isinstance(config, PretrainConfig) and config.streaming:
        if config.validation_dataset is not None:
            held_out = {"dataset": config.validation_dataset, "dataset_split": config.validation_split}
            alone = {**held_out, "validation_dataset": None, "batch_size": 1}
            of_validation = config.model_copy(update=alone)
            validation_rows, _ = load_once(world, lambda: load_rows(of_validation, renderer, console.print))
    else:
        rows, validation_rows = load_once(world, lambda: load_rows(config, renderer, console.print, preparation))
    total_steps = count_steps(config, len(rows or []))
    world.agreed(lambda: check_warmup(config, total_steps))
    fingerprint = rows.fingerprint() if rows is not None else stream_fingerprint(config, tokenizer)
    precision = str(execution.dtype)
    identity = world.first(lambda: identity_now(config, preparation, tokenizer, validation_rows))
    found = world.first(
        lambda: find_checkpoint(config, folder, config.settings(), fingerprint, identity, precision, console)
    )
    prepared = Prepared(
        folder, execution, tokenizer, renderer, rows, validation_rows, total_steps, fingerprint, identity, found, world
    )
    record_start(config, prepared, command, given)
    if world.size == 1:
        model = LossModel(load_model(config, model_config, tokenizer, execution), execution.dtype)
    else:
        model = load_sharded(config, model_config, tokenizer, execution, world)
    if not Path(config.model_name).is_dir():
        identity = world.first(lambda: identity_now(config, preparation, tokenizer, validation_rows))
        prepared = replace(prepared, identity=identity)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    world.first(lambda: check_disk(config, folder, parameters, BYTES_PER_PARAMETER))
    shards = world.local_size if config.sharding == "hybrid" else world.size
    longest = int(rows.lengths.max()) if rows is not None else config.sequence_length
    step, predicted = planned_step(config, model_config, execution, shards, longest)
    if (line := memory_line(predicted, device)) is not None:
        console.print(line)
    record_model(config, prepared, model, step.checkpointing)
    train_steps(config, prepared, settle(config, prepared, model, console, step.checkpointing), console, stop)
    if (line := predicted_and_measured(predicted, execution)) is not None:
        console.print(line)
