"""The runs of a mapping that `lacuna run` was asked for, and which of them are done. Nothing here imports torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lacuna.config.trainers import load_trainer_config
from lacuna.errors import ConfigError, LacunaError, RunError
from lacuna.launch.start import digest_of
from lacuna.runs.final import damage_of_final
from lacuna.runs.folder import read_status, refuse_foreign_folder, starts_of
from lacuna.runs.identity import changed_inputs
from lacuna.runs.mapping import RunMapping
from lacuna.runs.same import difference, has_run
from lacuna.words import did_you_mean, shown

MEND = "move that folder away, or give the experiment another output_dir"


@dataclass(frozen=True)
class Planned:
    """A run of a mapping. params: what varies; varies: the same, as `learning_rate=0.001`. config: its file."""

    index: int
    id: str
    varies: str
    seed: int | None
    folder: Path
    config: Path
    trainer: str
    params: Mapping[str, Any]


def choose(mapping: RunMapping, only: Iterable[str]) -> list[int]:
    """Indices of the runs with these ids, in the mapping's order; of all where there are none. Raises ConfigError."""
    ids = [id for id, _ in mapping.places]
    wanted = [name.strip() for word in only for name in word.split(",")]
    known = set(ids)
    if unknown := [name for name in dict.fromkeys(wanted) if name not in known]:
        raise ConfigError(
            [f"--only {name}: {mapping.file} has no such run{did_you_mean(name, ids)}" for name in unknown]
        )
    return [index for index, id in enumerate(ids) if not wanted or id in wanted]


def plan(mapping: RunMapping, indices: Iterable[int]) -> tuple[list[Planned], list[Planned]]:
    """The runs to start, and those that are finished.

    Raises ConfigError with every run that cannot be: its config was changed, or its folder holds something else.
    """
    missing: list[Planned] = []
    finished: list[Planned] = []
    problems = []
    for index in indices:
        try:
            run = _planned(mapping, index)
            (finished if is_finished(run) else missing).append(run)
        except LacunaError as error:
            problems += [f"{mapping.places[index][0]}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return missing, finished


def with_other_inputs(mapping: RunMapping, finished: Iterable[Planned]) -> list[tuple[Planned, list[str]]]:
    """The finished runs whose files hold something else now than when they were made, and which files these are."""
    found = [(run, changed_inputs((starts_of(run.folder) or [{}])[-1], mapping.directory)) for run in finished]
    return [(run, changed) for run, changed in found if changed]


def _planned(mapping: RunMapping, index: int) -> Planned:
    entry = mapping.entry(index)
    config = mapping.file.with_name(entry["config"])
    if digest_of(config) != entry["sha256"]:
        raise ConfigError(f"{config}: was changed since it was generated: generate it again")
    if (folder := mapping.folder(index)) is None:
        raise ConfigError("it has no output_dir, by which it could be known again: give the experiment one")
    varies = ", ".join(f"{name}={shown(value)}" for name, value in entry["params"].items())
    return Planned(index, entry["id"], varies, entry["seed"], folder, config, mapping.head["trainer"], entry["params"])


def is_finished(run: Planned) -> bool:
    """Whether just this run is finished. Raises RunError where its folder holds something else."""
    refuse_foreign_folder(run.folder)
    says_so = (read_status(run.folder) or {}).get("state") == "finished"
    if run.trainer == "torchtune":
        recorded = run.folder / "config.yaml"
        has_trained = says_so or (run.folder / "metrics.jsonl").exists() or any(run.folder.glob("epoch_*"))
        is_other = has_trained and recorded.exists() and recorded.read_bytes() != run.config.read_bytes()
        if is_other or (run.folder / "config.toml").exists():
            raise RunError(f"the run in {run.folder} has another config (see there): {MEND}")
        return says_so
    if not has_run(run.folder):
        return False
    config = load_trainer_config([str(run.config)])
    if (other := difference(run.folder, config, config.gpus, run.params)) is not None:
        raise RunError(f"{other}: {MEND}")
    return says_so and (run.folder / "final").is_dir() and damage_of_final(run.folder) is None
