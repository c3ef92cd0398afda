"""The step of a config, as the formulas take it: its model's shape, its adapter, its rows."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lacuna.config.finetune import FinetuneConfig
from lacuna.config.training import TrainingConfig
from lacuna.cost.advice import needs_checkpointing
from lacuna.cost.shape import PROJECTIONS, Adapter, ModelShape, Step, model_shape
from lacuna.machine.detect import Device


def read_shape(model: str, revision: str | None) -> ModelShape | str:
    """From a folder, the hub's cache or the hub; where that cannot be, a sentence why."""
    config = read_config(model, revision)
    return config if isinstance(config, str) else shape_of(model, config)


def shape_of(model: str, config: Mapping[str, Any]) -> ModelShape | str:
    """From the model's config.json; a sentence where the formula does not know its layers."""
    return model_shape(config) or f"{model}: its layers are of a kind that the formula does not know; --trace does"


def read_config(model: str, revision: str | None) -> dict[str, Any] | str:
    """The config.json of a folder, the hub's cache or the hub; where that cannot be, a sentence why."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    file = Path(model) / "config.json"
    if not file.parent.is_dir() and (model.startswith((".", "/")) or model.count("/") > 1):
        return f"{model}: no such folder"
    try:
        place = file if file.parent.is_dir() else Path(hf_hub_download(model, "config.json", revision=revision))
        config: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    except (LocalEntryNotFoundError, HfHubHTTPError):
        return f"{model}: its config.json is not in the hub's cache, and the hub does not give it"
    except (OSError, ValueError, HFValidationError) as error:
        return f"{model}: no config.json could be read: {error}"
    return config


def adapter_of(config: TrainingConfig) -> Adapter | None:
    """Of a finetune config; None for training of all weights."""
    if not isinstance(config, FinetuneConfig):
        return None
    targets = tuple(dict.fromkeys(target.split(".")[-1] for target in config.target_modules or PROJECTIONS))
    bits = config.quantization_bits if config.method == "qlora" else None
    return Adapter(config.lora_r, targets, config.lora_dropout > 0, bits, config.double_quantization)


def step_of(
    config: TrainingConfig, shape: ModelShape | None, device: Device, longest: int | None = None,
    attention: str | None = None, processes: int | None = None,
) -> Step:  # fmt: skip
    """The step of a config on a device, with activation checkpointing as it will be; on where the shape is not known.

    longest: tokens of the longest sample, where no row can be longer. attention: what `auto` came to, if that is known.
    processes: that share the weights, if not gpus.
    Torch's attention on a Mac is planned as one that keeps every score, for its backward pass has no other.
    # ref: https://github.com/pytorch/pytorch/issues/179294
    """
    adapter = adapter_of(config)
    bf16 = {"auto": device.type != "cpu" and device.has_bf16}.get(config.precision, config.precision == "bf16")
    attention = attention or ("sdpa" if config.attention == "auto" else config.attention)
    if attention == "flash_attention_2" and device.type != "cuda":
        attention = "sdpa"
    if device.type == "mps" and attention == "sdpa":
        attention = "eager"
    gpus = processes or config.gpus
    rows = config.rows_in_step(gpus)
    step = Step(
        rows=min(config.micro_batch_size, math.ceil(rows / gpus)),
        length=min(config.sequence_length, longest or config.sequence_length),
        bf16=bf16,
        checkpointing=config.activation_checkpointing is True,
        device=device.type,
        accumulates=rows > config.micro_batch_size * gpus,
        attention=attention,
        adapter=adapter,
        processes=gpus,
    )
    if config.activation_checkpointing != "auto" or device.memory is None:
        return step
    if shape is None or needs_checkpointing(shape, step, device.memory):
        return replace(step, checkpointing=True)
    return step
