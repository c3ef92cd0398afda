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
from lacuna.config.training import SFTConfig
from lacuna.data.chat import Renderer
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
from lacuna.train.session import check_disk, find_checkpoint, preparation_now, resume_command, supervise
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
        config, resume_from = world.first(lambda: resolve_folder(config, resume))
        flat = config.as_sft(world.size, resume_from)
        if verbose:
            flat = flat.model_copy(update={"log_every": 1})

        def work(folder: Path, console: Console, stop: StopRequest) -> None:
            _finetune(config, flat, folder, command, given, console, stop, world)
            console.print(f"adapter: {folder / 'final'}")

        resume_with = resume_command(_without_resume(command), config.gpus, "--resume", str(flat.output_dir))
        supervise(config, flat, resume_with, lambda: after_out_of_memory(config), work, world, again)


def with_folder(config: FinetuneConfig, resume: str | None) -> tuple[FinetuneConfig, list[str]]:
    """The config with its run folder; or as it is, and why there is nothing to resume."""
    try:
        return resolve_folder(config, resume)[0], []
    except LacunaError as error:
        return config, error.problems


def resolve_folder(config: FinetuneConfig, resume: str | None) -> tuple[FinetuneConfig, str]:
    """The config with its run folder, and what SFTConfig calls resume. Raises RunError: nothing to resume there.

    A run goes on in its own folder; a checkpoint in training.output_dir, which may be another one.
    """
    given = config.training.output_dir
    if resume is not None and resume != "auto":
        path = Path(resume)
        is_checkpoint, is_run = (path / "manifest.json").is_file(), (path / "status.json").is_file()
        if not is_checkpoint and not is_run:
            raise RunError(f"--resume {resume}: neither a run folder nor a checkpoint of one")
        if is_checkpoint:
            return config.with_output_dir(given or str(path.parent.parent)), resume
        return config.with_output_dir(resume), "auto"
    if given is not None:
        return config, "auto"
    any_time = Path(default_output_dir(config.model.path, "TIME"))
    name = re.compile(re.escape(any_time.name).replace("TIME", r"\d{8}-\d{6}"))
    there = any_time.parent.iterdir() if any_time.parent.is_dir() else ()
    runs = [path for path in there if name.fullmatch(path.name) and (path / "status.json").is_file()]
    if resume == "auto" and runs:
        return config.with_output_dir(str(max(runs, key=lambda path: (path / "status.json").stat().st_mtime))), "auto"
    return config.with_output_dir(default_output_dir(config.model.path, time.strftime("%Y%m%d-%H%M%S"))), "auto"


def _without_resume(command: list[str]) -> list[str]:
    kept = [word for word in command if not word.startswith("--resume=")]
    places = [index for index, word in enumerate(kept) if word == "--resume"]
    return [word for index, word in enumerate(kept) if index not in places and index - 1 not in places]


def prepare(
    config: FinetuneConfig, flat: SFTConfig, folder: Path, tokenizer: Any, execution: Execution, console: Console,
    world: World,
) -> Prepared:  # fmt: skip
    """Read and tokenise the data, and find the checkpoint to go on from."""
    renderer = Renderer(tokenizer, flat.flag("chat_template"))
    preparation = world.first(lambda: preparation_now(flat, folder))
    rows, validation_rows = load_once(world, lambda: load_rows(flat, renderer, console.print, preparation))
    total_steps = count_steps(flat, len(rows))
    world.agreed(lambda: check_warmup(flat, total_steps))
    fingerprint = rows.fingerprint()
    settings, precision = config.settings(world.size), str(execution.dtype)
    identity = world.first(lambda: identity_now(flat, preparation, tokenizer, validation_rows))
    found = world.first(
        lambda: find_checkpoint(config, flat, folder, settings, fingerprint, identity, precision, console)
    )
    return Prepared(
        folder, execution, tokenizer, renderer, rows, validation_rows, total_steps, fingerprint, identity, found, world
    )


