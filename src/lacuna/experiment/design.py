"""From an experiment file to every run's config, in memory: names to places, values to runs. Pure but for the base."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from lacuna.config.files import Layer, check, merge_layers
from lacuna.config.finetune import default_output_dir
from lacuna.config.names import (
    expects_whole_number,
    find_path,
    output_path,
    parameters,
    place,
    value_problem,
)
from lacuna.config.trainers import CONFIGS
from lacuna.config.trees import MISSING, Values, get, leaves, merge, nested, prefixes, type_conflicts, without
from lacuna.errors import ConfigError
from lacuna.experiment.base import Base, load_base
from lacuna.experiment.confounds import find_confounds
from lacuna.experiment.schema import Experiment, read_experiment
from lacuna.experiment.sweep import Settings, combinations, evaluate, fill, matches, names_in, words_in
from lacuna.runs.mapping import Run
from lacuna.torchtune.templates import with_todays_template
from lacuna.words import did_you_mean


@dataclass(frozen=True)
class DesignedRun(Run):
    """values: the whole config."""

    values: Values


@dataclass(frozen=True)
class Design:
    """touched: the paths that the experiment sets, whatever the run. notes: to be said aloud."""

    experiment: Experiment
    base: Base
    runs: list[DesignedRun]
    touched: list[str]
    notes: list[str]


Places = dict[tuple[str, str], str]
"""(section of the experiment, name there) to the path of the config that it sets."""


def design(source: str | Path | Mapping[str, Any], torchtune_python: str | None = None) -> Design:
    """Every run of an experiment. Raises ConfigError with all problems of the experiment file."""
    experiment, layer = read_experiment(source)
    base = load_base(experiment, layer, torchtune_python)
    values, problems = _with_deletions(experiment, base, layer)
    places, touched = _find_places(experiment, base.trainer, values, layer, problems)
    combined = _kept(experiment)
    width = max(3, len(str(len(combined) - 1)))
    composer = _Composer(experiment, base, values, places, layer)
    wrong: dict[str, None] = {}
    runs = []
    for index, varied in enumerate(combined):
        try:
            runs.append(composer.run(f"run_{index:0{width}d}", varied))
        except (ConfigError, ValueError) as error:
            found = error.problems if isinstance(error, ConfigError) else [f"{layer.name}: {error}"]
            wrong.update(dict.fromkeys(found))
    wrong.update(dict.fromkeys(f"{layer.name}: {problem}" for problem in _collisions(base.trainer, runs, touched)))
    if wrong:
        raise ConfigError(list(wrong))
    notes = [*base.notes, *composer.translated, *find_confounds(base, [run.values for run in runs])]
    return Design(experiment, base, runs, touched, notes)


class _Composer:
    """What all runs of an experiment share, worked out once."""

    def __init__(self, experiment: Experiment, base: Base, values: Values, places: Places, layer: Layer) -> None:
        self.experiment, self.base, self.values, self.places, self.layer = experiment, base, values, places, layer
        self.trainer = base.trainer
        controls: Values = {}
        for name, value in experiment.controls.items():
            if not name.startswith("~"):
                controls = merge(controls, nested(places["controls", name], value))
        self.controls = controls
        self.settled = merge(values, controls)
        self.texts = [(path, value) for path, value in leaves(controls) if "{" in str(value)]
        scalars = {
            name.removeprefix("+"): value
            for name, value in experiment.controls.items()
            if not isinstance(value, dict | list) and not name.startswith("~")
        }
        self.fixed = {"experiment_name": experiment.experiment_name, **scalars}
        varying = [*experiment.variables, *(experiment.paired or [{}])[0], *(["seed"] * bool(experiment.seeds))]
        self.varying = {name.removeprefix("+") for name in [*varying, *experiment.derived]}
        self.derived = _in_order(experiment, base.trainer, values, places, layer)
        self.translated: dict[str, None] = {}
        """What was said of templates that torchtune has no longer."""
        self.lines = {
            path: line for (section, name), path in places.items() if (line := layer.lines.get(f"{section}.{name}"))
        }

    def run(self, id: str, varied: Settings) -> DesignedRun:
        names = {**self.fixed, **{name.removeprefix("+"): value for name, value in varied.items()}}
        override: Values = {}
        seeded = bool(self.experiment.seeds)
        for name, value in varied.items():
            section = "variables" if name in self.experiment.variables else "paired"
            path = self.places["seeds" if seeded and name == "seed" else section, name]
            override = merge(override, nested(path, value))
        for name in self.derived:
            path, expression = self.places["derived", name], self.experiment.derived[name]
            try:
                result = self._derive(name, path, expression, names, merge(self.settled, override))
            except ValueError as error:
                raise ConfigError(f"{self.layer.where(f'derived.{name}')}: {error}") from None
            names[name.removeprefix("+")] = result
            override = merge(override, nested(path, result))
        texts = [*self.texts, *((path, value) for path, value in leaves(override) if "{" in str(value))]
        for path, value in texts:
            if path != output_path(self.trainer) and get(override, path) in (MISSING, value):
                override = merge(override, nested(path, _filled(value, names)))
        override, output_dir = self._own_folder(id, override, names)
        seed = varied["seed"] if seeded else None
        settings = {name.removeprefix("+"): value for name, value in varied.items() if not (seeded and name == "seed")}
        return DesignedRun(id, settings, seed, output_dir, self._complete(override))

    def _derive(self, name: str, path: str, expression: str, names: Settings, values: Values) -> Any:
        """Names are the user's own, else what this run's config holds there.

        Raises ValueError where the arithmetic fails, or gives what cannot stand at that path.
        """
        known = {word: get(values, find_path(word, self.trainer, values)[0]) for word in words_in(expression)}
        numbers = {word: value for word, value in known.items() if isinstance(value, int | float)}
        result = evaluate(expression, {**numbers, **names}, [*names, *parameters(self.trainer)])
        if isinstance(result, float) and result.is_integer() and expects_whole_number(self.trainer, path):
            result = int(result)
        conflict = next((how for _, how in type_conflicts(self.values, nested(path, result))), None)
        if wrong := value_problem(self.trainer, path, result) or conflict:
            raise ValueError(f"derived {name!r}: {expression!r} gives {wrong}")
        return result

    def _own_folder(self, id: str, override: Values, names: Settings) -> tuple[Values, str | None]:
        """Each run writes below the experiment's output_dir, or where the user's text with its names says."""
        path, settled = output_path(self.trainer), merge(self.settled, override)
        given = get(settled, path)
        if self.trainer == "finetune" and not isinstance(given, str):
            given = default_output_dir(str(get(settled, "model.path")), self.experiment.experiment_name)
        if not isinstance(given, str):
            return override, None
        is_own = not self.varying.isdisjoint(("output_dir", path)) or names_in(given) & self.varying
        folder = fill(given, names, in_path=True)
        folder = folder if is_own else f"{folder.rstrip('/')}/{id}"
        return merge(override, nested(path, folder)), folder

    def _complete(self, override: Values) -> Values:
        """The whole config: torchtune's as it is, ours checked and with every default written out."""
        if self.trainer == "torchtune":
            values, said = with_todays_template(merge(self.settled, override))
            self.translated.update({said: None} if said else {})
            return values
        layers = [
            Layer(self.base.name, self.values, self.base.lines),
            Layer(self.layer.name, merge(self.controls, override), self.lines),
        ]
        model = CONFIGS[self.trainer]
        config = check(model, *merge_layers(layers, model.alternatives), flag=None)
        return {"trainer": self.trainer, **config.written(exclude_none=True)}


