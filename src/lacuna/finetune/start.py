"""From a finetune config to a trained adapter: everything that can fail is tried here, the cheap things first."""

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import TextColumn

from lacuna.config.finetune import BATCH, IN_SFT, FinetuneConfig, default_output_dir
from lacuna.config.training import SFTConfig
from lacuna.data.chat import Renderer
from lacuna.data.loader import check_data_settings, load_rows
from lacuna.errors import ConfigError, LacunaError, RunError
from lacuna.finetune.adapters import add_adapter, check_quantisation, describe, load_frozen, save_adapter
from lacuna.finetune.trainer import (
    RunFolderCallback,
    Written,
    epoch_line,
    make_adapter_optimizer,
    make_trainer,
    optimizer_name,
)
from lacuna.platform import memory
from lacuna.platform.detect import Device, choose_device
from lacuna.runs.folder import write_config, write_provenance, write_status
from lacuna.runs.metrics import MetricsLog
from lacuna.train.checkpoint import CheckpointWriter, TrainingState, best_checkpoint, restore, restore_weights
from lacuna.train.loop import Prepared
from lacuna.train.model import (
    Execution,
    flash_attention_works,
    load_model_config,
    load_tokenizer,
    prove_loss,
    resolve_execution,
)
from lacuna.train.optimizer import check_warmup
from lacuna.train.progress import TrainingProgress
from lacuna.train.session import check_disk, check_resume_path, find_checkpoint, resume_command, supervise, together
from lacuna.train.signals import StopRequest
from lacuna.train.trackers import check_tracker, open_tracker

Report = Callable[[str], None]
BYTES_PER_PARAMETER = 12 + 4
"""A checkpoint's weight and two moments in fp32, and the final weight."""


def finetune(config: FinetuneConfig, resume: str | None, command: list[str]) -> None:
    """Train an adapter and leave a run folder with the adapter in `final/`.

    resume: a run folder or one of its checkpoints; "auto" the newest run; None a new one, or the one that is in
    training.output_dir already. command: what the user typed.
    Raises LacunaError for what the user can mend, Interrupted after a signal. status.json tells the same.
    """
    process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and config.training.output_dir is None:
        raise ConfigError("training.output_dir: several processes must agree on it: set it")
    config, resume_from = resolve_folder(config, resume)
    flat = config.as_sft(processes, resume_from)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))

    def work(folder: Path, console: Console, stop: StopRequest) -> None:
        with own_words():
            _finetune(config, flat, folder, command, console, stop, (process, processes))
        console.print(f"adapter: {folder / 'final'}")

    resume_with = resume_command(_without_resume(command), "--resume", str(flat.output_dir))
    with own_words():
        supervise(config, flat, resume_with, lambda: out_of_memory(config, flat), work, is_first=process == 0)


def dry_run(config: FinetuneConfig) -> None:
    """Print what can be known without training, and what would stop it."""
    flat = config.as_sft()
    console = Console(highlight=False, soft_wrap=True, markup=False)
    print()
    try:
        with own_words():
            flat, tokenizer, model_config, execution = check_before(config, flat, console.print)
            shape = memory.model_shape(model_config.to_dict())
            if shape is not None:
                step = memory_step(config, execution, decide_checkpointing(config, model_config, execution))
                console.print(f"memory of a step: {memory.describe(shape, step)}")
            rows, validation_rows = load_rows(flat, Renderer(tokenizer), console.print)
            steps = count_steps(flat, len(rows))
            check_warmup(flat, steps)
        console.print(f"{len(rows):,} samples to train on, {len(validation_rows or ()):,} to validate, {steps:,} steps")
    except LacunaError as error:
        console.print("\n".join(f"would stop: {problem}" for problem in error.problems))


def count_steps(flat: SFTConfig, samples: int) -> int:
    """Optimizer steps of the run."""
    return flat.steps or math.ceil((flat.epochs or 1) * samples / flat.batch_size)


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
    pattern = Path(default_output_dir(config.model.path, "*"))
    runs = [path for path in pattern.parent.glob(pattern.name) if (path / "status.json").is_file()]
    if resume == "auto" and runs:
        return config.with_output_dir(str(max(runs, key=lambda path: (path / "status.json").stat().st_mtime))), "auto"
    return config.with_output_dir(default_output_dir(config.model.path, time.strftime("%Y%m%d-%H%M%S"))), "auto"


