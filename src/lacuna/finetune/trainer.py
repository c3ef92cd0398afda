"""TRL's trainer with our rows and our loss; what happens around its steps is written down in the run folder."""

import contextlib
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.sft_config import SFTConfig as TrlConfig
from trl.trainer.sft_trainer import SFTTrainer

from lacuna.config.finetune import FinetuneConfig
from lacuna.config.training import SFTConfig
from lacuna.data.chat import Sample
from lacuna.data.collate import MicroBatch, collate
from lacuna.data.loader import Batch, PackedRow, batches
from lacuna.data.packing import pack
from lacuna.errors import Interrupted
from lacuna.finetune.adapters import AdapterModel, to_fp32
from lacuna.runs.folder import write_status
from lacuna.runs.metrics import MetricsLog
from lacuna.train.checkpoint import CheckpointWriter, TrainingState, tensors_of
from lacuna.train.loop import Prepared, loss_sums, non_finite, peak_memory, to_device
from lacuna.train.metrics import Window, model_flops
from lacuna.train.optimizer import decay_groups, learning_rate_at, make_optimizer
from lacuna.train.progress import TrainingProgress
from lacuna.train.signals import StopRequest
from lacuna.train.trackers import Log

VALIDATED_TOGETHER = 64
"""Samples that are laid out together in a validation."""


@dataclass(frozen=True)
class Step:
    """One optimizer step's samples, as the forward passes of this process."""

    batch: Batch
    passes: list[MicroBatch]
    targets: int
    """Supervised tokens over all processes."""
    tokens: int
    """Tokens over all processes."""
    seconds: float
    """What it took to lay them out."""


def lay_out(samples: list[Sample], rows: int, packing: bool) -> list[list[PackedRow]]:
    """Samples → forward passes of at most so many rows, none wider than the longest sample.

    packing: samples share rows; otherwise each has its own, padded to the longest of its pass. The loss of an
    optimizer step is one over its supervised tokens, so that neither changes what is learnt.
    """
    if not packing:
        arranged: list[PackedRow] = [[sample] for sample in samples]
    else:
        lengths = np.array([len(sample.tokens) for sample in samples])
        row_of = pack(lengths, int(lengths.max()))
        arranged = [[samples[index] for index in np.flatnonzero(row_of == row)] for row in range(int(row_of.max()) + 1)]
        arranged.sort(key=lambda row: -sum(len(sample.tokens) for sample in row))
    return [arranged[start : start + rows] for start in range(0, len(arranged), rows)]


@dataclass(frozen=True)
class Layout:
    """How samples become forward passes."""

    rows: int
    packing: bool
    padding: int
    flatten: bool

    def passes(self, samples: list[Sample]) -> list[MicroBatch]:
        laid_out = lay_out(samples, self.rows, self.packing)
        return [collate(rows, self.padding, None, self.flatten) for rows in laid_out]


class Steps(IterableDataset[Step]):
    """The optimizer steps of a run from a position on, and this process' share of each."""

    def __init__(
        self, config: SFTConfig, prepared: Prepared, layout: Layout, position: Any, process: int, processes: int
    ) -> None:
        self.config, self.prepared, self.layout, self.position = config, prepared, layout, position
        self.process, self.processes = process, processes

    def __iter__(self) -> Iterator[Step]:
        rows = self.prepared.train_rows
        assert rows is not None
        total = self.config.epochs * len(rows) if self.config.epochs is not None else None
        source = batches(rows, self.config.batch_size, self.config.seed, self.position, total)
        while True:
            started = time.perf_counter()
            batch = next(source, None)
            if batch is None:
                return
            samples = [sample for row in batch.rows for sample in row]
            share = samples[self.process :: self.processes] or [_without_targets(samples[0])]
            passes = self.layout.passes(share)
            targets = sum(int(sample.supervised[1:].sum()) for sample in samples)
            tokens = sum(len(sample.tokens) for sample in samples)
            yield Step(batch, passes, targets, tokens, time.perf_counter() - started)


def _without_targets(sample: Sample) -> Sample:
    """For a process that gets no sample of a short last step, but takes part in the exchange of gradients."""
    return Sample(sample.tokens[:2], np.zeros(2, dtype=np.bool_))


