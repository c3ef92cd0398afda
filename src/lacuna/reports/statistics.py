"""Means with intervals, paired differences, effects of variables: pure functions on numbers. Nothing imports torch."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from lacuna.errors import MissingExtraError
from lacuna.reports.results import Comparison, Effect, Estimate, Level

try:
    from scipy import stats
except ModuleNotFoundError as error:
    raise MissingExtraError("report", "scipy") from error

CONFIDENCE = 0.95
POWER = 0.8
"""Chance with which the estimated number of seeds would show a difference as large as the one that was found."""
MOST_SEEDS = 1000
ROUNDING = 1e-12
"""A deviation below this share of the values is the rounding of floats."""

BySeed = Mapping[int | None, float]


@dataclass(frozen=True)
class Measured:
    """A finished run: its settings without the seed, its seed, and the metric."""

    settings: Mapping[str, Any]
    seed: int | None
    value: float


def estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The mean and its t-interval; no interval for one value, or for values that are all the same.

    # ref: Student (1908), The probable error of a mean
    """
    mean, count = fmean(values), len(values)
    if count < 2:
        return Estimate(mean, None, None, count, None)
    deviation = stdev(values)
    if _is_rounding(deviation, values):
        return Estimate(mean, None, None, count, 0.0)
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * deviation / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count, deviation)


def compare(
    variable: str | None, best: tuple[str, BySeed], other: tuple[str, BySeed], comparisons: int,
    confidence: float = CONFIDENCE,
) -> Comparison:  # fmt: skip
    """Other minus best, paired over the seeds of both, corrected (Bonferroni) for so many comparisons.

    Without two pairs, or where neither side changes with the seed, there is no interval and nothing is clear. Without
    any pair, the difference is that of the means.
    # ref: Hsu (1984), Constrained simultaneous confidence intervals for multiple comparisons with the best
    """
    seeds = [seed for seed in best[1] if seed in other[1]]
    lefts, rights = [best[1][seed] for seed in seeds], [other[1][seed] for seed in seeds]
    differences = [right - left for left, right in zip(lefts, rights, strict=True)]
    count = len(seeds)
    mean = fmean(differences) if differences else fmean(other[1].values()) - fmean(best[1].values())
    if count < 2 or not (seeds_matter(lefts) or seeds_matter(rights)):
        unknown = Estimate(mean, None, None, count, 0.0 if count > 1 else None)
        return Comparison(variable, best[0], other[0], unknown, None, False)
    deviation = stdev(differences)
    if _is_rounding(deviation, [*lefts, *rights]):
        is_equal = _is_rounding(abs(mean), [*lefts, *rights])
        exact = Estimate(mean, mean, mean, count, 0.0)
        return Comparison(variable, best[0], other[0], exact, 1.0 if is_equal else 0.0, not is_equal)
    test = stats.ttest_rel(rights, lefts)
    low, high = map(float, test.confidence_interval(1 - (1 - confidence) / comparisons))
    difference = Estimate(mean, low, high, count, deviation)
    p_value = min(1.0, float(test.pvalue) * comparisons)
    return Comparison(variable, best[0], other[0], difference, p_value, low > 0 or high < 0)


def seeds_matter(values: Sequence[float]) -> bool:
    """Whether the values of one arm differ at all."""
    return len(set(values)) > 1


def seeds_needed(difference: Estimate, comparisons: int, confidence: float = CONFIDENCE) -> int | None:
    """About how many pairs would tell a difference as large as this one from none; None where that cannot be said.

    The smallest n with (t(1 - α/2m, n - 1) + t(0.8, n - 1)) · s / √n ≤ |d|: it takes the difference d and its
    deviation s, which come from few seeds themselves, for the true ones.
    """
    if not difference.deviation or not difference.mean:
        return None
    tail = 1 - (1 - confidence) / comparisons / 2
    counts = np.arange(2, MOST_SEEDS + 1)
    quantiles = stats.t.ppf(tail, counts - 1) + stats.t.ppf(POWER, counts - 1)
    enough = quantiles * difference.deviation / np.sqrt(counts) <= abs(difference.mean)
    return int(counts[enough.argmax()]) if enough.any() else None


def effect_of(
    names: Sequence[str], designed: Sequence[Mapping[str, Any]], measured: Sequence[Measured], title: str
) -> Effect:
    """The metric at each value of a variable, over the combinations of all else that have every value.

    names: the variable's, or of several settings that vary together. designed: the settings of all runs, finished or
    not. A level's value of a seed is the mean over that seed's combinations.
    """
    values = {_key(settings, names): _value(settings, names) for settings in designed}
    cells: dict[Hashable, dict[Hashable, Measured]] = {}
    for run in measured:
        others = [name for name in run.settings if name not in names]
        cells.setdefault((_key(run.settings, others), run.seed), {})[_key(run.settings, names)] = run
    whole = [cell for cell in cells.values() if cell.keys() == values.keys()]
    levels = []
    for key, value in values.items():
        found: dict[int | None, list[float]] = {}
        for cell in whole:
            found.setdefault(cell[key].seed, []).append(cell[key].value)
        by_seed = {seed: fmean(numbers) for seed, numbers in found.items()}
        if by_seed:
            levels.append(Level(value, estimate(list(by_seed.values())), by_seed))
    return Effect(title, tuple(levels), len(whole), len(measured) - len(whole) * len(values))


def _key(settings: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """Settings as something that a mapping can be keyed by; true is not 1 here."""
    return tuple(f"{name}={settings[name]!r}" for name in names)


def _value(settings: Mapping[str, Any], names: Sequence[str]) -> Any:
    return settings[names[0]] if len(names) == 1 else {name: settings[name] for name in names}


def _is_rounding(deviation: float, values: Sequence[float]) -> bool:
    return deviation <= ROUNDING * max(map(abs, values), default=0.0)
