"""The shipped configs, and which of them fits a machine."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lacuna.config.files import read_layer
from lacuna.config.trainers import trainer_of
from lacuna.errors import ConfigError
from lacuna.machine.detect import GIB, Device

FOLDER = Path(__file__).parents[1] / "configs"
AUTO = "auto"
BY_DEVICE = {"cuda": ("training_config_h100.yaml", 17 * GIB), "mps": ("training_config_m4.yaml", 9 * GIB)}
"""Type of a device to its preset and the memory in which a step of it fits without flash-attn (docs/memory.md)."""


@dataclass(frozen=True)
class Preset:
    """purpose: the first line of the file."""

    file: str
    trainer: str
    purpose: str


@dataclass(frozen=True)
class Choice:
    """The preset that `--config auto` takes, None where none fits. reason: why, or why none."""

    file: str | None
    reason: str


def list_presets() -> list[Preset]:
    """Every shipped config, by name."""
    return [_preset(file) for file in sorted(FOLDER.iterdir()) if file.suffix in (".toml", ".yaml")]


def _preset(file: Path) -> Preset:
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    purpose = re.split(r":  |\.$", first.removeprefix("# "))[0]
    return Preset(_shown(file), str(trainer_of(read_layer(file).values)), purpose)


def choose_preset(devices: Sequence[Device]) -> Choice:
    """For the first device. devices: those of this machine that are no CPU."""
    if not devices:
        return Choice(None, f"there is no GPU here. {_instead()}")
    device, memory = devices[0], (devices[0].memory or 0) / GIB
    name, needed = BY_DEVICE[device.type]
    if not device.has_bf16:
        return Choice(None, f"{device.name} has no bf16, and the presets compute in it. {_instead()}")
    reason = f"{device.name} has {memory:.1f} GiB for it, and it takes {needed / GIB:.0f}"
    if memory * GIB >= needed:
        return Choice(_shown(FOLDER / name), reason)
    return Choice(None, f"{reason}. {_instead()}")


def _instead() -> str:
    small = _shown(FOLDER / "finetune.yaml")
    others = " or ".join(_shown(FOLDER / name) for name, _ in BY_DEVICE.values())
    return (
        f"Give a config of a small model (start from {small}), or one of the presets with a smaller model and "
        f"batch: --config {others} --set model.path=… (`lacuna presets` lists them, `lacuna doctor` the devices)"
    )


def replace_auto(files: Sequence[str], devices: Sequence[Device]) -> tuple[list[str], str]:
    """The files with the fitting preset in the place of `auto`, and a line that says which and why.

    Raises ConfigError where none fits.
    """
    choice = choose_preset(devices)
    if choice.file is None:
        raise ConfigError(f"--config {AUTO}: no preset fits this machine: {choice.reason}")
    chosen = choice.file
    return [chosen if file == AUTO else file for file in files], f"config: {chosen} ({choice.reason})"


def _shown(file: Path) -> str:
    """Relative where it lies below the working directory, as in a checkout."""
    place = file.resolve()
    return os.path.relpath(place) if place.is_relative_to(Path.cwd()) else str(place)