def _in_order(experiment: Experiment, trainer: str, base: Values, places: Places, layer: Layer) -> list[str]:
    """The derived names, each after those that it is worked out from. Raises ConfigError for a circle."""
    owners = {places["derived", name]: name for name in experiment.derived}
    owners |= {name.removeprefix("+"): name for name in experiment.derived}
    needs = {
        name: {
            owners[key]
            for word in words_in(expression)
            for key in (word, find_path(word, trainer, base)[0])
            if key in owners
        }
        for name, expression in experiment.derived.items()
    }
    try:
        return list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        raise ConfigError(f"{layer.where('derived')}: derived in a circle: {' → '.join(error.args[1])}") from None


def _filled(value: Any, names: Settings) -> Any:
    if isinstance(value, list):
        return [_filled(item, names) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item, names) for key, item in value.items()}
    return fill(value, names) if isinstance(value, str) else value


def _collisions(trainer: str, runs: list[DesignedRun], touched: list[str]) -> list[str]:
    """Runs that would write into one folder, or into each other's, and runs that are the same."""
    owners: dict[tuple[str, str], str] = {}
    problems = []
    inner = [path for path, _ in leaves(runs[0].values) if path.endswith((".output_dir", ".log_dir"))] if runs else []
    for run in runs:
        for path in ["output_dir", *(inner if trainer == "torchtune" else ())]:
            folder = run.output_dir if path == "output_dir" else get(run.values, path)
            is_off = get(run.values, f"{path.rpartition('.')[0]}.enabled") is False
            if not isinstance(folder, str) or is_off or "${output_dir}" in folder:
                continue
            owner = owners.setdefault((path, os.path.normpath(folder)), run.id)
            if owner != run.id:
                names = "_".join(f"{{{name}}}" for name in [*run.settings, *["seed"] * (run.seed is not None)])
                advice = f"name all that varies in it, as {names}"
                advice += ", or begin it with ${output_dir}" if "." in path else ""
                problems.append(f"{path}: {owner} and {run.id} share {folder}: {advice}")
    for (path, folder), id in owners.items():
        above = next((str(parent) for parent in Path(folder).parents if (path, str(parent)) in owners), None)
        if above is not None and above != folder:
            problems.append(f"{path}: the folder of {id}, {folder}, lies in that of {owners[path, above]}")
    same: dict[tuple[str, ...], str] = {}
    for run in runs:
        found = [repr(get(run.values, path)) for path in touched if path != "output_dir"]
        twin = same.setdefault((*found, repr(run.settings.get("output_dir"))), run.id)
        if twin != run.id:
            problems.append(f"{twin} and {run.id} are the same run: what varies between them has no effect")
    return problems


