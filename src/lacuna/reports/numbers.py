"""Numbers and settings as a person reads them. Pure functions."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lacuna.reports.results import Estimate


def number(value: Any) -> str:
    """Sensible digits: four, and all of an integer. What is no number stays as it is written."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text(value)
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 10_000 else f"{value:.4g}"


def full(estimate: Estimate) -> str:
    """All digits of an estimate."""
    parts = [f"mean {estimate.mean!r}"]
    if estimate.low is not None:
        parts.append(f"interval {estimate.low!r} to {estimate.high!r}")
    if estimate.deviation is not None:
        parts.append(f"standard deviation {estimate.deviation!r}")
    return ", ".join([*parts, f"{estimate.count} seed{'s' * (estimate.count != 1)}"])


def decimals(estimates: Iterable[Estimate | None]) -> int | None:
    """Decimals of the numbers in a column: two digits of its narrowest interval; None where these would be many."""
    bounds = [(e.low, e.high) for e in estimates if e is not None and e.low is not None and e.high is not None]
    halves = [(high - low) / 2 for low, high in bounds if high > low]
    if not halves:
        return None
    largest = max(abs(edge) for pair in bounds for edge in pair)
    return max(0, 1 - math.floor(math.log10(min(halves)))) if min(halves) > largest * 1e-5 else None


def interval(estimate: Estimate, decimals: int | None) -> tuple[str, str]:
    """Mean, and interval if it has one."""

    def show(value: float) -> str:
        return number(value) if decimals is None else f"{value:,.{decimals}f}"

    if estimate.low is None or estimate.high is None:
        return show(estimate.mean), ""
    return show(estimate.mean), f"[{show(estimate.low)}, {show(estimate.high)}]"


def p_value(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def text(value: Any) -> str:
    """A setting or a fact as a person writes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and value:
        return ", ".join(f"{name}={text(one)}" for name, one in value.items())
    return "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def scale(estimates: Sequence[Estimate | None], values: Sequence[float]) -> dict[str, Any]:
    """An axis over all of it. at: a function from a value to a share of its length. ticks: round values."""
    bounds = [edge for e in estimates if e is not None for edge in (e.mean, e.low, e.high) if edge is not None]
    every = [edge for edge in (*bounds, *values) if math.isfinite(edge)] or [0.0]
    low, high = min(every), max(every)
    margin = (high - low) * 0.05 or abs(low) * 0.05 or 1.0
    low, high = low - margin, high + margin
    return {"at": lambda value: f"{100 * (value - low) / (high - low):.2f}%", "ticks": round_values(low, high)}


def round_values(low: float, high: float) -> list[tuple[float, str]]:
    """Two to five multiples of 1, 2 or 5 times a power of ten between the two, with their texts."""
    power = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= 5)
    digits = max(0, -math.floor(math.log10(step * 1.0001)))
    first, last = math.ceil(low / step), math.floor(high / step)
    found = [multiple * step for multiple in range(first, last + 1)]
    return [(value, f"{value:,.{digits}f}" if digits <= 6 else f"{value:.4g}") for value in found]
