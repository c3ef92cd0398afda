"""experiment.yaml → a complete config for each run, and run_mapping.yaml. Nothing is written before all is right."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lacuna.config.yaml_format import dump_yaml
from lacuna.errors import ConfigError
from lacuna.experiment import folder, torchtune
from lacuna.experiment.checks import Problem, check_run
from lacuna.experiment.design import Design, Run, design


@dataclass(frozen=True)
class Generated:
    """What `generate` wrote, and what it has to say. command: starts the first run. mapping: run_mapping.yaml's."""

    output: str
    base: str
    command: list[str]
    runs: list[Run]
    notes: list[str]
    mapping: dict[str, Any] = field(repr=False)


def generate(
    experiment: str | Path | Mapping[str, Any],
    output: str | Path = "configs",
    *,
    force: bool = False,
    validate: bool = True,
    check_paths: bool = True,
    torchtune_python: str | None = None,
) -> Generated:
    """Write a config for each run of an experiment into a folder.

    experiment: a file, or the same as a mapping.
    force: replace the configs of another experiment there. validate: run the trainer's checks on every config.
    check_paths: missing files are errors; otherwise they are notes, for runs on another machine.

    Raises ConfigError with every problem found; the folder is then as it was.
    """
    output = Path(output)
    planned = design(experiment, torchtune_python)
    texts = {f"{run.id}.yaml": dump_yaml(run.values) for run in planned.runs}
    mapping = _mapping(planned, texts)
    notes = list(planned.notes)
    with folder.staged(output, {**texts, folder.MAPPING: folder.seal(dump_yaml(mapping))}, force) as stage:
        problems = check_design(planned, stage) if validate else []
        forgiven = [problem for problem in problems if problem.is_local and not check_paths]
        if errors := [problem for problem in problems if problem not in forgiven]:
            raise ConfigError(
                [*folder.write_report(output, errors), *(f"(note: {note})" for note in planned.base.notes)]
            )
    folder.remove_report(output)
    notes += folder.summarise(forgiven)
    if not validate:
        notes.append("the configs were not validated (--no-validate)")
    first = str(output / f"{planned.runs[0].id}.yaml")
    return Generated(str(output), planned.base.name, _command(planned, first), planned.runs, notes, mapping)


def _command(planned: Design, config: str) -> list[str]:
    base = planned.base
    if base.trainer == "torchtune":
        return torchtune.command(base.environment, base.recipe, base.gpus, config)
    return [base.trainer, "@", config]


def check_design(planned: Design, stage: Path) -> list[Problem]:
    """Every problem of every run: ours first, then what torchtune's environment finds in the files of the stage."""
    base = planned.base
    problems = [found for run in planned.runs for found in check_run(base.trainer, run.id, run.values, base.gpus)]
    if base.environment is not None:
        requests = [
            {"id": run.id, "file": str(stage / f"{run.id}.yaml"), "recipe": base.recipe, "touched": planned.touched}
            for run in planned.runs
        ]
        known = {(problem.run, problem.path) for problem in problems}
        theirs = torchtune.validate(base.environment, requests, base.is_shipped)
        problems += [problem for problem in theirs if (problem.run, problem.path) not in known]
    return problems


def _mapping(planned: Design, texts: Mapping[str, str]) -> dict[str, Any]:
    experiment, base = planned.experiment, planned.base
    written = {name: value for name, value in experiment.model_dump().items() if value not in (None, [], {})}
    return {
        "experiment": written,
        "trainer": base.trainer,
        "base": base.name,
        **({"recipe": base.recipe, "gpus": base.gpus} if base.trainer == "torchtune" else {}),
        "runs": [
            {
                "id": run.id,
                "params": run.settings,
                "seed": run.seed,
                "config": f"{run.id}.yaml",
                "sha256": folder.digest(texts[f"{run.id}.yaml"].encode()),
                "output_dir": run.output_dir,
            }
            for run in planned.runs
        ],
    }
