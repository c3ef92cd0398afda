"""What happens around the optimizer's steps of a finetune run, and is written into its folder."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lacuna.config.finetune import FinetuneConfig
from lacuna.errors import Interrupted
from lacuna.finetune.adapters import AdapterModel
from lacuna.finetune.steps import Step
from lacuna.finetune.trainer import AdapterTrainer
from lacuna.runs.folder import write_status
from lacuna.runs.metrics import MetricsLog, validation_losses
from lacuna.train.checkpoint import CheckpointWriter, TrainingState, tensors_of
from lacuna.train.loop import Prepared, dropout_seed, mean_loss, peak_memory, raise_non_finite
from lacuna.train.metrics import Window, model_flops
from lacuna.train.optimizer import learning_rate_at
from lacuna.train.progress import TrainingProgress
from lacuna.train.signals import StopRequest
from lacuna.train.trackers import Log

VALIDATED_TOGETHER = 64
"""Samples that are laid out together in a validation."""
BAR = 17
"""Characters of the progress bar."""


@dataclass(frozen=True)
class Written:
    """What the first process, and only that, writes to."""

    log: MetricsLog
    track: Log
    checkpoints: CheckpointWriter


class RunFolderCallback(TrainerCallback):
    """Around each optimizer step: clip, check, log, validate, save, stop."""

    def __init__(
        self, config: FinetuneConfig, log_every: int, prepared: Prepared, trainer: AdapterTrainer,
        optimizer: torch.optim.Optimizer, start: TrainingState, console: Console, stop: StopRequest,
        progress: TrainingProgress, written: Written | None,
    ) -> None:  # fmt: skip
        self.config, self.prepared, self.trainer, self.optimizer = config, prepared, trainer, optimizer
        self.model: AdapterModel = trainer.accelerator.unwrap_model(trainer.model)
        self.console, self.stop, self.progress, self.written = console, stop, progress, written
        self.state = start
        self.flops = model_flops(self.model.causal_lm, config.sequence_length)
        self.world = prepared.world
        self.window, self.tokens, self.loss, self.norm = Window(), start.tokens, 0.0, 0.0
        self.started, self.log_every = 0.0, log_every
        self.validation_loss = start.validation_loss

    def due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.prepared.total_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.global_step = self.state.step
        self.begin()

    def begin(self) -> None:
        """Validate before the first step, and where a signal cut a validation short."""
        step = self.state.step
        is_validated = step in validation_losses(self.prepared.folder)
        if (step == 0 or self.validation_due(step)) and not is_validated:
            self.validate(step)
        self.stop_if_asked(step, self.asked_to_stop())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.perf_counter()
        torch.manual_seed(dropout_seed(self.config.seed, state.global_step, self.world.rank))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.config.max_gradient_norm)
        losses = self.trainer.losses
        total = self.world.total(torch.stack(losses).sum()) / self.world.size
        self.loss, self.norm = torch.stack([total, norm.to(total.device)]).tolist()
        if not math.isfinite(self.loss) or not math.isfinite(self.norm):
            self.finish_saving()
            step = self.trainer.step
            assert step is not None
            number = state.global_step + 1
            raise_non_finite(number, step.batch, step.passes, losses, self.norm, self.prepared, self.config)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step, done = state.global_step, self.trainer.step
        assert done is not None
        self.window.seconds += time.perf_counter() - self.started + done.seconds
        self.window.data_seconds += done.seconds
        self.window.add(done.passes, self.flops, self.config.sequence_length, done.batch.tokens)
        self.tokens += done.batch.tokens
        self.validation_loss = None
        self.progress.advance(step)
        if self.due(step, self.log_every) or step == 1:
            self.write_metrics(step, done)
        if self.validation_due(step):
            self.validate(step)
        asked = self.asked_to_stop()
        if asked or self.due(step, self.config.save_every):
            self.save(step, done)
        self.stop_if_asked(step, asked)

    def validation_due(self, step: int) -> bool:
        every = (self.config.save_every, self.config.evaluate_every or self.config.save_every)
        return any(self.due(step, steps) for steps in every)

    def write_metrics(self, step: int, done: Step) -> None:
        rows = self.prepared.train_rows
        assert rows is not None
        values = {
            "loss": self.loss,
            "learning_rate": learning_rate_at(step, self.prepared.total_steps, self.config, self.config.scheduler),
            "gradient_norm": self.norm,
            "tokens": self.tokens,
            "targets": done.batch.targets,
            "epoch": done.batch.position["epoch"] + done.batch.position["row"] / len(rows),
            **self.window.speed(self.prepared.execution.peak_flops),
            **peak_memory(self.prepared.execution),
        }
        self.window = Window()
        if self.written is not None:
            self.written.log.write({"step": step, **values})
            self.written.track(step, values)
            self.progress.show({"step": step, **values})
            write_status(
                self.prepared.folder, "running", step, self.prepared.total_steps, loss=self.loss,
                tokens_per_second=values["tokens_per_second"],
            )  # fmt: skip

    def validate(self, step: int) -> None:
        rows = self.prepared.validation_rows
        if rows is None:
            return
        together = VALIDATED_TOGETHER * self.world.size
        starts = range(0, len(rows), together)
        chunks = ([(rows, index) for index in range(len(rows))[start:][:together]] for start in starts)
        samples = ([sample for row in self.world.share(chunk) for sample in row] for chunk in chunks)
        passes = (self.trainer.steps.layout.passes(chunk) for chunk in samples)
        self.validation_loss = mean_loss(passes, self.model, self.prepared, self.stop)
        if self.validation_loss is None:
            return
        if self.written is not None:
            self.written.log.write({"step": step, "validation_loss": self.validation_loss})
            self.written.track(step, {"validation_loss": self.validation_loss})
            self.console.print(f"step {step}/{self.prepared.total_steps} | validation loss {self.validation_loss:.4f}")

    def asked_to_stop(self) -> int:
        """The signal that any process got; 0 without."""
        return self.world.greatest(self.stop.signal_number or 0, self.prepared.execution.device.type)

    def save(self, step: int, done: Step) -> None:
        if self.written is not None:
            self.state = replace(
                self.state, step=step, position=done.batch.position, tokens=self.tokens,
                validation_loss=self.validation_loss, metrics=self.written.log.mark(),
            )  # fmt: skip
            self.written.checkpoints.save(tensors_of(self.model, self.optimizer), self.state)

    def finish_saving(self) -> None:
        self.world.first(lambda: self.written.checkpoints.wait() if self.written is not None else None)

    def stop_if_asked(self, step: int, asked: int) -> None:
        if asked:
            self.finish_saving()
            saved = f"after step {step}, which is saved" if step else "before the first step"
            raise Interrupted(asked, f"stopped {saved}")


def epoch_line(epochs: int, metrics: Mapping[str, float], left: str) -> str:
    """`Epoch 1/3: [████████░░░░░░░░░] 60% | Loss: 2.341 | LR: 3e-4 | ETA: 12m 30s`"""
    whole = min(math.ceil(metrics["epoch"]), epochs) or 1
    share = metrics["epoch"] - (whole - 1)
    bar = "█" * round(BAR * share) + "░" * (BAR - round(BAR * share))
    digits, exponent = f"{metrics['learning_rate']:.1e}".split("e")
    rate = f"{digits.removesuffix('.0')}e{int(exponent)}"
    line = f"Epoch {whole}/{epochs}: [{bar}] {share:.0%} | Loss: {metrics['loss']:.3f} | LR: {rate}"
    return f"{line} | ETA: {left}" if left else line
