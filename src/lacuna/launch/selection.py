"""The runs of a mapping that `lacuna run` was asked for, and which of them are done. Nothing here imports torch."""

from collections.abc import Iterable

from lacuna.config.trainers import load_trainer_config
from lacuna.errors import ConfigError, LacunaError, RunError
from lacuna.launch.start import digest_of
from lacuna.runs.final import damage_of_final
from lacuna.runs.folder import read_status, refuse_foreign_folder, starts_of
from lacuna.runs.identity import changed_inputs
from lacuna.runs.mapping import GeneratedRun, RunMapping
from lacuna.runs.same import difference, has_run
from lacuna.words import did_you_mean

MEND = "move that folder away, or give the experiment another output_dir"


def choose(mapping: RunMapping, only: Iterable[str]) -> list[int]:
    """Indices of the runs with these ids, in the mapping's order; of all where there are none. Raises ConfigError."""
    ids = mapping.ids
    wanted = [name.strip() for word in only for name in word.split(",")]
    known = set(ids)
    if unknown := [name for name in dict.fromkeys(wanted) if name not in known]:
        raise ConfigError(
            [f"--only {name}: {mapping.file} has no such run{did_you_mean(name, ids)}" for name in unknown]
        )
    return [index for index, id in enumerate(ids) if not wanted or id in wanted]


def missing_and_finished(mapping: RunMapping, indices: Iterable[int]) -> tuple[list[GeneratedRun], list[GeneratedRun]]:
    """The runs to start, and those that are finished.

    Raises ConfigError with every run that cannot be: its config was changed, or its folder holds something else.
    """
    missing: list[GeneratedRun] = []
    finished: list[GeneratedRun] = []
    problems = []
    for index in indices:
        try:
            run = _unchanged(mapping, index)
            (finished if is_finished(run) else missing).append(run)
        except LacunaError as error:
            problems += [f"{mapping.ids[index]}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return missing, finished


def with_other_inputs(mapping: RunMapping, finished: Iterable[GeneratedRun]) -> list[tuple[GeneratedRun, list[str]]]:
    """The finished runs whose files hold something else now than when they were made, and which files these are."""
    found = [(run, changed_inputs((starts_of(run.folder) or [{}])[-1], mapping.directory)) for run in finished]
    return [(run, changed) for run, changed in found if changed]


def _unchanged(mapping: RunMapping, index: int) -> GeneratedRun:
    run = mapping.run(index)
    if digest_of(run.config) != run.sha256:
        raise ConfigError(f"{run.config}: was changed since it was generated: generate it again")
    return run


def is_finished(run: GeneratedRun) -> bool:
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
    if (other := difference(run.folder, config, config.gpus, run.settings)) is not None:
        raise RunError(f"{other}: {MEND}")
    return says_so and (run.folder / "final").is_dir() and damage_of_final(run.folder) is None