def _finetune(
    config: FinetuneConfig, flat: SFTConfig, folder: Path, command: list[str], given: Mapping[str, Any],
    console: Console, stop: StopRequest, world: World,
) -> None:  # fmt: skip
    tokenizer, model_config, execution = world.agreed(lambda: check_before(config, flat, console.print, world))
    prepared = prepare(config, flat, folder, tokenizer, execution, console, world)
    record_start(config, flat, prepared, command, given)
    causal_lm = world.agreed(lambda: load_frozen(config, flat, execution, tokenizer))
    if not Path(flat.model_name).is_dir():
        held_out, preparation = prepared.validation_rows, prepared.identity["data preparation"]["version"]
        identity = world.first(lambda: identity_now(flat, preparation, tokenizer, held_out))
        prepared = replace(prepared, identity=identity)
    model = world.agreed(lambda: add_adapter(causal_lm, config, execution.dtype))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    world.first(lambda: check_disk(flat, folder, trained, BYTES_PER_PARAMETER))
    flag = flat.flag("packing")
    model.chunked = world.agreed(lambda: prove_loss(causal_lm, execution.flatten_rows, config.training.packing, flag))
    rows = prepared.train_rows
    assert rows is not None
    step, predicted = planned_step(config, model_config, execution, world.size, int(rows.lengths.max()))
    checkpointing, device = step.checkpointing, execution.device
    record_model(flat, prepared, model, checkpointing)
    console.print(
        f"{type(causal_lm).__name__} ({config.training.method}) on {device.name}, "
        f"{str(execution.dtype).removeprefix('torch.')}, attention {execution.attention}, gradient checkpointing "
        f"{'on' if checkpointing else 'off'}, optimizer {optimizer_name(config, device.type)}"
    )
    console.print(describe(model))
    if (said := memory_line(predicted, device)) is not None:
        console.print(said)
    optimizer = make_adapter_optimizer(config, flat, model, device.type)
    settings = config.settings(world.size)
    made_of = (prepared.fingerprint, settings, prepared.identity)
    state = TrainingState(0, {}, 0, None, str(execution.dtype), *made_of)
    if prepared.resume_from is not None:
        state = replace(restore(prepared.resume_from, model, optimizer), identity=prepared.identity)
        console.print(f"resuming from {prepared.resume_from} (step {state.step} of {prepared.total_steps})")
    trainer = make_trainer(config, flat, prepared, model, state, optimizer, checkpointing)
    epochs = flat.epochs or math.ceil(prepared.total_steps * flat.batch_size / len(rows))

    def line(metrics: Any, total_steps: int, left: str) -> str:
        return epoch_line(epochs, metrics, left)

    columns = (TextColumn("{task.fields[line]}"),)
    regular = regular_saves(flat.save_every, prepared.total_steps)
    stop.at_once = False
    with ExitStack() as stack:
        progress = stack.enter_context(TrainingProgress(console, prepared.total_steps, state.step, line, columns))
        written = None
        if world.is_first:
            written = open_written(stack, config, flat, prepared, state, console)
        around = RunFolderCallback(config, flat, prepared, trainer, optimizer, state, console, stop, progress, written)
        trainer.add_callback(around)
        if state.step < prepared.total_steps:
            trainer.train()
        else:
            around.begin()
        around.finish_saving()
    if (said := predicted_and_measured(predicted, execution)) is not None:
        console.print(said)
    world.first(lambda: write_final(flat, model, prepared, regular, console))


def open_written(
    stack: ExitStack,
    config: FinetuneConfig,
    flat: SFTConfig,
    prepared: Prepared,
    state: TrainingState,
    console: Console,
) -> Written:
    """What the first process writes to while it trains. state: of the checkpoint that the run goes on from, or the
    first one."""
    folder, regular = prepared.folder, regular_saves(flat.save_every, prepared.total_steps)
    return Written(
        stack.enter_context(open_log(folder, prepared.resume_from, state, console)),
        stack.enter_context(open_tracker(flat, folder, state.step, config.model_dump())),
        CheckpointWriter(folder / "checkpoints", flat.keep_last, flat.keep_best, regular),
    )


def write_final(flat: SFTConfig, model: Any, prepared: Prepared, regular: Regular, console: Console) -> None:
    """The adapter as plain PEFT loads it, of the last step or of the best one, whole or not at all."""
    folder, step = prepared.folder, prepared.total_steps
    if flat.final_weights == "best" and (best := best_checkpoint(folder / "checkpoints", regular)) is not None:
        restore_weights(best, model)
        step = step_of(best)
        console.print(f"final weights: {best}")
    final, steps = folder / "final", prepared.total_steps
    with new_folder(final) as partial:
        save_adapter(model, prepared.tokenizer, partial)
        (partial / "README.md").write_text(card_of(folder, step), encoding="utf-8")
    write_status(folder, "finished", steps, steps, final=entries_of(final))
