"""The config that an experiment starts from: a torchtune recipe's, an own torchtune file, or one of lacuna's."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lacuna.config.files import Layer, read_layer
from lacuna.config.trainers import NO_TRAINER, named_trainer, trainer_of
from lacuna.errors import ConfigError
from lacuna.experiment.schema import Experiment
from lacuna.torchtune.environment import (
    Environment,
    find_environment,
    find_recipe,
    for_devices,
    nearest_recipe,
    need_environment,
    paired_recipe,
    recipes,
)
from lacuna.words import did_you_mean


@dataclass(frozen=True)
class Base:
    """name: as the user wrote it, or as it was switched to. lines: of its settings. notes: to be said aloud.
    environment: where torchtune is; None where it is not, or not needed."""

    name: str
    trainer: str
    values: dict[str, Any]
    lines: dict[str, int]
    recipe: str | None
    environment: Environment | None
    is_shipped: bool
    gpus: int
    notes: tuple[str, ...]


def load_base(experiment: Experiment, layer: Layer, torchtune_python: str | None) -> Base:
    """Raises ConfigError: an unknown name, no such file, or a setting that does not belong to this kind of base."""
    if experiment.base_config is not None:
        where = f"{layer.where('base_config')}: "
        if experiment.recipe is not None:
            raise ConfigError(f"{layer.where('recipe')}: recipe goes with base_config_file; {where}has its own")
        return load_recipe(experiment.base_config, where, experiment.gpus, torchtune_python)
    file = _find_file(str(experiment.base_config_file), layer)
    base = load_own(read_layer(file), experiment.recipe, experiment.gpus, torchtune_python)
    for name in ("recipe", "gpus"):
        if base.trainer != "torchtune" and getattr(experiment, name) is not None:
            instead = ": its own gpus goes under controls" if name == "gpus" else ""
            raise ConfigError(f"{layer.where(name)}: {name} is for torchtune; {file} is for {base.trainer}{instead}")
    return base


def load_recipe(name: str, where: str, gpus: int | None, torchtune_python: str | None) -> Base:
    """A shipped config of torchtune, by its name."""
    environment = need_environment(torchtune_python)
    asked = find_recipe(environment, name, where)
    recipe = for_devices(environment, asked, gpus) if gpus is not None else asked
    notes = []
    if recipe.recipe != asked.recipe:
        kept = f"; no config of torchtune's for it has this name, so {name} stays" if recipe.config == name else ""
        notes.append(f"gpus: {gpus} takes {recipe.config} with the recipe {recipe.recipe}{kept}")
    elif recipe.distributed and gpus is None:
        notes.append(f"{name} is for several devices ({recipe.recipe}): say how many, as gpus: 2")
    layer = read_layer(recipe.file)
    return Base(
        recipe.config, "torchtune", layer.values, layer.lines, recipe.recipe, environment, True, gpus or 1, tuple(notes)
    )


def load_own(layer: Layer, recipe: str | None, gpus: int | None, torchtune_python: str | None) -> Base:
    """An own config: with a `trainer` key, or as TOML, it is lacuna's, otherwise torchtune's."""
    trainer = trainer_of(layer.values)
    if trainer is None and layer.name.endswith(".toml"):
        raise ConfigError(f"{layer.name}: {NO_TRAINER}")
    if trainer is not None:
        return Base(layer.name, named_trainer(layer), layer.values, layer.lines, None, None, False, 1, ())
    if not layer.values:
        raise ConfigError(f"{layer.name}: the config is empty")
    environment = find_environment(torchtune_python)
    notes = []
    if environment is None:
        notes.append("torchtune was not found, so its arguments go unchecked (make torchtune)")
        found = recipe
    elif recipe is None:
        nearest = nearest_recipe(environment, layer.values, gpus)
        found = nearest.recipe
        notes.append(
            f"{layer.name} looks most like {nearest.config}: taken as a config for {found}; `recipe:` says otherwise"
        )
    else:
        known = sorted({shipped.recipe for shipped in recipes(environment)})
        paired = paired_recipe(recipe, gpus) if gpus is not None else recipe
        found = recipe if gpus == 1 and paired not in known else paired
        if found not in known and not (found.endswith(".py") and Path(found).is_file()):
            raise ConfigError(
                f"recipe: torchtune has no {found!r}{did_you_mean(found, known)}; it has {', '.join(known)}"
            )
        if found != recipe:
            notes.append(f"gpus: {gpus} takes the recipe {found}")
    return Base(layer.name, "torchtune", layer.values, layer.lines, found, environment, False, gpus or 1, tuple(notes))


def _find_file(name: str, layer: Layer) -> Path:
    """From the working directory, as trainers read paths, else from the experiment file's folder."""
    beside = Path(layer.name).parent / name
    return beside if layer.lines and not os.path.exists(name) and os.path.exists(beside) else Path(name)