class AdapterTrainer(SFTTrainer):
    """SFTTrainer over steps that are laid out already."""

    def __init__(self, steps: Steps, execution: Any, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.steps = steps
        self.execution = execution
        self.step: Step | None = None
        self.losses: list[torch.Tensor] = []

    def get_train_dataloader(self) -> DataLoader[Step]:
        return DataLoader(self.steps, batch_size=None, collate_fn=self.data_collator)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward passes of one optimizer step; gradients are exchanged in the last."""
        step: Step = inputs["step"]
        model.train()
        self.step, self.losses = step, []
        scale = self.steps.processes / max(step.targets, 1)
        for index, micro in enumerate(step.passes):
            is_last = index == len(step.passes) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                loss = model(*to_device(micro, self.execution), scale=scale)
                self.accelerator.backward(loss)
            self.losses.append(loss.detach())
        return torch.stack(self.losses).sum()


def as_inputs(step: Step) -> dict[str, Step]:
    """The collator: the trainer wants its inputs named."""
    return {"step": step}


def make_trainer(
    config: FinetuneConfig, flat: SFTConfig, prepared: Prepared, model: AdapterModel, state: TrainingState,
    optimizer: torch.optim.Optimizer, checkpointing: bool, processes: tuple[int, int],
) -> AdapterTrainer:  # fmt: skip
    """TRL's trainer with everything off that this package does itself.

    TRL looks at one sample of a data set when it starts; the others reach it by get_train_dataloader.
    """
    execution = prepared.execution
    padding = prepared.tokenizer.pad_token_id
    padding = padding if padding is not None else prepared.tokenizer.eos_token_id
    layout = Layout(flat.micro_batch_size, config.training.packing, padding or 0, execution.flatten_rows)
    schedule = config.training.scheduler
    arguments = TrlConfig(
        output_dir=str(prepared.folder),
        max_steps=prepared.total_steps,
        per_device_train_batch_size=1,
        gradient_checkpointing=checkpointing,
        seed=flat.seed,
        bf16=False,
        max_grad_norm=0,
        use_cpu=execution.device.type == "cpu",
        ddp_backend="gloo" if execution.device.type == "cpu" and processes[1] > 1 else None,
        ddp_find_unused_parameters=False,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    steps = Steps(flat, prepared, layout, state.position or None, *processes)
    assert prepared.train_rows is not None
    sample = prepared.train_rows.row(0)[0]
    looked_at = {"input_ids": sample.tokens, "labels": np.where(sample.supervised, sample.tokens, -100)}
    before = {name: parameter.data.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}

    def share_of_peak(done: int) -> float:
        return learning_rate_at(state.step + done + 1, prepared.total_steps, flat, schedule) / flat.learning_rate

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        trainer = AdapterTrainer(
            steps,
            execution,
            model=model,
            args=arguments,
            data_collator=as_inputs,
            train_dataset=Dataset.from_list([looked_at]),
            processing_class=prepared.tokenizer,
            optimizers=(optimizer, LambdaLR(optimizer, share_of_peak)),
        )
    trainer.remove_callback(PrinterCallback)
    _undo_rounding(model, before)
    return trainer


def _undo_rounding(model: AdapterModel, before: dict[str, torch.Tensor]) -> None:
    """TRL rounds the adapter of a quantised model to bf16: back to fp32, with the values that were drawn."""
    to_fp32(model)
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data.copy_(before[name])


def make_adapter_optimizer(
    config: FinetuneConfig, flat: SFTConfig, model: AdapterModel, device: str
) -> torch.optim.Optimizer:
    if optimizer_name(config, device) == "adamw":
        return make_optimizer(model, flat)
    from bitsandbytes.optim.adamw import PagedAdamW32bit

    betas = (flat.adam_beta1, flat.adam_beta2)
    groups = decay_groups(model, flat)
    optimizer: torch.optim.Optimizer = PagedAdamW32bit(groups, lr=flat.learning_rate, betas=betas)
    return optimizer


def optimizer_name(config: FinetuneConfig, device: str) -> str:
    """Paged optimizers move between the GPU's memory and the host's: there are none without CUDA."""
    wanted = config.training.optimizer
    if wanted == "auto":
        wanted = "paged_adamw_32bit" if config.training.method == "qlora" else "adamw"
    return wanted if device == "cuda" else "adamw"


@dataclass(frozen=True)
class Written:
    """What the first process, and only that, writes to."""

    log: MetricsLog
    track: Log
    checkpoints: CheckpointWriter


class RunFolderCallback(TrainerCallback):
    """Around each optimizer step: clip, check, log, validate, save, stop."""

    def __init__(
        self, config: FinetuneConfig, flat: SFTConfig, prepared: Prepared, trainer: AdapterTrainer,
        optimizer: torch.optim.Optimizer, start: TrainingState, console: Console, stop: StopRequest,
        progress: TrainingProgress, written: Written | None,
    ) -> None:  # fmt: skip
        self.config, self.flat, self.prepared, self.trainer, self.optimizer = config, flat, prepared, trainer, optimizer
        self.model: AdapterModel = trainer.accelerator.unwrap_model(trainer.model)
        self.console, self.stop, self.progress, self.written = console, stop, progress, written
        self.state = start
        self.flops = model_flops(self.model.causal_lm, flat.sequence_length)
        self.window, self.tokens, self.norm = Window(), start.tokens, 0.0
        self.started = 0.0
        self.validation_loss = start.validation_loss

    def due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.prepared.total_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.global_step = self.state.step
        if state.global_step == 0:
            self.validate(0)
            self.stop_if_asked(0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Dropout is a function of seed, step and process, so that nothing of it needs to be saved."""
        self.started = time.perf_counter()
        source = np.random.SeedSequence([self.flat.seed, state.global_step, self.trainer.steps.process])
        torch.manual_seed(int(source.generate_state(1)[0]))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.flat.max_gradient_norm)
        *losses, self.norm = torch.stack([*self.trainer.losses, norm.to(self.trainer.losses[0].device)]).tolist()
        if not math.isfinite(sum(losses)) or not math.isfinite(self.norm):
            self.finish_saving()
            step = self.trainer.step
            assert step is not None
            raise non_finite(
                state.global_step + 1, step.batch, step.passes, losses, self.norm, self.prepared, self.flat
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step, done = state.global_step, self.trainer.step
        assert done is not None
        self.window.seconds += time.perf_counter() - self.started + done.seconds
        self.window.data_seconds += done.seconds
        self.window.add(done.passes, self.flops, self.flat.sequence_length)
        self.tokens += done.tokens
        self.validation_loss = None
        self.progress.advance(step)
        if self.due(step, self.flat.log_every) or step == 1:
            self.write_metrics(step, done)
        saves = self.due(step, self.flat.save_every)
        if saves or (self.flat.evaluate_every and self.due(step, self.flat.evaluate_every)):
            self.validate(step)
        if saves or self.asked_to_stop():
            self.save(step, done)
        self.stop_if_asked(step)

    def write_metrics(self, step: int, done: Step) -> None:
        loss = self.over_processes(float(torch.stack(self.trainer.losses).sum())) / self.trainer.steps.processes
        rows = self.prepared.train_rows
        assert rows is not None
        values = {
            "loss": loss,
            "learning_rate": learning_rate_at(
                step, self.prepared.total_steps, self.flat, self.config.training.scheduler
            ),
            "gradient_norm": self.norm,
            "tokens": self.tokens,
            "targets": done.targets,
            "epoch": done.batch.position["epoch"] + done.batch.position["row"] / len(rows),
            **self.window.speed(self.peak_flops()),
            **peak_memory(self.prepared.execution),
        }
        values["tokens_per_second"] *= self.trainer.steps.processes
        self.window = Window()
        if self.written is not None:
            self.written.log.write({"step": step, **values})
            self.written.track(step, values)
            self.progress.show({"step": step, **values})
            write_status(self.prepared.folder, "running", step, self.prepared.total_steps, loss=loss)

    def peak_flops(self) -> float | None:
        execution = self.prepared.execution
        return execution.device.peak_bf16_flops if execution.dtype == torch.bfloat16 else None

    def validate(self, step: int) -> None:
        rows, steps = self.prepared.validation_rows, self.trainer.steps
        if rows is None:
            return
        mine = list(range(len(rows)))[steps.process :: steps.processes]
        chunks = (mine[start : start + VALIDATED_TOGETHER] for start in range(0, len(mine), VALIDATED_TOGETHER))
        samples = ([sample for index in chunk for sample in rows.row(index)] for chunk in chunks)
        passes = (micro for chunk in samples for micro in steps.layout.passes(chunk))
        sums = loss_sums(passes, self.model, self.prepared, self.stop if steps.processes == 1 else StopRequest())
        if sums is None:
            return
        total, targets = (self.over_processes(value) for value in sums)
        self.validation_loss = total / max(targets, 1)
        if self.written is not None:
            self.written.log.write({"step": step, "validation_loss": self.validation_loss})
            self.written.track(step, {"validation_loss": self.validation_loss})
            self.console.print(f"step {step}/{self.prepared.total_steps} | validation loss {self.validation_loss:.4f}")

    def over_processes(self, value: float) -> float:
        if self.trainer.steps.processes == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.trainer.accelerator.device)
        return float(self.trainer.accelerator.reduce(tensor))

    def asked_to_stop(self) -> bool:
        return self.over_processes(float(bool(self.stop))) > 0

    def save(self, step: int, done: Step) -> None:
        if self.written is not None:
            self.state = replace(
                self.state, step=step, position=done.batch.position, tokens=self.tokens,
                validation_loss=self.validation_loss,
            )  # fmt: skip
            self.written.checkpoints.save(tensors_of(self.model, self.optimizer), self.state)

    def finish_saving(self) -> None:
        if self.written is not None:
            self.written.checkpoints.wait()

    def stop_if_asked(self, step: int) -> None:
        if self.asked_to_stop():
            self.finish_saving()
            saved = f"after step {step}, which is saved" if step else "before the first step"
            raise Interrupted(self.stop.signal_number or 0, f"stopped {saved}")


def epoch_line(epochs: int, metrics: Mapping[str, float], left: str) -> str:
    """`Epoch 1/3: [████████░░░░░░░░░] 60% | Loss: 2.341 | LR: 3e-4 | ETA: 12m 30s`"""
    whole = min(math.ceil(metrics["epoch"]), epochs) or 1
    share = metrics["epoch"] - (whole - 1)
    bar = "█" * round(BAR * share) + "░" * (BAR - round(BAR * share))
    digits, exponent = f"{metrics['learning_rate']:.1e}".split("e")
    rate = f"{digits.removesuffix('.0')}e{int(exponent)}"
    line = f"Epoch {whole}/{epochs}: [{bar}] {share:.0%} | Loss: {metrics['loss']:.3f} | LR: {rate}"
    return f"{line} | ETA: {left}" if left else line


BAR = 17
