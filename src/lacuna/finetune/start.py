"""From a finetune config to a trained adapter."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TextColumn

from lacuna.config.finetune import FinetuneConfig, default_output_dir
from lacuna.data.loader import load_rows
from lacuna.errors import LacunaError, RunError
from lacuna.finetune.adapters import add_adapter, describe, load_frozen, save_adapter
from lacuna.finetune.callback import RunFolderCallback, Written, epoch_line
from lacuna.finetune.checks import check_before
from lacuna.finetune.trainer import make_adapter_optimizer, make_trainer, optimizer_name
from lacuna.runs.card import card_of
from lacuna.runs.final import entries_of
from lacuna.runs.folder import write_status
from lacuna.runs.provenance import config_facts
from lacuna.train.checkpoint import CheckpointWriter, TrainingState, restore, restore_weights
from lacuna.train.distributed import World, join, load_once
from lacuna.train.final import new_folder
from lacuna.train.kept import Regular, best_checkpoint, regular_saves, step_of
from lacuna.train.loop import Prepared
from lacuna.train.model import Execution, prove_loss
from lacuna.train.optimizer import check_warmup, count_steps
from lacuna.train.planned import after_out_of_memory, memory_line, planned_step, predicted_and_measured
from lacuna.train.progress import TrainingProgress
from lacuna.train.record import identity_now, record_model, record_start
from lacuna.train.records import open_log
from lacuna.train.session import check_disk, find_checkpoint, preparation_now, renderer_now, resume_command, supervise
from lacuna.train.signals import StopRequest
from lacuna.train.trackers import open_tracker

BYTES_PER_PARAMETER = 12 + 4
"""A checkpoint's weight and two moments in fp32, and the final weight."""


def finetune(
    config: FinetuneConfig,
    resume: str | None,
    verbose: bool,
    command: list[str],
    files: Sequence[str] = (),
    again: bool = False,
) -> None:
    """Train an adapter and leave a run folder with the adapter in `final/`.

    resume: a run folder or one of its checkpoints; "auto" the newest run; None a new one, or the one that is in
    training.output_dir already. verbose: every step's metrics. command: what the user typed. files:
    that the config was read from. again: a finished run is put aside, and trained anew.
    Raises LacunaError for what the user can mend, Interrupted after a signal. status.json tells the same.
    """
    given = config_facts(files)
    with join() as world:
        config = world.first(lambda: resolve_folder(config, resume))
        log_every = 1 if verbose else config.log_every

        def work(folder: Path, console: Console, stop: StopRequest) -> None:
            _finetune(config, log_every, folder, command, given, console, stop, world)
            console.print(f"adapter: {folder / 'final'}")

        resume_with = resume_command(_without_resume(command), config.gpus, "--resume", str(config.output_dir))
        supervise(config, resume_with, lambda: after_out_of_memory(config), work, world, again)


def with_folder(config: FinetuneConfig, resume: str | None) -> tuple[FinetuneConfig, list[str]]:
    """The config with its run folder; or as it is, and why there is nothing to resume."""
    try:
        return resolve_folder(config, resume), []
    except LacunaError as error:
        return config, error.problems


def resolve_folder(config: FinetuneConfig, resume: str | None) -> FinetuneConfig:
    """The config with its run folder, and from where it goes on. Raises RunError: nothing to resume there.

    A run goes on in its own folder; a checkpoint in training.output_dir, which may be another one.
    """
    given = config.output_dir
    if resume is not None and resume != "auto":
        path = Path(resume)
        is_checkpoint, is_run = (path / "manifest.json").is_file(), (path / "status.json").is_file()
        if not is_checkpoint and not is_run:
            raise RunError(f"--resume {resume}: neither a run folder nor a checkpoint of one")
        if is_checkpoint:
            return config.in_folder(given or str(path.parent.parent), resume)
        return config.in_folder(resume)
    if given is not None:
        return config
    any_time = Path(default_output_dir(config.model_name, "TIME"))
    name = re.compile(re.escape(any_time.name).replace("TIME", r"\d{8}-\d{6}"))
    there = any_time.parent.iterdir() if any_time.parent.is_dir() else ()
    runs = [path for path in there if name.fullmatch(path.name) and (path / "status.json").is_file()]
    if resume == "auto" and runs:
        return config.in_folder(str(max(runs, key=lambda path: (path / "status.json").stat().st_mtime)))
    return config.in_folder(default_output_dir(config.model_name, time.strftime("%Y%m%d-%H%M%S")))


def _without_resume(command: list[str]) -> list[str]:
    kept = [word for word in command if not word.startswith("--resume=")]
    places = [index for index, word in enumerate(kept) if word == "--resume"]
    return [word for index, word in enumerate(kept) if index not in places and index - 1 not in places]


def prepare(
    config: FinetuneConfig, folder: Path, tokenizer: Any, execution: Execution, console: Console,
    world: World,
) -> Prepared:  # fmt: skip
    """Read and tokenise the data, and find the checkpoint to go on from."""
    renderer = renderer_now(config, folder, tokenizer, console.print)
    preparation = world.first(lambda: preparation_now(config, folder))
    rows, validation_rows = load_once(
        world, lambda: load_rows(config, renderer, console.print, preparation, world.size)
    )
    total_steps = count_steps(config, len(rows), world.size)
    world.agreed(lambda: check_warmup(config, total_steps))
    fingerprint = rows.fingerprint()
    settings, precision = config.settings(world.size), str(execution.dtype)
    identity = world.first(lambda: identity_now(config, preparation, tokenizer, validation_rows))
    found = world.first(lambda: find_checkpoint(config, folder, settings, fingerprint, identity, precision, console))
    return Prepared(
        folder, execution, tokenizer, renderer, rows, validation_rows, total_steps, fingerprint, identity, found, world
    )