def _without_resume(command: list[str]) -> list[str]:
    kept = [word for word in command if not word.startswith("--resume=")]
    places = [index for index, word in enumerate(kept) if word == "--resume"]
    return [word for index, word in enumerate(kept) if index not in places and index - 1 not in places]


@contextmanager
def own_words() -> Iterator[None]:
    """Errors of what is shared with our own loop come out with this config's names."""
    try:
        yield
    except LacunaError as error:
        error.problems = [in_own_words(problem) for problem in error.problems]
        error.args = ("\n".join(error.problems),)
        raise


def in_own_words(problem: str) -> str:
    """A message of what is shared with our own loop, with its settings under the names of this config."""
    names = {**IN_SFT, "batch_size": BATCH}
    underscored = [name for name in names if "_" in name]
    for name in sorted(names, key=len, reverse=True):
        flag = name.replace("_", "-")
        if flag not in ("device", "resume"):
            place = "training.batch_size" if name == "batch_size" else names[name]
            problem = re.sub(rf"--{flag}(?![\w-])", f"--set {place}=…", problem)
    words = "|".join(sorted(underscored, key=len, reverse=True))
    return re.sub(rf"(?<![\w./=-])({words})(?![\w/=])", lambda found: names[found[1]], problem)


def check_before(config: FinetuneConfig, flat: SFTConfig, report: Report) -> tuple[SFTConfig, Any, Any, Execution]:
    """What costs seconds, all of it together: settings as this machine can run them, tokenizer, model config, device.

    Raises ConfigError with everything that is wrong.
    """
    device = device_or_cpu(flat, report)
    if flat.attention == "flash_attention_2" and not flash_attention_works(device):
        report("flash_attention_2 is not there (it needs CUDA, bf16 and the package flash-attn): attention by sdpa")
        flat = flat.model_copy(update={"attention": "sdpa"})
    origin = config.model.base_model
    from_elsewhere = {"model_name": origin, "model_revision": None} if origin is not None else {}
    tokenizer, model_config, execution = together(
        lambda: load_tokenizer(flat.model_copy(update=from_elsewhere)),
        lambda: load_model_config(flat),
        lambda: resolve_execution(flat, device),
        lambda: check_data_settings(flat),
        lambda: check_tracker(flat, report),
        lambda: check_quantisation(config, device),
        lambda: check_resume_path(flat),
    )[:3]
    return flat, tokenizer, model_config, execution


def device_or_cpu(flat: SFTConfig, report: Report) -> Device:
    try:
        return choose_device(flat.device)
    except ConfigError as error:
        report(f"warning: {error}; going on with the CPU, which is much slower")
        return choose_device("cpu")


def memory_step(config: FinetuneConfig, execution: Execution, checkpointing: bool) -> memory.Step:
    training, bf16 = config.training, execution.dtype == torch.bfloat16
    bits = training.quantization_bits if training.method == "qlora" else 16 if bf16 else 32
    return memory.Step(training.batch_size, training.sequence_length, bits, training.lora_r, checkpointing, bf16)


def decide_checkpointing(config: FinetuneConfig, model_config: Any, execution: Execution) -> bool:
    wanted = config.training.gradient_checkpointing
    shape = memory.model_shape(model_config.to_dict())
    if wanted != "auto" or shape is None:
        return wanted is True
    return memory.needs_checkpointing(shape, memory_step(config, execution, False), execution.device.memory)


def out_of_memory(config: FinetuneConfig, flat: SFTConfig) -> str:
    """What the step was estimated at, and what each smaller setting would take."""
    model_config = load_model_config(flat)
    execution = resolve_execution(flat.model_copy(update={"attention": "sdpa"}), choose_device("auto"))
    shape = memory.model_shape(model_config.to_dict())
    advice = "lower training.batch_size and raise gradient_accumulation_steps as much, which changes nothing else"
    if shape is None:
        return f"out of memory: {advice}; or set training.gradient_checkpointing: true"
    step = memory_step(config, execution, decide_checkpointing(config, model_config, execution))
    changes = "; ".join(f"{text}: {gib:.1f} GiB" for text, gib in memory.savings(shape, step))
    return f"out of memory: a step takes {memory.describe(shape, step)}. What a step would take with {changes}"


