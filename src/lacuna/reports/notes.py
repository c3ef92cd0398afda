"""What a reader of a report has to know beside its numbers. Nothing here imports torch."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from lacuna.reports.metric import VALIDATION, is_loss
from lacuna.reports.results import Arm, Comparison, Effect, RunResult
from lacuna.reports.statistics import seeds_matter
from lacuna.reports.verdict import counted, some
from lacuna.runs.identity import CHANGED, FIRST_PREPARATION
from lacuna.words import shown

SAME_SHARE = 0.01
"""Tokens or steps of two arms that differ by less are the same: the order of the data alone does that."""
DRAWN_BY = ("validation_share", "split_seed")
"""Settings by which a part of the data is kept for validation."""
BUDGETS = {
    "tokens": "tokens trained on",
    "steps": "optimizer steps",
    "batch_size": "effective batch size",
    "packing": "packing",
}


def notes_of(
    runs: Sequence[RunResult],
    arms: Sequence[Arm],
    effects: Sequence[Effect],
    compared: Sequence[Comparison],
    metric: str,
) -> Iterator[str]:
    """A sentence each."""
    if foreign := [f"{run.id}: {run.reason}" for run in runs if run.state == "other settings"]:
        yield f"{counted(len(foreign), 'folder')} with a run of other settings, which counts nowhere: {some(foreign)}"
    if changed := [run for run in runs if run.state == "finished" and run.reason.startswith(CHANGED)]:
        names = dict.fromkeys(name for run in changed for name in run.reason.removeprefix(CHANGED).split(", "))
        yield (
            f"{counted(len(changed), 'finished run')} made of something else than is there now ({some([*names], ', ')} "
            "changed since): the numbers are those of then; `lacuna run --again` trains them anew"
        )
    measured = [run for run in runs if metric in run.metrics]
    yield from _incomparable(measured, metric)
    yield from _older_split(measured, metric)
    if lost := [run.id for run in runs if run.state == "finished" and metric not in run.metrics]:
        yield f"{counted(len(lost), 'finished run')} without a number for {metric}, not counted: {some(lost, ', ')}"
    if len({frozenset(arm.by_seed) for arm in arms if arm.by_seed}) > 1:
        yield "not all arms have the same finished seeds: arms are compared over the seeds that both have"
    for budget in BUDGETS:
        yield from _difference(budget, runs)
    yield from _same_with_each_seed(arms, metric)
    if equal := [one.other for one in compared if one.difference.mean == 0 and not one.difference.deviation]:
        yield f"{some(equal)} and {compared[0].best} are equal at every seed: what varies there changes nothing"
    for effect in effects:
        if not effect.levels:
            yield f"{effect.variable}: no combination of the rest has finished with every value: no effect is known"
        elif effect.left_out:
            yield (
                f"{effect.variable}: {counted(effect.left_out, 'finished run')} left out of its effect, for the same "
                "settings have not finished with every other value"
            )
    yield from _surroundings([run.facts for run in runs if run.metrics])


def _same_with_each_seed(arms: Sequence[Arm], metric: str) -> Iterator[str]:
    """Losses that agree to the last bit come from the same run; right answers are counted, and counts may agree."""
    fixed = [arm for arm in arms if len(arm.by_seed) > 1 and not seeds_matter(list(arm.by_seed.values()))]
    if fixed and is_loss(metric):
        yield f"the seed makes no difference in {some([arm.name for arm in fixed])}: no uncertainty is known of it"
        return
    for count in sorted({len(arm.by_seed) for arm in fixed}):
        names = [arm.name for arm in fixed if len(arm.by_seed) == count]
        yield f"the same {metric} with each of {count} seeds: {some(names)}"


def _incomparable(runs: Sequence[RunResult], metric: str) -> Iterator[str]:
    """Losses are per token of the data that they are measured on."""
    if not is_loss(metric):
        return
    if len({run.facts.get("tokenizer_sha256") for run in runs} - {None}) > 1:
        yield f"runs have different tokenizers: {metric} is per token, and tells nothing of which run is better"
    elif len({_measured_on(run, metric) for run in runs}) > 1:
        yield f"runs have their {metric} from different data, so it tells little of which run is better"


def _measured_on(run: RunResult, metric: str) -> tuple[str, ...]:
    """The data of a run's metric: hashes of its files, and how the part of them that is held out was drawn."""
    entries = _held_out(run) if metric == VALIDATION else []
    drawn = [f"{name}={value}" for name, value in run.settings.items() if name.endswith(DRAWN_BY)]
    if metric == VALIDATION and not entries:
        drawn.append(f"preparation={_preparation(run)}")
    return (*(known or name for name, known in map(_input, entries or run.facts.get("data_files") or [])), *drawn)


