"""Whether generated runs can start on this machine, asked before any of them is started. Nothing here imports torch."""

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from lacuna.config.files import read_layer
from lacuna.config.trainers import load_trainer_config
from lacuna.errors import ConfigError, Problem
from lacuna.experiment.base import load_own
from lacuna.experiment.checks import check_run
from lacuna.experiment.folder import summarise
from lacuna.experiment.generator import check_configs
from lacuna.runs.mapping import MAPPING, RunMapping, read_mapping


def problems_of(
    mapping: RunMapping, indices: Collection[int], torchtune_python: str | None, asks_torchtune: bool = True
) -> list[Problem]:
    """What keeps these runs of a mapping from starting, as seen from the directory that they start in.

    asks_torchtune: start its environment too, which takes seconds; when a run starts, it says the same by itself.
    """
    if not indices:
        return []
    runs = [mapping.run(index) for index in indices]
    configs = {run.id: read_layer(run.config).values for run in runs}
    head, folder = mapping.head, mapping.file.parent
    with contextlib.chdir(mapping.directory):
        if head["trainer"] != "torchtune":
            return [found for id, values in configs.items() for found in check_run(head["trainer"], id, values, 1)]
        first = read_layer(folder / f"{next(iter(configs))}.yaml")
        base = replace(load_own(first, head.get("recipe"), head["gpus"], torchtune_python), is_shipped=True)
        return check_configs(base, configs, [], folder, asks_torchtune)


def torchtune_problems(config: Path) -> list[Problem]:
    """What keeps the run of one torchtune config from starting in this directory; where `generate` wrote it, with the
    recipe of its mapping, otherwise with the one that it looks most like."""
    if (config.parent / MAPPING).is_file():
        mapping = read_mapping(config.parent)
        if config.stem in mapping.ids:
            return problems_of(mapping, [mapping.ids.index(config.stem)], None)
    base = load_own(read_layer(config), None, None, None)
    return check_configs(base, {config.stem: base.values}, [], config.parent)


def refusals(problems: Sequence[Problem]) -> list[str]:
    """A line for each thing that keeps runs from starting."""
    return summarise([problem for problem in problems if problem.stops_a_start])


def refuse(problems: Sequence[Problem], ids: Collection[str]) -> None:
    """Raises ConfigError with all that keeps one of these runs from starting."""
    if found := refusals([problem for problem in problems if problem.run in ids]):
        raise ConfigError([*found, "no run was started: mend these, or start the runs where they hold"])


def refuse_config(config: Path) -> None:
    """The same for one config of lacuna's own trainers."""
    values = load_trainer_config([str(config)]).written()
    refuse(list(check_run(values["trainer"], str(config), values, 1)), [str(config)])