def prepare(
    config: FinetuneConfig, flat: SFTConfig, folder: Path, tokenizer: Any, execution: Execution, console: Console,
    processes: int,
) -> Prepared:  # fmt: skip
    """Read and tokenise the data, and find the checkpoint to go on from."""
    renderer = Renderer(tokenizer)
    rows, validation_rows = load_rows(flat, renderer, console.print)
    total_steps = count_steps(flat, len(rows))
    check_warmup(flat, total_steps)
    fingerprint = rows.fingerprint()
    settings = config.settings(processes)
    found = find_checkpoint(config, flat, folder, settings, fingerprint, str(execution.dtype), console)
    return Prepared(folder, execution, tokenizer, renderer, rows, validation_rows, total_steps, fingerprint, found)


def _finetune(
    config: FinetuneConfig, flat: SFTConfig, folder: Path, command: list[str], console: Console, stop: StopRequest,
    processes: tuple[int, int],
) -> None:  # fmt: skip
    flat, tokenizer, model_config, execution = check_before(config, flat, console.print)
    prepared = prepare(config, flat, folder, tokenizer, execution, console, processes[1])
    if processes[0] == 0:
        write_config(folder, config)
        facts = {"device": execution.device.name, "devices": processes[1], "data_sha256": prepared.fingerprint}
        write_provenance(folder, command, facts)
    causal_lm = load_frozen(config, flat, execution, tokenizer)
    model = add_adapter(causal_lm, config, execution.dtype)
    check_disk(folder, sum(p.numel() for p in model.parameters() if p.requires_grad), BYTES_PER_PARAMETER)
    model.chunked = prove_loss(causal_lm, execution.flatten_rows, config.training.packing)
    checkpointing = decide_checkpointing(config, model_config, execution)
    device = execution.device
    console.print(
        f"{type(causal_lm).__name__} ({config.training.method}) on {device.name}, "
        f"{str(execution.dtype).removeprefix('torch.')}, attention {execution.attention}, gradient checkpointing "
        f"{'on' if checkpointing else 'off'}, optimizer {optimizer_name(config, device.type)}"
    )
    console.print(describe(model))
    if (shape := memory.model_shape(model_config.to_dict())) is not None and device.type != "cpu":
        console.print(f"memory of a step: {memory.describe(shape, memory_step(config, execution, checkpointing))}")
    optimizer = make_adapter_optimizer(config, flat, model, device.type)
    settings = config.settings(processes[1])
    state = TrainingState(0, {}, 0, None, str(execution.dtype), prepared.fingerprint, settings)
    if prepared.resume_from is not None:
        state = restore(prepared.resume_from, model, optimizer)
        console.print(f"resuming from {prepared.resume_from} (step {state.step} of {prepared.total_steps})")
    trainer = make_trainer(config, flat, prepared, model, state, optimizer, checkpointing, processes)
    rows = len(prepared.train_rows or ())
    epochs = flat.epochs or math.ceil(prepared.total_steps * flat.batch_size / rows)

    def line(metrics: Any, total_steps: int, left: str) -> str:
        return epoch_line(epochs, metrics, left)

    columns = (TextColumn("{task.fields[line]}"),)
    stop.at_once = False
    with ExitStack() as stack:
        progress = stack.enter_context(TrainingProgress(console, prepared.total_steps, state.step, line, columns))
        written = None
        if processes[0] == 0:
            written = open_written(stack, config, flat, folder, state.step if prepared.resume_from else -1)
        trainer.add_callback(
            RunFolderCallback(config, flat, prepared, trainer, optimizer, state, console, stop, progress, written)
        )
        if state.step < prepared.total_steps:
            trainer.train()
        if written is not None:
            written.checkpoints.wait()
    if processes[0] == 0:
        write_final(flat, model, prepared, console)


def open_written(stack: ExitStack, config: FinetuneConfig, flat: SFTConfig, folder: Path, step: int) -> Written:
    """What the first process writes to while it trains. step: of the checkpoint that the run goes on from, else -1."""
    return Written(
        stack.enter_context(MetricsLog(folder, step)),
        stack.enter_context(open_tracker(flat, folder, max(step, 0), config.model_dump())),
        CheckpointWriter(folder / "checkpoints", flat.keep_last, flat.keep_best),
    )


def write_final(flat: SFTConfig, model: Any, prepared: Prepared, console: Console) -> None:
    """The adapter as plain PEFT loads it, of the last step or of the best one, whole or not at all."""
    folder = prepared.folder
    if flat.final_weights == "best" and (best := best_checkpoint(folder / "checkpoints")) is not None:
        restore_weights(best, model)
        console.print(f"final weights: {best}")
    partial = folder / ".final.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_adapter(model, prepared.tokenizer, partial)
    partial.rename(folder / "final")
    write_status(folder, "finished", prepared.total_steps, prepared.total_steps)
