"""The report as CSV, a row for each run, and as JSON. Nothing here imports torch."""

import csv
import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lacuna.files import write_whole
from lacuna.reports.results import BUDGET, Report
from lacuna.words import shown


def write_table(report: Report, file: Path) -> None:
    """Settings, metrics and budget with their kind before the name, for the same name may stand in two of them."""
    settings = dict.fromkeys(name for run in report.runs for name in run.settings)
    metrics = sorted({name for run in report.runs for name in run.metrics})
    header = ["run", *(f"setting.{name}" for name in settings), "seed", "state", "reason"]
    header += [*(f"metric.{name}" for name in metrics), *(f"budget.{name}" for name in BUDGET), "folder"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for run in report.runs:
        cells = [run.id, *(run.settings.get(name) for name in settings), run.seed, run.state, run.reason]
        cells += [*(run.metrics.get(name) for name in metrics), *(run.budget.get(name) for name in BUDGET), run.folder]
        writer.writerow([_cell(value) for value in cells])
    write_whole(file, text.getvalue())


def _cell(value: Any) -> Any:
    """Numbers in full precision, nothing as an empty cell, lists and mappings as JSON."""
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return shown(value) if isinstance(value, bool) else value


def as_json(report: Report) -> str:
    """All but the curves, which stand in the runs' metrics.jsonl."""
    whole = asdict(replace(report, runs=tuple(replace(run, curves={}) for run in report.runs)))
    whole["runs"] = [{name: value for name, value in run.items() if name != "curves"} for run in whole["runs"]]
    return json.dumps(whole, ensure_ascii=False)
