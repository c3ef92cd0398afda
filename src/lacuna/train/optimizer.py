"""AdamW and the learning rate's cosine."""

import math
from typing import Any

import torch
from torch import nn

from lacuna.config.training import WARMUP_SHARE, TrainingConfig
from lacuna.errors import ConfigError


def decay_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Weight decay on matrices only, so not on biases and norms."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW."""
    groups = decay_groups(model, config)
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def count_steps(config: TrainingConfig, rows: int, devices: int | None = None) -> int:
    """Optimizer steps of a run over so many rows; a last batch of all epochs may be short. devices: if not gpus."""
    return config.steps or math.ceil((config.epochs or 1) * rows / config.rows_in_step(devices))


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    """Steps of linear warmup, from whichever setting gives them."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    share = WARMUP_SHARE if config.warmup_share is None else config.warmup_share
    return round(share * total_steps)


def check_warmup(config: TrainingConfig, total_steps: int) -> None:
    """Raise ConfigError where the run ends before its warmup."""
    if warmup_steps(config, total_steps) >= total_steps:
        given = "warmup_share" if config.warmup_steps is None else "warmup_steps"
        raise ConfigError(
            f"warmup takes {warmup_steps(config, total_steps)} of {total_steps} steps, so the learning rate would "
            f"never reach its peak: lower {config.flag(given)}"
        )


def learning_rate_at(step: int, total_steps: int, config: TrainingConfig, schedule: str = "cosine") -> float:
    """Learning rate of step 1 … total_steps: linear up to the peak at step warmup + 1, then the schedule.

    Cosine and linear reach their final share one step after the last, so that no step is taken at a rate of 0.
    """
    warmup = warmup_steps(config, total_steps)
    if step <= warmup:
        return config.learning_rate * step / (warmup + 1)
    progress = (step - 1 - warmup) / (total_steps - warmup)
    floor = config.final_learning_rate_share
    height = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[schedule]
    return config.learning_rate * (floor + (1 - floor) * height)
