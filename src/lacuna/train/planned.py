"""The plan of a run, where it is made: the memory of a step on this device, before it and after it."""

from typing import Any

import torch

from lacuna.config.finetune import FinetuneConfig
from lacuna.config.training import TrainingConfig
from lacuna.cost.advice import FINETUNE, LOOP, USABLE, describe, savings
from lacuna.cost.memory import step_memory
from lacuna.cost.shape import Step, model_shape
from lacuna.cost.step import read_shape, step_of
from lacuna.errors import LacunaError
from lacuna.machine.detect import Device, choose_device
from lacuna.train.model import Execution
from lacuna.words import GIB


def planned_step(
    config: TrainingConfig, model_config: Any, execution: Execution, processes: int, longest: int
) -> tuple[Step, dict[str, float]]:
    """The step, with activation checkpointing settled, and the bytes that it takes; none for a model of another kind.

    processes: that share the weights. longest: tokens of the longest sample.
    """
    shape = model_shape(model_config.to_dict())
    longest_row = None if config.packs_rows else longest
    step = step_of(config, shape, execution.device, longest_row, execution.attention, processes)
    return step, step_memory(shape, step) if shape is not None else {}


def memory_line(predicted: dict[str, float], device: Device) -> str | None:
    """What a step is planned to take on an accelerator; and that it is more than there is, if so."""
    if not predicted or device.memory is None:
        return None
    more = "" if sum(predicted.values()) <= USABLE * device.memory else (
        f", of {device.memory / GIB:.1f} GiB: warning: it will probably not fit; `lacuna plan` says what would"
    )  # fmt: skip
    return f"memory of a step: {describe(predicted)}{more}"


def predicted_and_measured(predicted: dict[str, float], execution: Execution) -> str | None:
    """A line for the end of a run on CUDA: what the plan said of tensors, and what there was at most."""
    if execution.device.type != "cuda" or not predicted:
        return None
    expected = sum(size for name, size in predicted.items() if name != "framework") / GIB
    tensors = torch.cuda.max_memory_allocated() / GIB
    held = torch.cuda.max_memory_reserved() / GIB
    return f"peak memory of tensors: {expected:.2f} GiB predicted, {tensors:.2f} measured ({held:.2f} held by torch)"


def after_out_of_memory(config: TrainingConfig) -> str:
    """What the step was planned at, and what each smaller setting would take."""
    is_adapter = isinstance(config, FinetuneConfig)
    names = FINETUNE if is_adapter else LOOP
    try:
        shape = read_shape(config.model_name, config.model_revision)
        device = choose_device(config.device)
    except LacunaError:
        return f"out of memory: lower {names.rows} ({names.same_batch}), or set {names.checkpointing}"
    if isinstance(shape, str):
        return f"out of memory: lower {names.rows} ({names.same_batch}), or set {names.checkpointing}"
    step = step_of(config, shape, device)
    return (
        f"out of memory: a step takes {describe(step_memory(shape, step))}. What a step would take with "
        f"{savings(shape, step, names)}"
    )
