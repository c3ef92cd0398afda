"""The training loop of pretraining and SFT, from a config to a finished run folder."""

import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lacuna.config.training import PretrainConfig, SFTConfig, TrainingConfig
from lacuna.data.chat import Renderer
from lacuna.data.collate import MicroBatch, collate
from lacuna.data.loader import Batch, PackedRow, PackedRows, batches
from lacuna.data.stream import stream
from lacuna.errors import Interrupted, NonFiniteLossError
from lacuna.runs.card import card_of
from lacuna.runs.final import entries_of
from lacuna.runs.folder import write_status
from lacuna.runs.identity import Identity
from lacuna.train.checkpoint import CheckpointWriter, TrainingState, restore, restore_weights, tensors_of
from lacuna.train.distributed import World, free_gathered, full_weights, sum_over_nodes, whole
from lacuna.train.final import new_folder
from lacuna.train.kept import best_checkpoint, regular_saves, step_of
from lacuna.train.metrics import Window, model_flops
from lacuna.train.model import (
    Execution,
    LossModel,
    prepare_blocks,
    stop_at_end_of_turn,
)
from lacuna.train.optimizer import learning_rate_at, make_optimizer
from lacuna.train.progress import TrainingProgress
from lacuna.train.records import open_records
from lacuna.train.signals import StopRequest


@dataclass(frozen=True)
class Prepared:
    """What a run needs before its first step."""

    folder: Path
    execution: Execution
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    train_rows: PackedRows | None
    """None when streaming."""
    validation_rows: PackedRows | None
    total_steps: int
    fingerprint: str
    """Of the rows that are trained on."""
    identity: Identity
    """Of what else the run is made."""
    resume_from: Path | None
    world: World

    @property
    def padding(self) -> int:
        """The token that fills rows up; it is never attended to and never learned."""
        token = self.tokenizer.pad_token_id
        token = token if token is not None else self.tokenizer.eos_token_id
        return token or 0


def train_steps(
    config: TrainingConfig, prepared: Prepared, model: LossModel, console: Console, stop: StopRequest
) -> None:
    """Train from the last checkpoint, or from the start, to the last step, and write the final folder.

    Raises NonFiniteLossError before the optimizer moves, Interrupted after saving, RunError where saving fails.
    """
    execution, folder, total_steps, world = prepared.execution, prepared.folder, prepared.total_steps, prepared.world
    device = execution.device.type
    optimizer = make_optimizer(model, config)
    flops = model_flops(model.causal_lm, config.sequence_length)
    regular = regular_saves(config.save_every, total_steps)
    checkpoints = folder / "checkpoints"
    writer = CheckpointWriter(checkpoints, config.keep_last, config.keep_best, regular, world.groups[1])
    made_of = (prepared.fingerprint, config.written(), prepared.identity)
    state = TrainingState(0, {}, 0, None, str(execution.dtype), *made_of)
    if prepared.resume_from is not None:
        state = replace(restore(prepared.resume_from, model.causal_lm, optimizer), identity=prepared.identity)
        console.print(f"resuming from {prepared.resume_from} (step {state.step} of {total_steps})")
    source = read_batches(config, prepared, state.position or None, console)

    def due(step: int, every: int) -> bool:
        return step % every == 0 or step == total_steps

    stop.at_once = False
    with ExitStack() as stack:
        records = open_records(stack, config, prepared.folder, prepared.resume_from, state, console, prepared.world)
        progress = stack.enter_context(TrainingProgress(console, total_steps, state.step))
        window = Window()
        step, tokens, position, validation_loss = state.step, state.tokens, state.position, state.validation_loss
        evaluate_every = config.evaluate_every or config.save_every
        while True:
            if validation_loss is None and (step == 0 or due(step, evaluate_every)):
                validation_loss = validate(config, prepared, model, stop)
                if validation_loss is not None:
                    records.write(step, {"validation_loss": validation_loss})
                    console.print(f"step {step}/{total_steps} | validation loss {validation_loss:.4f}")
            started = time.perf_counter()
            batch = next_batch(source, stop) if step < total_steps else None
            waited = time.perf_counter() - started
            asked = world.greatest(stop.signal_number or 0, device)
            if step > state.step and (due(step, config.save_every) or asked):
                state = replace(state, step=step, position=position, tokens=tokens, validation_loss=validation_loss)
                state = replace(state, metrics=records.mark())
                writer.save(tensors_of(model.causal_lm, optimizer), state)
            if asked:
                writer.wait()
                saved = f"after step {step}, which is saved" if step else "before the first step"
                raise Interrupted(asked, f"stopped {saved}")
            if batch is None:
                break

            started = time.perf_counter()
            torch.manual_seed(dropout_seed(config.seed, step, world.rank))
            micro_batches = collate_batch(config, prepared, world.share(batch.places))
            window.data_seconds += waited + time.perf_counter() - started
            step, position, validation_loss = step + 1, batch.position, None
            losses = []
            for micro in micro_batches:
                sum_over_nodes(model, micro is micro_batches[-1])
                loss = model(*to_device(micro, execution), scale=world.size / max(batch.targets, 1))
                loss.backward()
                losses.append(loss.detach())
            norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm))
            total = world.total(torch.stack(losses).sum()) / world.size
            loss_value, norm_value = torch.stack([total, norm]).tolist()
            if not math.isfinite(loss_value) or not math.isfinite(norm_value):
                writer.wait()
                raise_non_finite(step, batch, micro_batches, losses, norm_value, prepared, config)
            learning_rate = learning_rate_at(step, total_steps, config)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()
            window.seconds += waited + time.perf_counter() - started
            window.add(micro_batches, flops, config.sequence_length, batch.tokens)
            tokens += batch.tokens
            progress.advance(step)
            if due(step, config.log_every) or step == 1:
                values = {
                    "loss": loss_value, "learning_rate": learning_rate, "gradient_norm": norm_value,
                    "tokens": tokens, "targets": batch.targets, "epoch": position["epoch"],
                    **window.speed(execution.peak_flops), **peak_memory(execution),
                }  # fmt: skip
                records.write(step, values)
                progress.show({"step": step, **values})
                if world.is_first:
                    speed = values["tokens_per_second"]
                    write_status(folder, "running", step, total_steps, loss=loss_value, tokens_per_second=speed)
                window = Window()
        writer.wait()
    final_step = total_steps
    if config.final_weights == "best" and (best := world.first(lambda: best_checkpoint(checkpoints, regular))):
        restore_weights(best, model.causal_lm)
        final_step = step_of(best)
        console.print(f"final weights: {best}")
    write_final(model, prepared, final_step)


