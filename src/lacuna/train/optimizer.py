"""AdamW and the learning rate's cosine."""

import math

import torch
from torch import nn

from lacuna.config.training import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only, so not on biases and norms."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def warmup_steps(config: TrainingConfig, total_steps: int) -> int:
    """Steps of linear warmup, from whichever setting gives them."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return round((config.warmup_share or 0.0) * total_steps)


def learning_rate_at(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Learning rate of step 1 … total_steps: linear up to the peak at step warmup + 1, then a cosine.

    The cosine reaches its final share one step after the last, so that no step is taken at a rate of 0.
    """
    warmup = warmup_steps(config, total_steps)
    if step <= warmup:
        return config.learning_rate * step / (warmup + 1)
    progress = (step - 1 - warmup) / (total_steps - warmup)
    floor = config.final_learning_rate_share
    return config.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
