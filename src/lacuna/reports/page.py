"""The report as one HTML page that holds all it needs: no request leaves it, and nothing in it is taken for markup."""

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lacuna.config.trees import leaves
from lacuna.config.yaml_format import dump_yaml
from lacuna.errors import needs_extra
from lacuna.files import write_whole
from lacuna.reports.curves import plot_data
from lacuna.reports.numbers import decimals, duration, full, interval, number, p_value, scale, text
from lacuna.reports.results import BUDGET, HOURS, Arm, Comparison, Report, RunResult
from lacuna.version import __version__

HERE = Path(__file__).parent
COLOURS, DASHES = 6, 4
"""Of arms: so many colours, each with so many kinds of line, then again from the first."""
CHOSEN = ("steps", "tokens", "targets", "batch_size", "packing", "epochs", "parameters", "devices")
"""Names of a budget in which arms must not differ for a fair comparison; time and memory always differ a little."""
MOST_VALUES = 12
"""Shown of a fact that differs between runs."""
TOTALS = {**HOURS, "tokens": BUDGET["tokens"]}


def write_page(report: Report, file: Path) -> None:
    """Write the page. Raises MissingExtraError where plotly or jinja2 is not installed, OSError as writing does."""
    with needs_extra("report", "plotly"):
        import jinja2
        from plotly.offline import get_plotlyjs
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number, "value": text, "full": full, "duration": duration, "interval": interval, "p_value": p_value,
        "decimals": decimals,
    }  # fmt: skip
    page = environment.get_template("page.html").render(
        contents(report),
        scripts=[get_plotlyjs(), (HERE / "page.js").read_text()],
        style=(HERE / "page.css").read_text(),
    )
    write_whole(file, page)


def contents(report: Report) -> dict[str, Any]:
    """Everything that the template names, but scripts and style."""
    arms = report.best_first()
    data = plot_data(report, arms)
    place = {arm.name: index for index, arm in enumerate(arms)}
    between_arms = sorted((c for c in report.comparisons if c.variable is None), key=lambda c: place[c.other])
    unfinished = [run for run in report.runs if run.state != "finished"]
    finished = [run for run in report.runs if run.state == "finished"]
    common, differing = shared_facts(report.runs)
    return {
        "report": report,
        "version": __version__,
        "arms": arms,
        "arm_scale": scale([arm.estimate for arm in arms], [v for arm in arms for v in arm.by_seed.values()]),
        "comparisons": between_arms,
        "difference_scale": scale([found.difference for found in between_arms], [0.0]),
        "level_comparisons": _by_variable(report.comparisons),
        "heat_map": heat_map(report, arms),
        "budget": budget_by_arm(finished, arms),
        "design": design_of(report.experiment),
        "runs": [*sorted(unfinished, key=lambda run: run.state != "failed"), *finished],
        "unfinished": len(unfinished),
        "variables": list(dict.fromkeys(name for run in report.runs for name in run.settings)),
        "common_facts": common,
        "differing_facts": differing,
        "totals": {words: report.totals[name] for name, words in TOTALS.items() if report.totals.get(name)},
        "commands": commands(report),
        "experiment_file": dump_yaml({k: v for k, v in report.experiment.items() if k != "slurm"}),
        "data": data,
        "json": as_script(data),
        "hash": digest,
        "colour": lambda index: index % COLOURS,
        "dash": lambda index: index // COLOURS % DASHES,
    }