def next_batch(source: Iterator[Batch], stop: StopRequest) -> Batch | None:
    """The next batch; None as soon as a signal asks to stop."""
    with suppress(Interrupted), stop.ends_the_wait():
        return next(source)
    return None


def dropout_seed(seed: int, step: int, process: int) -> int:
    """Dropout is a function of these, so that nothing of it needs to be saved."""
    return int(np.random.SeedSequence([seed, step, process]).generate_state(1)[0])


def read_batches(
    config: TrainingConfig, prepared: Prepared, position: dict[str, Any] | None, console: Console
) -> Iterator[Batch]:
    """Batches from the position on, from memory or streamed. The last batch of all epochs may be a short one."""
    if isinstance(config, PretrainConfig) and config.streaming:
        return stream(config, prepared.renderer, console.print, position)
    assert prepared.train_rows is not None
    rows = config.epochs * len(prepared.train_rows) if config.epochs is not None else None
    return batches(prepared.train_rows, config.batch_size, config.seed, position, rows)


def collate_batch(config: TrainingConfig, prepared: Prepared, rows: list[PackedRow]) -> list[MicroBatch]:
    """Rows of an optimizer step → forward passes; padded to one length where compilation would trip over many."""
    length = config.sequence_length if prepared.execution.compile else None
    return [
        collate(
            rows[start : start + config.micro_batch_size], prepared.padding, length, prepared.execution.flatten_rows
        )
        for start in range(0, len(rows), config.micro_batch_size)
    ]


def to_device(micro: MicroBatch, execution: Execution) -> tuple[Tensor, ...]:
    arrays = (micro.input_ids, micro.position_ids, micro.predicting, micro.targets)
    return tuple(torch.from_numpy(array).to(execution.device.type, non_blocking=True) for array in arrays)


def validate(config: TrainingConfig, prepared: Prepared, model: LossModel, stop: StopRequest) -> float | None:
    """Mean loss per supervised token of all validation rows; None without validation or when asked to stop."""
    rows = prepared.validation_rows
    if rows is None:
        return None
    together = config.micro_batch_size * prepared.world.size
    starts = range(0, len(rows), together)
    chunks = ([(rows, index) for index in range(len(rows))[start:][:together]] for start in starts)
    shares = map(prepared.world.share, chunks)
    return mean_loss((collate_batch(config, prepared, share) for share in shares), model, prepared, stop)


