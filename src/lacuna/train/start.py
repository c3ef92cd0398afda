"""From a config to a running loop: everything that can fail is tried here, the cheap things first."""

from pathlib import Path

from rich.console import Console

from lacuna.config.training import PretrainConfig, TrainingConfig
from lacuna.data.chat import Renderer
from lacuna.data.loader import check_data_settings, load_rows
from lacuna.data.stream import check_stream, stream_fingerprint
from lacuna.platform.detect import choose_device
from lacuna.runs.folder import write_config, write_provenance
from lacuna.train.loop import Prepared, make_loss_model, train_steps
from lacuna.train.model import load_model, load_model_config, load_tokenizer, resolve_execution
from lacuna.train.optimizer import check_warmup, count_steps
from lacuna.train.session import (
    check_disk,
    check_resume_path,
    find_checkpoint,
    resume_command,
    supervise,
    together,
)
from lacuna.train.signals import StopRequest
from lacuna.train.trackers import check_tracker

BYTES_PER_PARAMETER = 12 + 4
"""A checkpoint's weight and two moments in fp32, and the final weight."""


def train(config: TrainingConfig, command: list[str]) -> None:
    """Train what the config says and leave a run folder with `final/` in it.

    command: what the user typed; shown as what resumes the run, and kept in the provenance.
    Raises LacunaError for what the user can mend, Interrupted after a signal. status.json tells the same.
    """
    resume_with = resume_command(command, *([] if config.resume == "auto" else ["--resume", "auto"]))
    out_of_memory = (
        f"out of memory: lower --micro-batch-size (now {config.micro_batch_size}), set --activation-checkpointing true "
        f"(now {config.activation_checkpointing}), or start anew in another --output-dir with a smaller "
        f"--sequence-length (now {config.sequence_length})"
    )

    def work(folder: Path, console: Console, stop: StopRequest) -> None:
        _train(config, folder, command, console, stop)
        console.print(f"model: {folder / 'final'}")

    supervise(config, config, resume_with, lambda: out_of_memory, work)


def _train(config: TrainingConfig, folder: Path, command: list[str], console: Console, stop: StopRequest) -> None:
    device = choose_device(config.device)
    tokenizer, model_config, execution = together(
        lambda: load_tokenizer(config),
        lambda: load_model_config(config),
        lambda: resolve_execution(config, device),
        lambda: check_data_settings(config),
        lambda: check_tracker(config, console.print),
        lambda: check_stream(config, console.print),
        lambda: check_resume_path(config),
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
    total_steps = count_steps(config, len(rows or []))
    check_warmup(config, total_steps)
    fingerprint = rows.fingerprint() if rows is not None else stream_fingerprint(config, tokenizer)
    precision = str(execution.dtype)
    prepared = Prepared(
        folder, execution, tokenizer, renderer, rows, validation_rows, total_steps, fingerprint,
        find_checkpoint(config, config, folder, config.settings(), fingerprint, precision, console),
    )  # fmt: skip
    write_config(folder, config)
    write_provenance(folder, command, {"device": device.name, "data_sha256": fingerprint})
    causal_lm = load_model(config, model_config, tokenizer, execution)
    check_disk(folder, sum(parameter.numel() for parameter in causal_lm.parameters()), BYTES_PER_PARAMETER)
    model = make_loss_model(config, prepared, causal_lm, console)
    train_steps(config, prepared, model, console, stop)
