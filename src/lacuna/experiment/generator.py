"""experiment.yaml → a complete config for each run, and run_mapping.yaml. Nothing is written before all is right."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lacuna.config.trees import Values
from lacuna.config.yaml_format import dump_yaml
from lacuna.errors import ConfigError, Problem
from lacuna.experiment import folder
from lacuna.experiment.base import Base
from lacuna.experiment.checks import check_run
from lacuna.experiment.design import Design, DesignedRun, design
from lacuna.files import digest, without_home
from lacuna.runs.mapping import MAPPING, seal
from lacuna.torchtune import environment as torchtune
from lacuna.torchtune.recipe import check_recipe


@dataclass(frozen=True)
class Generated:
    """What `generate` wrote, and what it has to say. command: starts the first run. mapping: run_mapping.yaml's.

    warnings: what keeps runs from starting here, or from starting at all.
    """

    output: str
    base: str
    command: list[str]
    runs: list[DesignedRun]
    notes: list[str]
    warnings: list[Problem]
    mapping: dict[str, Any] = field(repr=False)


def generate(
    experiment: str | Path | Mapping[str, Any],
    output: str | Path = "configs",
    *,
    force: bool = False,
    validate: bool = True,
    strict: bool = False,
    torchtune_python: str | None = None,
) -> Generated:
    """Write a config for each run of an experiment into a folder.

    experiment: a file, or the same as a mapping.
    force: replace the configs of another experiment there. validate: run the trainer's checks on every config.
    strict: what keeps a run from starting on this machine is an error; otherwise configs for another one are written,
    with warnings, which stand in validation_report.txt beside them too.

    Raises ConfigError with every problem found; the folder is then as it was.
    """
    output = Path(output)
    planned = design(experiment, torchtune_python)
    texts = {f"{run.id}.yaml": dump_yaml(run.values) for run in planned.runs}
    mapping = _mapping(planned, texts, output)
    notes = [*planned.notes, *_existing(planned)]
    with folder.staged(output, {**texts, MAPPING: seal(dump_yaml(mapping))}, force) as stage:
        configs = {run.id: run.values for run in planned.runs}
        problems = check_configs(planned.base, configs, planned.touched, stage) if validate else []
        stopping = [problem for problem in problems if problem.kind == "wrong" or (strict and problem.stops_a_start)]
        if stopping:
            raise ConfigError(
                [*folder.write_report(output, stopping), *(f"(note: {note})" for note in planned.base.notes)]
            )
    folder.remove_report(output)
    warnings = [problem for problem in problems if problem.stops_a_start]
    notes += folder.put_warnings(output, warnings)
    notes += folder.summarise([problem for problem in problems if not problem.stops_a_start])
    if not validate:
        notes.append("the configs were not validated (--no-validate)")
    first = str(output / f"{planned.runs[0].id}.yaml")
    return Generated(str(output), planned.base.name, _command(planned, first), planned.runs, notes, warnings, mapping)


def _existing(planned: Design) -> list[str]:
    """torchtune writes over what is in a run's folder, unless it was a run of `lacuna start`; our trainers do not."""
    folders = [Path(run.output_dir) for run in planned.runs if run.output_dir is not None]
    full = [str(f) for f in folders if f.is_dir() and any(f.iterdir()) and not (f / "status.json").exists()]
    if not full or planned.base.trainer != "torchtune":
        return []
    return [f"{len(full)} of the run folders hold something already ({full[0]} …): a run would write over it"]


def _command(planned: Design, config: str) -> list[str]:
    base = planned.base
    if base.trainer == "torchtune":
        return torchtune.command(base.environment, base.recipe, base.gpus, config)
    return [base.trainer, "--config" if base.trainer == "finetune" else "@", config]


def check_configs(
    base: Base, configs: Mapping[str, Values], touched: Sequence[str], stage: Path, asks_torchtune: bool = True
) -> list[Problem]:
    """Every problem of every config: ours first, then what torchtune's environment finds in the files of the stage.

    configs: by run id. touched: the paths that the user set. asks_torchtune: costs seconds for its imports.
    """
    problems = [found for id, values in configs.items() for found in check_run(base.trainer, id, values, base.gpus)]
    if base.environment is None or base.recipe is None:
        return problems
    facts = torchtune.facts_of(base.environment, base.recipe)
    for id, values in configs.items():
        problems += [replace(found, run=id) for found in check_recipe(facts, values, touched, base.is_shipped)]
    if not asks_torchtune:
        return problems
    requests = [{"id": id, "file": str(stage / f"{id}.yaml"), "touched": list(touched)} for id in configs]
    theirs = torchtune.validate(base.environment, requests)
    return _gravest(problems, theirs)


def _gravest(ours: Sequence[Problem], theirs: Sequence[Problem]) -> list[Problem]:
    """Both, but of one setting that both found only the graver finding; of two alike, ours."""
    gravity = {kind: place for place, kind in enumerate(("unsure", "here", "start", "wrong"))}

    def graver(problems: Sequence[Problem], others: Sequence[Problem], at_least: int) -> list[Problem]:
        most: dict[tuple[str, str], int] = {}
        for other in others:
            place = (other.run, other.path)
            most[place] = max(most.get(place, -1), gravity[other.kind])
        return [found for found in problems if gravity[found.kind] >= most.get((found.run, found.path), -1) + at_least]

    return [*graver(ours, theirs, 0), *graver(theirs, ours, 1)]


def _mapping(planned: Design, texts: Mapping[str, str], output: Path) -> dict[str, Any]:
    """directory: the working directory, from the output where it lies above that: both may be moved together."""
    here, inside = Path.cwd(), output.resolve()
    experiment, base = planned.experiment, planned.base
    written = {name: value for name, value in experiment.model_dump().items() if value not in (None, [], {})}
    if experiment.slurm is not None:
        written["slurm"] = experiment.slurm.model_dump(exclude_unset=True)
    return {
        "experiment": written,
        "trainer": base.trainer,
        "base": base.name,
        "directory": os.path.relpath(here, inside) if inside.is_relative_to(here) else without_home(str(here)),
        **({"recipe": base.recipe, "gpus": base.gpus} if base.trainer == "torchtune" else {}),
        "runs": [
            {
                "id": run.id,
                "params": run.settings,
                "seed": run.seed,
                "config": f"{run.id}.yaml",
                "sha256": digest(texts[f"{run.id}.yaml"].encode()),
                "output_dir": run.output_dir,
            }
            for run in planned.runs
        ],
    }
