"""What `lacuna plan` is given, as runs: configs of one run, an experiment, or the configs that `generate` wrote."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lacuna.config.files import Layer, check, read_layer
from lacuna.config.trainers import CONFIGS, load_trainer_config, trainer_of
from lacuna.config.training import TrainingConfig
from lacuna.errors import ConfigError
from lacuna.experiment.base import Base, load_own
from lacuna.experiment.design import design
from lacuna.runs.mapping import MAPPING, read_mapping

EXPERIMENT_KEYS = {"experiment_name", "base_config", "base_config_file"}


@dataclass(frozen=True)
class Runs:
    """configs: of our own trainers, by the run's name. recipes: torchtune's, each with its settings. base: torchtune's
    environment, recipe and devices. notes: to be said aloud."""

    name: str
    configs: dict[str, TrainingConfig] = field(default_factory=dict)
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    base: Base | None = None
    notes: tuple[str, ...] = ()


def read_runs(sources: Sequence[str], torchtune_python: str | None) -> Runs:
    """Raises ConfigError with every problem of the files."""
    if len(sources) == 1 and (Path(sources[0]).is_dir() or Path(sources[0]).name == MAPPING):
        return _generated(sources[0], torchtune_python)
    layers = [read_layer(source) for source in sources]
    if len(layers) == 1 and not EXPERIMENT_KEYS.isdisjoint(layers[0].values):
        return _designed(sources[0], torchtune_python)
    is_torchtune = all(trainer_of(layer.values) is None and not layer.name.endswith(".toml") for layer in layers)
    if not is_torchtune:
        return Runs(sources[-1], {sources[-1]: load_trainer_config(sources)})
    if len(layers) > 1:
        raise ConfigError(f"{', '.join(sources)}: torchtune's configs are planned one at a time, or as an experiment")
    base = load_own(layers[0], None, None, torchtune_python)
    return Runs(sources[0], recipes={sources[0]: base.values}, base=base, notes=base.notes)


def _designed(source: str, torchtune_python: str | None) -> Runs:
    planned = design(source, torchtune_python)
    values = {run.id: run.values for run in planned.runs}
    notes = tuple(planned.notes)
    name = planned.experiment.experiment_name
    if planned.base.trainer == "torchtune":
        return Runs(name, recipes=values, base=planned.base, notes=notes)
    return Runs(name, _checked(planned.base.trainer, values), notes=notes)


def _generated(folder: str, torchtune_python: str | None) -> Runs:
    mapping = read_mapping(folder)
    head = mapping.head
    layers = {id: read_layer(mapping.file.parent / f"{id}.yaml") for id in mapping.ids}
    name = str(head["experiment"]["experiment_name"])
    if head["trainer"] != "torchtune":
        return Runs(name, _checked(head["trainer"], {id: layer.values for id, layer in layers.items()}))
    first: Layer = next(iter(layers.values()))
    base = load_own(first, head.get("recipe"), head.get("gpus"), torchtune_python)
    return Runs(name, recipes={id: layer.values for id, layer in layers.items()}, base=base, notes=base.notes)


def _checked(trainer: str, values: Mapping[str, dict[str, Any]]) -> dict[str, TrainingConfig]:
    return {id: check(CONFIGS[trainer], settings, {}) for id, settings in values.items()}