def _held_out(run: RunResult) -> list[Mapping[str, Any]]:
    """The files that are there for validation alone."""
    return [entry for entry in run.facts.get("data_files") or [] if entry.get("use") == "validation"]


def _preparation(run: RunResult) -> str:
    return str(run.facts.get("data_preparation", FIRST_PREPARATION))


def _older_split(runs: Sequence[RunResult], metric: str) -> Iterator[str]:
    """Whose validation rows came from the seed, and had copies on both sides."""
    shares = [run for run in runs if metric == VALIDATION and run.facts.get("data_files") and not _held_out(run)]
    if older := [run.id for run in shares if _preparation(run) == FIRST_PREPARATION]:
        yield (
            f"{counted(len(older), 'run')} begun by an older version of lacuna, which drew the validation rows by the "
            f"run's seed and could train on copies of them ({some(older, ', ')}): compare them with each other only; "
            "without its folder, a run is trained anew"
        )


def _surroundings(facts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What differs between the machines that runs were made on, and what changed on them between two runs."""
    inputs: dict[str, set[str]] = {}
    for name, value in (pair for one in facts for pair in _inputs(one)):
        inputs.setdefault(name, set()).update([value] if value is not None else [])
    if changed := [name for name, values in inputs.items() if len(values) > 1]:
        yield f"not all runs were made from the same files: {some(changed)} changed between two runs"
    for place, words in (("git", "the git repository that they were started in"), ("lacuna_git", "lacuna's source")):
        commits = {(one[place].get("commit"), one[place].get("diff_sha256")) for one in facts if one.get(place)}
        if len(commits) > 1:
            yield f"runs were made at {len(commits)} different states of {words}"
    devices = sorted({str(one["device"]) for one in facts if one.get("device")})
    if len(devices) > 1:
        yield f"runs were made on different devices: {', '.join(devices)}"
    packages = [one["packages"] for one in facts if isinstance(one.get("packages"), dict)]
    for name in sorted({name for versions in packages for name in versions}):
        versions = sorted({str(one.get(name, "none")) for one in packages})
        if len(versions) > 1:
            yield f"runs were made with different versions of {name}: {', '.join(versions)}"


def _inputs(facts: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Each input of a run by its name, with the hash of what is in it."""
    yield from map(_input, facts.get("data_files") or [])
    for name, value in (("model", "weights_fingerprint"), ("tokenizer", "tokenizer_sha256")):
        yield f"{name} {facts.get(name)}", facts.get(value)


def _input(entry: Mapping[str, Any]) -> tuple[str, str | None]:
    return str(entry.get("path", entry.get("hub"))), entry.get("sha256") or entry.get("commit")


def _difference(budget: str, runs: Sequence[RunResult]) -> Iterator[str]:
    """Where arms differ in a budget: their values, each with its arms."""
    found: dict[str, list[Any]] = {}
    for run in runs:
        if run.metrics and budget in run.budget:
            found.setdefault(run.arm, []).append(run.budget[budget])
    values = {arm: _typical(numbers) for arm, numbers in found.items()}
    if _are_same(values):
        return
    groups: dict[Any, list[str]] = {}
    for arm, value in values.items():
        groups.setdefault(value, []).append(arm)
    said = [f"{_number(value)} in {some(names)}" for value, names in groups.items()]
    yield f"arms differ in {BUDGETS[budget]}: {some(said, ' | ')}"


def _typical(values: Sequence[Any]) -> Any:
    return values[0] if len(set(values)) == 1 else fmean(values)


def _are_same(values: Mapping[str, Any]) -> bool:
    if any(isinstance(value, bool) for value in values.values()):
        return len(set(values.values())) < 2
    return not values or max(values.values()) <= min(values.values()) * (1 + SAME_SHARE)


def _number(value: Any) -> str:
    return shown(value) if isinstance(value, bool) else f"{value:,.0f}"