def _finetune(
    config: FinetuneConfig, log_every: int, folder: Path, command: list[str], given: Mapping[str, Any],
    console: Console, stop: StopRequest, world: World,
) -> None:  # fmt: skip
    tokenizer, model_config, execution = world.agreed(lambda: check_before(config, console.print, world))
    prepared = prepare(config, folder, tokenizer, execution, console, world)
    record_start(config, prepared, command, given)
    causal_lm = world.agreed(lambda: load_frozen(config, execution, tokenizer))
    if not Path(config.model_name).is_dir():
        held_out, preparation = prepared.validation_rows, prepared.identity["data preparation"]["version"]
        identity = world.first(lambda: identity_now(config, preparation, tokenizer, held_out))
        prepared = replace(prepared, identity=identity)
    model = world.agreed(lambda: add_adapter(causal_lm, config, execution.dtype))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    world.first(lambda: check_disk(config, folder, trained, BYTES_PER_PARAMETER))
    flag = config.flag("packing")
    model.chunked = world.agreed(lambda: prove_loss(causal_lm, execution.flatten_rows, config.packing, flag))
    rows = prepared.train_rows
    assert rows is not None
    step, predicted = planned_step(config, model_config, execution, world.size, int(rows.lengths.max()))
    checkpointing, device = step.checkpointing, execution.device
    record_model(config, prepared, model, checkpointing)
    console.print(_what_trains(config, causal_lm, execution, checkpointing))
    console.print(describe(model))
    if (said := memory_line(predicted, device)) is not None:
        console.print(said)
    optimizer = make_adapter_optimizer(config, model, device.type)
    settings = config.settings(world.size)
    made_of = (prepared.fingerprint, settings, prepared.identity)
    state = TrainingState(0, {}, 0, None, str(execution.dtype), *made_of)
    if prepared.resume_from is not None:
        state = replace(restore(prepared.resume_from, model, optimizer), identity=prepared.identity)
        console.print(f"resuming from {prepared.resume_from} (step {state.step} of {prepared.total_steps})")
    trainer = make_trainer(config, prepared, model, state, optimizer, checkpointing)
    epochs = config.whole_epochs or math.ceil(prepared.total_steps * config.rows_in_step(world.size) / len(rows))

    def line(metrics: Any, total_steps: int, left: str) -> str:
        return epoch_line(epochs, metrics, left)

    columns = (TextColumn("{task.fields[line]}"),)
    regular = regular_saves(config.save_every, prepared.total_steps)
    stop.at_once = False
    with ExitStack() as stack:
        progress = stack.enter_context(TrainingProgress(console, prepared.total_steps, state.step, line, columns))
        written = None
        if world.is_first:
            written = open_written(stack, config, prepared, state, console)
        around = RunFolderCallback(
            config, log_every, prepared, trainer, optimizer, state, console, stop, progress, written
        )
        trainer.add_callback(around)
        if state.step < prepared.total_steps:
            trainer.train()
        else:
            around.begin()
        around.finish_saving()
    if (said := predicted_and_measured(predicted, execution)) is not None:
        console.print(said)
    world.first(lambda: write_final(config, model, prepared, regular, console))


def _what_trains(config: FinetuneConfig, causal_lm: Any, execution: Execution, checkpointing: bool) -> str:
    return (
        f"{type(causal_lm).__name__} ({config.method}) on {execution.device.name}, "
        f"{str(execution.dtype).removeprefix('torch.')}, attention {execution.attention}, gradient checkpointing "
        f"{'on' if checkpointing else 'off'}, optimizer {optimizer_name(config, execution.device.type)}"
    )


def open_written(
    stack: ExitStack,
    config: FinetuneConfig,
    prepared: Prepared,
    state: TrainingState,
    console: Console,
) -> Written:
    """What the first process writes to while it trains. state: of the checkpoint that the run goes on from, or the
    first one."""
    folder, regular = prepared.folder, regular_saves(config.save_every, prepared.total_steps)
    return Written(
        stack.enter_context(open_log(folder, prepared.resume_from, state, console)),
        stack.enter_context(open_tracker(config, folder, state.step, config.written())),
        CheckpointWriter(folder / "checkpoints", config.keep_last, config.keep_best, regular),
    )


def write_final(config: FinetuneConfig, model: Any, prepared: Prepared, regular: Regular, console: Console) -> None:
    """The adapter as plain PEFT loads it, of the last step or of the best one, whole or not at all."""
    folder, step = prepared.folder, prepared.total_steps
    if config.final_weights == "best" and (best := best_checkpoint(folder / "checkpoints", regular)) is not None:
        restore_weights(best, model)
        step = step_of(best)
        console.print(f"final weights: {best}")
    final, steps = folder / "final", prepared.total_steps
    with new_folder(final) as partial:
        save_adapter(model, prepared.tokenizer, partial)
        (partial / "README.md").write_text(card_of(folder, step), encoding="utf-8")
    write_status(folder, "finished", steps, steps, final=entries_of(final))