def _with_deletions(experiment: Experiment, base: Base, layer: Layer) -> tuple[Values, list[str]]:
    """The base less what controls delete by `~path`, and what is wrong with that."""
    values = dict(base.values)
    problems = []
    for name, value in experiment.controls.items():
        path = find_path(f"+{name[1:]}", base.trainer, values)[0]
        where = f"{layer.where(f'controls.{name}')}: {name!r}"
        if not name.startswith("~"):
            continue
        if value not in (None, True):
            problems.append(f"{where} deletes, so its value is null (in TOML: true), not {value!r}")
        elif get(values, path) is MISSING:
            hint = did_you_mean(path, [leaf for leaf, _ in leaves(values)])
            problems.append(f"{where}: the base config has nothing to delete there{hint}")
        else:
            values = without(values, path)
    return values, problems


def _find_places(
    experiment: Experiment, trainer: str, base: Values, layer: Layer, problems: list[str]
) -> tuple[Places, list[str]]:
    """Where everything that the experiment sets is read, and all paths that it sets.

    Raises ConfigError with the problems so far, all unknown names, wrong values, and paths that are set twice.
    """
    places: Places = {}
    owners: dict[str, str] = {}
    for section, names in _sections(experiment).items():
        for name, values in names.items():
            here = f"{section}.{name}"
            where = layer.where(here if here in layer.lines else section)
            path, wrong = place(trainer, base, name, values)
            places[section, name] = path
            set_here = dict.fromkeys(leaf for value in values for leaf, _ in leaves(nested(path, value))) or [path]
            for leaf in set_here:
                if rival := _rival(leaf, owners):
                    wrong.append(f"{here} and {owners[rival]} both set {rival}: keep one of them")
            owners.update(dict.fromkeys(set_here, here))
            problems += [f"{where}: {problem}" for problem in wrong]
    problems += [f"{layer.where('exclude')}: {problem}" for problem in _wrong_exclusions(experiment)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return places, sorted(owners)


def _sections(experiment: Experiment) -> dict[str, dict[str, list[Any]]]:
    """Every name that an experiment sets, with its values, by the section it stands in."""
    return {
        "controls": {name: [value] for name, value in experiment.controls.items() if not name.startswith("~")},
        "derived": {name: [] for name in experiment.derived},
        "variables": dict(experiment.variables),
        "paired": {name: [entry[name] for entry in experiment.paired] for name in (experiment.paired or [{}])[0]},
        "seeds": {"seed": list(experiment.seeds)} if experiment.seeds else {},
    }


def _rival(leaf: str, owners: Mapping[str, str]) -> str | None:
    """A path already set that is this one, stands above it, or below it."""
    return next((other for other in prefixes(leaf) if other in owners), None) or next(
        (other for other in owners if other.startswith(f"{leaf}.")), None
    )


def _wrong_exclusions(experiment: Experiment) -> list[str]:
    everything = list(combinations(experiment.variables, experiment.paired, experiment.seeds))
    problems = []
    for index, entry in enumerate(experiment.exclude, 1):
        unknown = [name for name in entry if name not in everything[0]]
        problems += [
            f"exclude, entry {index}: {name!r} does not vary{did_you_mean(name, [*everything[0]])}" for name in unknown
        ]
        if not unknown and not any(matches(run, entry) for run in everything):
            held = {name: list(dict.fromkeys(repr(run[name]) for run in everything)) for name in entry}
            shown = "; ".join(f"{name} is {', '.join(values)}" for name, values in held.items())
            problems.append(f"exclude, entry {index} fits no run: {shown}")
    return problems or ([] if _kept(experiment) else ["exclude leaves no run"])


def _kept(experiment: Experiment) -> list[Settings]:
    """The combinations that exclude leaves."""
    everything = combinations(experiment.variables, experiment.paired, experiment.seeds)
    return [run for run in everything if not any(matches(run, entry) for entry in experiment.exclude)]
