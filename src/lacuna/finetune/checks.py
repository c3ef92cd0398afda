"""What is known before anything is trained: what would stop the run, and what a step takes."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lacuna.config.finetune import BATCH, IN_SFT, FinetuneConfig
from lacuna.config.training import SFTConfig
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


@contextmanager
def own_words() -> Iterator[None]:
    """Errors of what is shared with our own loop come out with this config's names."""
    try:
        yield
    except LacunaError as error:
        error.problems = [in_own_words(problem) for problem in error.problems]
        error.args = ("\n".join(error.problems),)
        raise


def in_own_words(text: str) -> str:
    """A message of what is shared with our own loop, with its settings under the names of this config."""
    batch = "training.batch_size or training.gradient_accumulation_steps"
    flags = {f"--{name.replace('_', '-')}": path for name, path in IN_SFT.items() if name != "device"}
    flags["--batch-size"] = batch
    words = {name: path for name, path in IN_SFT.items() if "_" in name} | {"batch_size": BATCH}
    for names in (flags, words):
        known = "|".join(sorted(names, key=len, reverse=True))
        found = re.compile(rf"(?<![\w./=-])({known})(?![\w/=-]|\.\w)")
        text = "".join(names.get(part, part) for part in found.split(text))
    return text


def check_before(config: FinetuneConfig, flat: SFTConfig, report: Report, world: World) -> tuple[Any, Any, Execution]:
    """What costs seconds, all of it together: settings as this machine can run them, tokenizer, model config, device.

    Raises ConfigError with everything that is wrong.
    """
    device = device_or_cpu(flat, report)
    tokenizer, model_config, execution = together(
        lambda: _tokenizer(config, flat, report),
        lambda: _model_config(config, flat),
        lambda: resolve_execution(flat, device, report),
        lambda: check_world(flat, world, device.type),
        lambda: check_data_settings(flat),
        lambda: check_tracker(flat, report) if world.is_first else None,
        lambda: check_quantisation(config, device),
        lambda: check_resume_path(flat),
        lambda: check_weights(flat),
    )[:3]
    check_vocabulary(flat, model_config, len(tokenizer))
    return tokenizer, model_config, execution


def _tokenizer(config: FinetuneConfig, flat: SFTConfig, report: Report) -> Any:
    """Of base_model; where the hub has it but is out of reach, the model's own if it has one, and that is said."""
    origin = config.model.base_model
    if origin is None:
        return load_tokenizer(flat)
    try:
        return load_tokenizer(flat.model_copy(update={"model_name": origin, "model_revision": None}))
    except LacunaError as error:
        problems = [text.replace("model_name ", "model.base_model ") for text in error.problems]
        if "out of reach" not in problems[0] or not (Path(flat.model_name) / "tokenizer_config.json").is_file():
            raise ConfigError(problems) from error
    report(f"warning: {problems[0]}; taking the tokenizer of model.path")
    return load_tokenizer(flat)


def _model_config(config: FinetuneConfig, flat: SFTConfig) -> Any:
    """The model's config.json, once the names of target_modules are found in a model of that shape without weights."""
    model_config = load_model_config(flat)
    if config.training.target_modules is not None:
        with torch.device("meta"):
            target_modules(
                AutoModelForCausalLM.from_config(model_config, trust_remote_code=False), config.training.target_modules
            )
    return model_config


def device_or_cpu(flat: SFTConfig, report: Report) -> Device:
    try:
        return choose_device(flat.device)
    except ConfigError as error:
        report(f"warning: {error}; going on with the CPU, which is much slower")
        return choose_device("cpu")
