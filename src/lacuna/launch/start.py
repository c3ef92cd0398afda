"""What a job runs: an entry of the run mapping, or one config, becomes its trainer's command."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lacuna.config.files import read_layer
from lacuna.config.trainers import CONFIGS, trainer_of
from lacuna.errors import ConfigError
from lacuna.files import digest
from lacuna.launch.nodes import rendezvous, torchrun
from lacuna.preflight.ready import problems_of, refusals
from lacuna.processes import run_torchrun
from lacuna.runs.mapping import MAPPING, read_mapping
from lacuna.torchtune import environment as torchtune
from lacuna.torchtune.run import run_torchtune
from lacuna.words import did_you_mean


@dataclass(frozen=True)
class Launch:
    """What to start: a run of a mapping, or one config. gpus: processes on a node. recipe, output_dir: torchtune's."""

    trainer: str
    config: Path
    gpus: int
    recipe: str | None = None
    output_dir: str | None = None


def start(target: str, index: int | None, sha256: str | None, torchtune_python: str | None) -> int:
    """Become the command of a run; where something is to be done after it, run it, and return its exit code.

    target: a run mapping and an index in it, or a config alone. sha256: what the target must have.
    Raises ConfigError where a file is not the one that was generated or submitted, or where torchtune could not start.
    """
    launch = find_launch(target, index, sha256)
    words = command(launch, os.environ, torchtune_python)
    if launch.trainer == "torchtune":
        problems = refusals(problems_of(read_mapping(target), [index or 0], torchtune_python, asks_torchtune=False))
        return run_torchtune(words, launch.config, launch.gpus * nodes(os.environ), launch.output_dir, problems)
    if nodes(os.environ) > 1:
        return run_torchrun(words)
    os.execv(words[0], words)


def find_launch(target: str, index: int | None, sha256: str | None) -> Launch:
    """Raises ConfigError: no such run, a file that was changed, or a config of no trainer."""
    if Path(target).name == MAPPING or Path(target).is_dir():
        if index is None:
            raise ConfigError(f"{target}: which run of it? lacuna start {target} 0")
        mapping = read_mapping(target)
        _refuse_change(mapping.file, mapping.sha256, sha256)
        run, head = mapping.run(index), mapping.head
        _refuse_change(run.config, digest_of(run.config), run.sha256)
        if run.trainer == "torchtune":
            return Launch(run.trainer, run.config, head["gpus"], head.get("recipe"), run.output_dir)
        return Launch(run.trainer, run.config, processes_of(run.config))
    config = Path(target).absolute()
    if index is not None:
        raise ConfigError(f"{target} is one config, and has no run {index}")
    trainer = config_trainer(config)
    _refuse_change(config, digest_of(config), sha256)
    return Launch(trainer, config, processes_of(config))


def config_trainer(config: Path) -> str:
    """The trainer that a config names. Raises ConfigError where that is none of lacuna's."""
    layer = read_layer(config)
    trainer = trainer_of(layer.values)
    if trainer not in CONFIGS:
        hint = did_you_mean(str(trainer), [*CONFIGS]) if trainer is not None else ""
        raise ConfigError(
            f"{layer.where('trainer')}: a config of lacuna's has trainer = {', '.join(map(repr, CONFIGS))}, not "
            f"{trainer!r}{hint}; an experiment has experiment_name"
        )
    return str(trainer)


def processes_of(config: Path) -> int:
    """The processes that a config of lacuna's asks for, on each node."""
    gpus = read_layer(config).values.get("gpus", 1)
    return gpus if isinstance(gpus, int) else 1


def digest_of(file: Path) -> str:
    """Raises ConfigError where the file cannot be read."""
    try:
        return digest(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None


def _refuse_change(file: Path, found: str, wanted: str | None) -> None:
    if wanted is not None and found != wanted:
        raise ConfigError(f"{file}: was changed since it was generated or submitted: do that again")


def nodes(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_NNODES", 1))


def command(launch: Launch, environment: Mapping[str, str], torchtune_python: str | None) -> list[str]:
    """What starts the run; where SLURM gave several nodes, the torchrun of this one."""
    if launch.trainer == "torchtune":
        found = torchtune.need_environment(torchtune_python)
        tune, run, *rest = torchtune.command(found, launch.recipe, launch.gpus, str(launch.config))
        flags = rendezvous(launch.gpus, environment) if nodes(environment) > 1 else []
        return [tune, run, *flags, *rest]
    words = [launch.trainer, "--config" if launch.trainer == "finetune" else "@", str(launch.config)]
    if nodes(environment) > 1:
        return torchrun(words, launch.gpus, environment)
    return [sys.executable, "-m", "lacuna", *words]