def as_script(data: Any) -> str:
    """JSON that cannot end the script element that it stands in. Raises ValueError: a number that is not finite."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def digest(script: str) -> str:
    """How a Content-Security-Policy names a script that may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _by_variable(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    found: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.variable is not None:
            found.setdefault(comparison.variable, []).append(comparison)
    return found


def heat_map(report: Report, arms: Sequence[Arm]) -> dict[str, Any] | None:
    """Means of exactly two variables as rows and columns; None for any other number. share: 1 is the best mean."""
    names = list(dict.fromkeys(name for arm in report.arms for name in arm.settings))
    if len(names) != 2 or report.experiment.get("paired"):
        return None
    rows, columns = (list(dict.fromkeys(text(arm.settings[name]) for arm in report.arms)) for name in names)
    found = {(text(arm.settings[names[0]]), text(arm.settings[names[1]])): arm.estimate for arm in arms}
    means = [estimate.mean for estimate in found.values() if estimate is not None]
    worst, best = (min(means), max(means)) if means else (0.0, 0.0)
    if report.goal == "lowest":
        worst, best = best, worst
    shares = {
        place: (estimate.mean - worst) / (best - worst) if best != worst else 0.5
        for place, estimate in found.items() if estimate is not None
    }  # fmt: skip
    return {"names": names, "rows": rows, "columns": columns, "cells": found, "shares": shares}


def budget_by_arm(finished: Sequence[RunResult], arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """For each name of the budget what each arm spent (a range where its seeds differ), and whether the arms differ."""
    rows = []
    for name, words in BUDGET.items():
        cells = []
        for arm in arms:
            values = [run.budget[name] for run in finished if run.arm == arm.name and name in run.budget]
            cells.append(_range(values, duration if name == "seconds" else number))
        if any(cells):
            is_chosen = name in CHOSEN
            label = "time" if name == "seconds" else words
            rows.append({"words": label, "cells": cells, "differs": is_chosen and len({*cells} - {""}) > 1})
    return rows


def _range(values: Sequence[Any], show: Any) -> str:
    if not values:
        return ""
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return ", ".join(dict.fromkeys(text(value) for value in values))
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} – {high}"


def design_of(experiment: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Each part of the design that the experiment has: names and values."""
    found = {
        "variables": [(name, ", ".join(map(text, values))) for name, values in experiment.get("variables", {}).items()],
        "paired": [("together", _settings(pair)) for pair in experiment.get("paired", [])],
        "seeds": [("seeds", ", ".join(map(text, experiment["seeds"])))] if experiment.get("seeds") else [],
        "derived": [(name, text(value)) for name, value in experiment.get("derived", {}).items()],
        "controls": [(name, text(value)) for name, value in leaves(experiment.get("controls", {}))],
        "left out": [("all runs with", _settings(entry)) for entry in experiment.get("exclude", [])],
    }
    return {name: rows for name, rows in found.items() if rows}


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {text(value)}" for name, value in settings.items())


def shared_facts(runs: Sequence[RunResult]) -> tuple[dict[str, str], dict[str, list[tuple[str, str]]]]:
    """Facts that all runs with provenance share; and of each other fact its values, with the runs that have it."""
    known = {run.id: {name: text(value) for name, value in leaves(run.facts)} for run in runs if run.facts}
    names = dict.fromkeys(name for facts in known.values() for name in facts)
    common, differing = {}, {}
    for name in names:
        by_value: dict[str, list[str]] = {}
        for id, facts in known.items():
            by_value.setdefault(facts.get(name, "–"), []).append(id)
        if len(by_value) == 1:
            common[name] = next(iter(by_value))
        else:
            groups = [(value, _some(ids)) for value, ids in by_value.items()]
            rest = [(f"… and {len(groups) - MOST_VALUES} other values", "")] if len(groups) > MOST_VALUES else []
            differing[name] = groups[:MOST_VALUES] + rest
    return common, differing


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids) if len(ids) <= 6 else f"{', '.join(ids[:5])} and {len(ids) - 5} more"


def commands(report: Report) -> list[tuple[str, str]]:
    """What repeats the experiment, and what it is for."""
    place = Path(report.mapping).parent
    folder = shlex.quote(str(place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place))
    run = next((run for run in report.runs if run.folder is not None and run.state == "finished"), None)
    found = [
        (f"lacuna generate experiment.yaml --output {folder}", "writes the config of every run"),
        (f"lacuna run {folder}", "runs what is missing or unfinished"),
        (f"lacuna report {folder} --metric {shlex.quote(report.metric)} --html report.html", "writes this page"),
    ]
    if run is not None:
        found.append((f"lacuna replay {shlex.quote(str(run.folder))}", "one run's config, byte for byte"))
    return found
