"""TRL's trainer over steps that are laid out already, with everything off that this package does itself."""

import contextlib
import warnings
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from trl.trainer.sft_config import SFTConfig as TrlConfig
from trl.trainer.sft_trainer import SFTTrainer

from lacuna.config.finetune import FinetuneConfig
from lacuna.finetune.adapters import AdapterModel, to_fp32
from lacuna.finetune.steps import Layout, Step, Steps
from lacuna.train.checkpoint import TrainingState
from lacuna.train.loop import Prepared, to_device
from lacuna.train.model import Execution
from lacuna.train.optimizer import decay_groups, learning_rate_at, make_optimizer


class AdapterTrainer(SFTTrainer):
    """SFTTrainer over steps that are laid out already."""

    def __init__(self, steps: Steps, execution: Execution, **arguments: Any) -> None:
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
        scale = self.steps.prepared.world.size / max(step.batch.targets, 1)
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
    config: FinetuneConfig, prepared: Prepared, model: AdapterModel, state: TrainingState,
    optimizer: torch.optim.Optimizer, checkpointing: bool,
) -> AdapterTrainer:  # fmt: skip
    """TRL's trainer with everything off that this package does itself.

    TRL looks at one sample of a data set when it starts; the others reach it by get_train_dataloader.
    """
    execution = prepared.execution
    layout = Layout(config.micro_batch_size, config.packing, prepared.padding, execution.flatten_rows)
    schedule = config.scheduler
    arguments = TrlConfig(
        output_dir=str(prepared.folder),
        max_steps=prepared.total_steps,
        per_device_train_batch_size=1,
        gradient_checkpointing=checkpointing,
        seed=config.seed,
        bf16=False,
        max_grad_norm=0,
        use_cpu=execution.device.type == "cpu",
        ddp_find_unused_parameters=False,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    steps = Steps(config, prepared, layout, state.position or None)
    assert prepared.train_rows is not None
    sample = prepared.train_rows.row(0)[0]
    looked_at = {"input_ids": sample.tokens, "labels": np.where(sample.supervised, sample.tokens, -100)}
    before = {name: parameter.data.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}

    def share_of_peak(done: int) -> float:
        return learning_rate_at(state.step + done + 1, prepared.total_steps, config, schedule) / config.learning_rate

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


def make_adapter_optimizer(config: FinetuneConfig, model: AdapterModel, device: str) -> torch.optim.Optimizer:
    if optimizer_name(config, device) == "adamw":
        return make_optimizer(model, config)
    from bitsandbytes.optim.adamw import PagedAdamW32bit

    betas = (config.adam_beta1, config.adam_beta2)
    groups = decay_groups(model, config)
    optimizer: torch.optim.Optimizer = PagedAdamW32bit(groups, lr=config.learning_rate, betas=betas)
    return optimizer


def optimizer_name(config: FinetuneConfig, device: str) -> str:
    """Paged optimizers move between the GPU's memory and the host's: there are none without CUDA."""
    wanted = config.optimizer
    if wanted == "auto":
        wanted = "paged_adamw_32bit" if config.method == "qlora" else "adamw"
    return wanted if device == "cuda" else "adamw"