@torch.no_grad()
def mean_loss(
    batches: Iterable[list[MicroBatch]], model: nn.Module, prepared: Prepared, stop: StopRequest
) -> float | None:
    """Loss per supervised token over all processes, which have as many batches; None when one is asked to stop."""
    device, world = prepared.execution.device.type, prepared.world
    model.eval()
    total, targets = 0.0, 0
    for batch in batches:
        if world.greatest(stop.signal_number or 0, device):
            free_gathered(model)
            return None
        for micro in batch:
            if world.size == 1 and stop:
                return None
            total += float(model(*to_device(micro, prepared.execution), scale=1.0))
            targets += len(micro.targets)
    model.train()
    free_gathered(model)
    totals, counts = zip(*world.gather((total, targets)), strict=True)
    return float(sum(totals) / max(sum(counts), 1))


def raise_non_finite(
    step: int, batch: Batch, micro_batches: list[MicroBatch], losses: list[Tensor], norm: float, prepared: Prepared,
    config: TrainingConfig,
) -> None:  # fmt: skip
    """Raise NonFiniteLossError that names the rows, of whichever process, how they begin, and what to do."""
    values = torch.stack(losses).tolist()
    bad = next((index for index, loss in enumerate(values) if not math.isfinite(loss)), None)
    what = f"the loss is {values[bad]}" if bad is not None else f"the gradient norm is {norm}"
    start = prepared.tokenizer.decode(micro_batches[bad or 0].input_ids[0, :24])
    mine = (
        f"step {step}: {what} in micro-batch {(bad or 0) + 1} of {len(micro_batches)}, whose first row begins "
        f"{start!r} (the batch ends at {batch.position}). The optimizer has not moved and the checkpoints before are "
        f"untouched: look at these rows, lower {config.spelled('learning_rate')} (now {config.learning_rate:g}) or "
        f"lengthen the warmup, and start in another {config.flag('output_dir')}"
    )
    found = prepared.world.gather((bad is None, mine))
    raise NonFiniteLossError(min(found)[1], is_shared=True)


def peak_memory(execution: Execution) -> dict[str, float]:
    """The most memory so far in GiB: of tensors on CUDA, of the whole process elsewhere."""
    if execution.device.type == "cuda":
        return {"peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def write_final(model: LossModel, prepared: Prepared, step: int) -> None:
    """A plain Hugging Face folder, in the precision of the computation, and the status of a finished run.

    step: of the weights.
    """
    nn.Module.to(model.causal_lm, prepared.execution.dtype)
    weights = full_weights(model.causal_lm, prepared.world) if prepared.world.size > 1 else None

    def write() -> None:
        final = prepared.folder / "final"
        with new_folder(final) as partial:
            model.causal_lm.save_pretrained(partial, state_dict=weights)
            prepared.tokenizer.save_pretrained(partial)
            (partial / "README.md").write_text(card_of(prepared.folder, step), encoding="utf-8")
        steps = prepared.total_steps
        write_status(prepared.folder, "finished", steps, steps, final=entries_of(final))

    prepared.world.first(write)


def settle(
    config: TrainingConfig, prepared: Prepared, model: LossModel, console: Console, checkpointing: bool
) -> LossModel:
    """Prove the loss, then wrap checkpointing and compilation around the blocks, and say what was chosen."""
    execution, causal_lm, world = prepared.execution, model.causal_lm, prepared.world
    world.agreed(lambda: model.prove(execution.flatten_rows, config.packing))
    free_gathered(model)
    prepare_blocks(causal_lm, checkpointing, execution.compile)
    if isinstance(config, SFTConfig) and prepared.tokenizer.chat_template is not None:
        stop_at_end_of_turn(causal_lm, prepared.tokenizer, prepared.renderer.stop_token)
    parameters = sum(parameter.numel() for parameter in causal_lm.parameters())
    console.print(
        f"{type(causal_lm).__name__}: {parameters:,} parameters on {execution.device.name}, "
        f"{str(execution.dtype).removeprefix('torch.')}, attention {execution.attention}, "
        f"{'chunked' if model.chunked else 'plain'} loss, activation checkpointing {'on' if checkpointing else 'off'}, "
        f"compilation {'on' if execution.compile else 'off'}",
    )
    if world.size > 1:
        rows = -(-config.batch_size // world.size)
        passes = -(-rows // config.micro_batch_size)
        console.print(
            f"{world.size} processes ({config.sharding} sharding): of a batch's {config.batch_size} rows, {rows} each, "
            f"in {passes} forward pass{'es' * (passes > 1)}"
        )
    return model.train()
