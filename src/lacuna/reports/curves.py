"""The data of the page's plots: curves, their means over seeds, and what each variable does. Pure functions."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lacuna.reports.numbers import text
from lacuna.reports.results import Arm, Effect, Report, RunResult

MOST_POINTS = 1000
"""Of one curve."""
ALL_POINTS = 600_000
"""Of all curves of a page, which then has about 10 MB."""
SHOWN_RUNS = 60
"""Drawn when the page opens: a browser takes about 10 ms for each."""
DECADES = 2
"""Numbers that span so many are shown on a logarithmic axis."""

Curve = Sequence[tuple[int, float]]
Points = tuple[list[int], list[float | None]]


def plot_data(report: Report, arms: Sequence[Arm]) -> dict[str, Any]:
    """What the page's script draws, as JSON holds it. Arms, and runs of their number, in the order of `arms`."""
    place = {arm.name: index for index, arm in enumerate(arms)}
    runs = [run for arm in arms for run in report.runs if run.arm == arm.name]
    names = metric_names(report)
    curves = [curve for run in runs for curve in run.curves.values()]
    limit = point_limit(len(curves))
    return {
        "metric": report.metric,
        "arms": [arm.name for arm in arms],
        "runs": [
            {
                "id": run.id, "arm": place[run.arm], "seed": run.seed, "state": run.state,
                "is_shown": index < SHOWN_RUNS,
            }
            for index, run in enumerate(runs)
        ],
        "limit": limit,
        "is_thinned": any(len(curve) > limit for curve in curves),
        "curves": [_of_metric(name, runs, arms, limit) for name in names],
        "effects": [_effect(effect) for effect in report.effects if effect.levels],
        "confidence": f"{report.confidence:.0%}",
    }  # fmt: skip


def metric_names(report: Report) -> list[str]:
    """Every metric that has a curve: the report's first, then losses, then the others."""
    found = {name for run in report.runs for name, curve in run.curves.items() if curve}
    return sorted(found, key=lambda name: (name != report.metric, not name.endswith("loss"), name))


def point_limit(curves: int) -> int:
    return max(50, min(MOST_POINTS, ALL_POINTS // max(1, curves)))


def _of_metric(name: str, runs: Sequence[RunResult], arms: Sequence[Arm], limit: int) -> dict[str, Any]:
    drawn = [(index, run.curves[name]) for index, run in enumerate(runs) if run.curves.get(name)]
    means = []
    for index, arm in enumerate(arms):
        finished = [run for run in runs if run.arm == arm.name and run.state == "finished" and run.curves.get(name)]
        if len(finished) > 1 and (mean := mean_curve([run.curves[name] for run in finished])):
            means.append([index, *thinned(mean, limit)])
    return {"metric": name, "runs": [[index, *thinned(curve, limit)] for index, curve in drawn], "means": means}


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean at each step that every one of the curves has."""
    by_step = [dict(curve) for curve in curves]
    common = set(by_step[0]).intersection(*by_step[1:])
    return [(step, math.fsum(values[step] for values in by_step) / len(curves)) for step in sorted(common)]


def thinned(curve: Curve, limit: int) -> Points:
    """At most so many points: of each stretch the lowest and the highest, and the first and last point of all.

    Values have 7 digits; one that is not finite is None, a gap.
    """
    steps = np.array([step for step, _ in curve], dtype=np.int64)
    values = np.array([value for _, value in curve], dtype=np.float64)
    if len(values) > limit:
        kept = _extremes(values, limit // 2 - 1)
        steps, values = steps[kept], values[kept]
    numbers = [float(f"{value:.7g}") if math.isfinite(value) else None for value in values.tolist()]
    return steps.tolist(), numbers


def _extremes(values: NDArray[np.float64], stretches: int) -> NDArray[np.int64]:
    size = math.ceil(len(values) / stretches)
    count = math.ceil(len(values) / size)
    padded = np.concatenate([values, np.repeat(values[-1:], count * size - len(values))]).reshape(count, size)
    is_number = np.isfinite(padded)
    starts = np.arange(count) * size
    low = starts + np.where(is_number, padded, np.inf).argmin(axis=1)
    high = starts + np.where(is_number, padded, -np.inf).argmax(axis=1)
    last = len(values) - 1
    return np.unique(np.minimum(np.concatenate([[0], low, high, [last]]), last))


def _effect(effect: Effect) -> dict[str, Any]:
    values = [level.value for level in effect.levels]
    scale = scale_of(values)
    seeds = list(dict.fromkeys(seed for level in effect.levels for seed in level.by_seed))
    return {
        "variable": effect.variable,
        "scale": scale,
        "x": list(range(len(values))) if scale == "category" else values,
        "names": [text(value) for value in values],
        "means": [level.estimate.mean for level in effect.levels],
        "lows": [level.estimate.low for level in effect.levels],
        "highs": [level.estimate.high for level in effect.levels],
        "seeds": [[seed, [level.by_seed.get(seed) for level in effect.levels]] for seed in seeds],
    }


def scale_of(values: Sequence[Any]) -> str:
    """category, linear, or log where numbers above zero span decades."""
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return "category"
    is_wide = min(values) > 0 and max(values) >= min(values) * 10**DECADES
    return "log" if is_wide else "linear"
