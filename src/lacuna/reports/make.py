"""Everything that a report says, worked out from the run folders. Nothing here imports torch."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from lacuna.errors import ConfigError, RunError
from lacuna.reports.collect import OTHER_SETTINGS, collect, is_cpu
from lacuna.reports.metric import Goal, choose_goal, choose_metric, in_words
from lacuna.reports.notes import notes_of
from lacuna.reports.page import write_page
from lacuna.reports.results import Arm, Comparison, Effect, Level, Report, RunResult
from lacuna.reports.statistics import CONFIDENCE, Measured, compare, effect_of, estimate
from lacuna.reports.table import write_table
from lacuna.reports.verdict import judge
from lacuna.words import shown

Compared = TypeVar("Compared", Arm, Level)
Variable = tuple[str, ...]
"""The setting that varies, or several that vary together."""


def report(
    where: str | Path,
    metric: str | None = None,
    goal: Literal["lowest", "highest"] | None = None,
    html: str | Path | None = None,
    csv: str | Path | None = None,
) -> Report:
    """Compare the arms of an experiment. where: the folder of its generated configs, or their run_mapping.yaml.

    metric: of metrics.jsonl or evaluation.json; by default validation_loss where runs have it, else loss. goal: what
    is better, where the metric's name does not say it. html, csv: files to write.
    Raises RunError, ConfigError, MissingExtraError.
    """
    files = {ending: Path(file) for ending, file in ((".csv", csv), (".html", html)) if file is not None}
    for ending, file in files.items():
        if file.suffix != ending:
            raise ConfigError(f"--{ending[1:]} {file}: give a file that ends in {ending}; what is there is replaced")
    made = make(where, metric, goal)
    for ending, file in files.items():
        write = write_table if ending == ".csv" else write_page
        try:
            write(made, file)
        except OSError as error:
            raise RunError(f"{file}: cannot be written: {error.strerror}") from None
    return made


def make(where: str | Path, asked_metric: str | None, asked_goal: Goal | None) -> Report:
    found = collect(where)
    runs, head = found.runs, found.mapping.head
    final = {name for run in runs for name in run.metrics}
    logged = {name for run in runs for name in run.curves}
    metric = choose_metric(asked_metric, final, logged)
    goal = choose_goal(metric, asked_goal)
    arms = arms_of(runs, metric)
    compared = compare_arms(arms, goal)
    variables = variables_of(head["experiment"], runs)
    effects = tuple(effect(names, runs, metric) for names in variables)
    verdict = judge(arms, compared, runs, metric, goal)
    return Report(
        experiment=head["experiment"],
        trainer=head["trainer"],
        base=head["base"],
        mapping=os.path.relpath(found.mapping.file),
        metric=metric,
        how=in_words(metric, found.final_weights, metric in logged or metric not in final),
        goal=goal,
        confidence=CONFIDENCE,
        runs=tuple(runs),
        arms=arms,
        effects=effects,
        comparisons=(*compared, *compare_levels(effects, goal)),
        winner=verdict.winner,
        verdict=verdict.sentence,
        notes=tuple(notes_of(runs, arms, effects, compared, metric)),
        totals=totals_of(runs),
    )


def arms_of(runs: Sequence[RunResult], metric: str) -> tuple[Arm, ...]:
    """In the order of the mapping."""
    groups: dict[str, list[RunResult]] = {}
    for run in runs:
        groups.setdefault(repr(run.settings), []).append(run)
    arms = []
    for group in groups.values():
        by_seed = {run.seed: run.metrics[metric] for run in group if metric in run.metrics}
        mean = estimate(list(by_seed.values())) if by_seed else None
        arms.append(Arm(group[0].arm, group[0].settings, by_seed, mean, len(group)))
    return tuple(arms)


def best_of(items: Sequence[Compared], goal: Goal) -> Compared:
    """The arm, or level, with the best mean; of equal ones the first."""
    return (min if goal == "lowest" else max)(
        items, key=lambda item: item.estimate.mean if item.estimate is not None else 0.0
    )


def compare_arms(arms: Sequence[Arm], goal: Goal) -> tuple[Comparison, ...]:
    """Each arm with the one that has the best mean."""
    there = [arm for arm in arms if arm.estimate is not None]
    if len(there) < 2:
        return ()
    best = best_of(there, goal)
    others = [arm for arm in there if arm is not best]
    return tuple(compare(None, (best.name, best.by_seed), (other.name, other.by_seed), len(others)) for other in others)


def variables_of(experiment: Mapping[str, Any], runs: Sequence[RunResult]) -> list[Variable]:
    """What varies, without seeds and without what has one value only."""
    together = tuple(name.removeprefix("+") for name in (experiment.get("paired") or [{}])[0])
    names = [(name,) for name in (runs[0].settings if runs else ()) if name not in together]
    variables: list[Variable] = [*names, *([together] if together else [])]
    return [names for names in variables if len({repr([run.settings[name] for name in names]) for run in runs}) > 1]


def effect(names: Variable, runs: Sequence[RunResult], metric: str) -> Effect:
    measured = [Measured(run.settings, run.seed, run.metrics[metric]) for run in runs if metric in run.metrics]
    return effect_of(names, [run.settings for run in runs], measured, ", ".join(names))


def level_name(level: Level) -> str:
    value = level.value
    return ", ".join(f"{name}={shown(one)}" for name, one in value.items()) if isinstance(value, dict) else shown(value)


def compare_levels(effects: Sequence[Effect], goal: Goal) -> list[Comparison]:
    """Each value of each variable with that variable's best one; corrected for all of these together."""
    there = [one for one in effects if one.levels]
    total = sum(len(one.levels) - 1 for one in there)
    compared = []
    for one in there:
        best = best_of(one.levels, goal)
        compared += [
            compare(one.variable, (level_name(best), best.by_seed), (level_name(level), level.by_seed), total)
            for level in one.levels
            if level is not best
        ]
    return compared


def totals_of(runs: Sequence[RunResult]) -> dict[str, float]:
    """What all runs have cost, those that failed too."""
    ours = [run for run in runs if run.state != OTHER_SETTINGS]
    totals: dict[str, float] = {
        "runs": len(runs),
        "finished": Counter(run.state for run in runs)["finished"],
        "tokens": sum(run.budget.get("tokens", 0) for run in ours),
    }
    if any("gpu_hours" in run.budget for run in ours):
        totals["gpu_hours"] = sum(run.budget.get("gpu_hours", 0) for run in ours)
    on_cpu = [run for run in ours if is_cpu(run.facts) and "seconds" in run.budget]
    if on_cpu:
        totals["cpu_hours"] = sum(run.budget["seconds"] * run.budget["devices"] / 3600 for run in on_cpu)
    return totals
