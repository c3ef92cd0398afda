"""What a config needs of a machine, and whether that run could start here."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lacuna.config.finetune import FinetuneConfig
from lacuna.config.trainers import load_trainer_config
from lacuna.config.training import TrainingConfig
from lacuna.cost.shape import model_shape
from lacuna.errors import LacunaError, ModelError
from lacuna.preflight.check import Check

CONFIG = "config"
"""The name of the checks that are about the config."""


def needed_checks(config: TrainingConfig) -> set[str]:
    """Names of the checks that may not fail, nor be skipped."""
    names = {"Python", "torch", "bf16", "transformers", "accelerate", "output folder", CONFIG}
    if isinstance(config, FinetuneConfig):
        names |= {"peft", "trl", "datasets"} | ({"bitsandbytes"} if config.method == "qlora" else set())
    if config.compile is True:
        names.add("C compiler")
    return names | ({config.tracker} if config.tracker != "none" else set())


def start_problems(config: TrainingConfig, notes: list[str]) -> list[str]:
    """What would stop the run before it loads weights. notes: gets what is only to be said. Imports the trainer."""
    try:
        if isinstance(config, FinetuneConfig):
            _finetune_starts(config, notes)
        else:
            _loop_starts(config, notes)
    except LacunaError as error:
        return error.problems
    return []


def check_start(files: Sequence[str]) -> list[Check]:
    """Everything that the trainer checks before it loads weights. Imports the trainer."""
    notes: list[str] = []
    problems = start_problems(load_trainer_config(files), notes)
    checks = [Check(CONFIG, "warning", note.removeprefix("warning: ")) for note in notes]
    checks += [Check(CONFIG, "failed", problem, needed=True) for problem in problems]
    return [*checks, *([] if problems else [Check(CONFIG, "ok", "tokenizer, model, data, device and disk are there")])]


def _finetune_starts(config: FinetuneConfig, notes: list[str]) -> None:
    from lacuna.finetune.checks import check_before
    from lacuna.finetune.start import BYTES_PER_PARAMETER
    from lacuna.machine.detect import check_gpus
    from lacuna.train.distributed import World
    from lacuna.train.session import together

    alone = config.model_copy(update={"gpus": 1})
    found = together(
        lambda: check_before(alone, notes.append, World()),
        lambda: check_gpus(config.gpus, config.device) if config.gpus > 1 else None,
    )
    check_weights(config, notes)
    shape = model_shape(found[0][1].to_dict())
    _check_folder(config, shape.adapter_parameters(config.lora_r) if shape else 0, BYTES_PER_PARAMETER)


def _loop_starts(config: TrainingConfig, notes: list[str]) -> None:
    from lacuna.machine.detect import check_gpus, choose_device
    from lacuna.train.distributed import World
    from lacuna.train.session import together
    from lacuna.train.start import BYTES_PER_PARAMETER, check_before

    alone = config.model_copy(update={"gpus": 1, "sharding": "full"})
    found = together(
        lambda: check_before(alone, choose_device(config.device), notes.append, World()),
        lambda: check_gpus(config.gpus, config.device) if config.gpus > 1 else None,
    )
    check_weights(config, notes)
    shape = model_shape(found[0][1].to_dict())
    _check_folder(config, shape.parameters if shape else 0, BYTES_PER_PARAMETER)


def check_weights(config: TrainingConfig, notes: list[str]) -> None:
    """Raises ModelError where a folder has no safetensors, or where they would have to come from a hub out of reach."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    place: Any = config.model_name
    model = f"{config.spelled('model_name')} {place}"
    if config.initialise == "random":
        return
    if not Path(place).is_dir():
        try:
            place = snapshot_download(place, revision=config.model_revision, local_files_only=True)
        except (LocalEntryNotFoundError, ValueError):
            place = None
    if place is not None and any(Path(place).glob("*.safetensors")):
        return
    if place == config.model_name:
        raise ModelError(f"{model}: there are no safetensors in this folder")
    if os.environ.get("HF_HUB_OFFLINE"):
        raise ModelError(
            f"{model}: its weights were not downloaded before, and the hub is out of reach; where it can be reached: "
            f"hf download {config.model_name}"
        )
    notes.append(
        f"the weights of {config.model_name} will be downloaded when the run starts: hf download does it before"
    )


def _check_folder(config: TrainingConfig, parameters: int, bytes_each: int) -> None:
    from lacuna.preflight.storage import nearest_folder
    from lacuna.runs.folder import refuse_foreign_folder
    from lacuna.train.session import check_disk

    folder = Path(config.run_folder).expanduser()
    refuse_foreign_folder(folder, type(config))
    check_disk(config, nearest_folder(folder), parameters, bytes_each)
