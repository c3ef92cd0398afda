"""The report in a terminal, readable at 80 columns. Nothing here imports torch."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from string import ascii_uppercase

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from lacuna.reports.make import level_name
from lacuna.reports.results import HOURS, Arm, Estimate, Report, RunResult
from lacuna.visible import visible
from lacuna.words import format_duration
from lacuna.words import shown as shown_value

MOST_ROWS = 40
"""Rows of a table that are shown."""
NARROW = ("run", "seed", "seeds", "state", "p", "clear", "")
"""Columns that are not wrapped."""


def print_report(report: Report, console: Console) -> None:
    """The verdict first, then what it rests on."""
    said = report.experiment
    console.print(visible(f"\n{said['experiment_name']}"), style="bold")
    for name in ("question", "hypothesis"):
        if said.get(name):
            console.print(visible(f"{name}: {said[name]}"))
    console.print(visible(f"\n{report.verdict}\n"), style="bold green" if report.winner else "bold")
    console.print(visible(f"{report.metric}, {report.goal} is best: {report.how}"))
    arms = {_letter(place): arm for place, arm in enumerate(report.best_first())}
    _arms(report, arms, console)
    for effect in report.effects if len(report.effects) > 1 else ():
        rows = [(level_name(level), _mean(level.estimate), str(level.estimate.count)) for level in effect.levels]
        title = f"{effect.variable}, over {effect.matched} matched combinations"
        _print(console, title, ("value", f"mean {report.metric} [95 % interval]", "seeds"), rows)
    letters = {arm.name: letter for letter, arm in arms.items()}
    _comparisons(report, letters, console)
    _runs(report, letters, console)
    _unfinished(report.runs, console)
    for note in report.notes:
        console.print(Padding(visible(f"note: {note}"), (0, 0, 0, 2)))
    console.print(_totals(report))


def _print(
    console: Console,
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers: Sequence[int] = (),
    wrapped: int | None = None,
) -> None:
    table = Table(
        title=visible(title),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, name in enumerate(header):
        table.add_column(
            visible(name),
            justify="right" if index in numbers else "left",
            overflow="fold",
            no_wrap=(index in numbers or name in NARROW) and index != wrapped,
        )
    for row in rows:
        table.add_row(*map(visible, row))
    console.print(table)


def number(value: float | None) -> str:
    """Enough digits to tell runs apart, and no more."""
    return "" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _mean(estimate: Estimate | None) -> str:
    if estimate is None:
        return "no finished run"
    if estimate.low is None or estimate.high is None:
        return number(estimate.mean)
    return f"{number(estimate.mean)} [{number(estimate.low)}, {number(estimate.high)}]"


def _letter(index: int) -> str:
    """A, B … Z, AA, AB …"""
    return (_letter(index // 26 - 1) if index >= 26 else "") + ascii_uppercase[index % 26]


def _arms(report: Report, arms: Mapping[str, Arm], console: Console) -> None:
    shown = list(arms.items())[:MOST_ROWS]
    rows = [(letter, arm.name, _mean(arm.estimate), f"{len(arm.by_seed)}/{arm.expected}") for letter, arm in shown]
    more = f", the {MOST_ROWS} best of {len(arms)}" if len(arms) > MOST_ROWS else ""
    _print(console, f"Arms{more}", ("", "arm", f"mean {report.metric} [95 % interval]", "seeds"), rows)


def _comparisons(report: Report, letters: Mapping[str, str], console: Console) -> None:
    """Of an experiment with one variable, the values are the arms: one table."""
    shown = [one for one in report.comparisons if one.variable is None or len(report.effects) > 1]
    rows = [
        (
            f"{letters[one.other]} − {letters[one.best]}"
            if one.variable is None
            else f"{one.variable}: {one.other} − {one.best}",
            _mean(one.difference),
            "" if one.p_value is None else f"{one.p_value:.2g}",
            "yes" if one.is_clear else "no",
        )
        for one in shown[:MOST_ROWS]
    ]
    if rows:
        title = "Differences from the best, paired over seeds, corrected for their number"
        _print(console, title, ("other − best", "difference [95 % interval]", "p", "clear"), rows)
    if len(shown) > MOST_ROWS:
        console.print(f"… and {len(shown) - MOST_ROWS} more (--json has all)\n")


def _runs(report: Report, letters: Mapping[str, str], console: Console) -> None:
    rows = [
        (
            run.id.removeprefix("run_"),
            f"{letters[run.arm]}: {', '.join(map(shown_value, run.settings.values()))}",
            "" if run.seed is None else str(run.seed),
            run.state,
            number(run.metrics.get(report.metric)),
            number(run.budget.get("steps")),
            number(run.budget.get("tokens")),
            format_duration(run.budget["seconds"]) if "seconds" in run.budget else "",
        )
        for run in report.runs[:MOST_ROWS]
    ]
    header = ("run", "arm", "seed", "state", report.metric.replace("_", " "), "steps", "tokens", "time")
    more = f", the first {MOST_ROWS} of {len(report.runs)} (--csv has all)" if len(report.runs) > MOST_ROWS else ""
    _print(console, f"Runs{more}", header, rows, numbers=(4, 5, 6, 7), wrapped=4)


def _unfinished(runs: Sequence[RunResult], console: Console) -> None:
    open_runs = [run for run in runs if run.state != "finished"]
    if not open_runs:
        return
    counts = ", ".join(f"{count} {state}" for state, count in Counter(run.state for run in open_runs).items())
    console.print(f"{len(open_runs)} of {len(runs)} runs have no result: {counts}", style="bold")
    for run in open_runs[:MOST_ROWS]:
        why = f": {run.reason}" if run.reason else ""
        console.print(Padding(visible(f"{run.id} ({run.arm}): {run.state}{why}"), (0, 0, 0, 2)))
    if len(open_runs) > MOST_ROWS:
        console.print(f"  … and {len(open_runs) - MOST_ROWS} more (--csv has all)")
    console.print()


def _totals(report: Report) -> str:
    totals = report.totals
    parts = [f"{totals['finished']:.0f} of {totals['runs']:.0f} runs finished"]
    parts += [f"{totals['tokens']:,.0f} tokens"] if totals["tokens"] else []
    parts += [f"{totals[name]:.3g} {words}" for name, words in HOURS.items() if name in totals]
    return ", ".join(parts)
