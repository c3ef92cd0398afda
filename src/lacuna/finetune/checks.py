"""What is known before anything is trained: what would stop the run, and what a step takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lacuna.config.finetune import FinetuneConfig
from lacuna.data.loader import check_data_settings
from lacuna.errors import ConfigError, LacunaError
from lacuna.finetune.adapters import check_quantisation, target_modules
from lacuna.machine.detect import Device, choose_device
from lacuna.train.distributed import World, check_world
from lacuna.train.loading import load_model_config, load_tokenizer
from lacuna.train.model import (
    Execution,
    resolve_execution,
)
from lacuna.train.session import check_resume_path, together
from lacuna.train.trackers import check_tracker
from lacuna.train.weights import check_vocabulary, check_weights

Report = Callable[[str], None]


def check_before(config: FinetuneConfig, report: Report, world: World) -> tuple[Any, Any, Execution]:
    """What costs seconds, all of it together: settings as this machine can run them, tokenizer, model config, device.

    Raises ConfigError with everything that is wrong.
    """
    device = device_or_cpu(config, report)
    tokenizer, model_config, execution = together(
        lambda: _tokenizer(config, report),
        lambda: _model_config(config),
        lambda: resolve_execution(config, device, report),
        lambda: check_world(config, world, device.type),
        lambda: check_data_settings(config),
        lambda: check_tracker(config, report) if world.is_first else None,
        lambda: check_quantisation(config, device),
        lambda: check_resume_path(config),
        lambda: check_weights(config),
    )[:3]
    check_vocabulary(config, model_config, len(tokenizer))
    return tokenizer, model_config, execution


def _tokenizer(config: FinetuneConfig, report: Report) -> Any:
    """Of base_model; where the hub has it but is out of reach, the model's own if it has one, and that is said."""
    origin = config.base_model
    if origin is None:
        return load_tokenizer(config)
    try:
        return load_tokenizer(config.model_copy(update={"model_name": origin, "model_revision": None}))
    except LacunaError as error:
        problems = [text.replace("model.path ", "model.base_model ") for text in error.problems]
        if "out of reach" not in problems[0] or not (Path(config.model_name) / "tokenizer_config.json").is_file():
            raise ConfigError(problems) from error
    report(f"warning: {problems[0]}; taking the tokenizer of model.path")
    return load_tokenizer(config)


def _model_config(config: FinetuneConfig) -> Any:
    """The model's config.json, once the names of target_modules are found in a model of that shape without weights."""
    model_config = load_model_config(config)
    if config.target_modules is not None:
        with torch.device("meta"):
            target_modules(
                AutoModelForCausalLM.from_config(model_config, trust_remote_code=False), config.target_modules
            )
    return model_config


def device_or_cpu(config: FinetuneConfig, report: Report) -> Device:
    try:
        return choose_device(config.device)
    except ConfigError as error:
        report(f"warning: {error}; going on with the CPU, which is much slower")
        return choose_device("cpu")
