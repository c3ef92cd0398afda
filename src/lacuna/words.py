"""Numbers, sizes, durations and names, as a person reads them."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Tell = Callable[[str], None]
"""What takes a line that a person shall read."""


def shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def varies(settings: Mapping[str, Any]) -> str:
    """`learning_rate=0.001, lora_rank=8`"""
    return ", ".join(f"{name}={shown(value)}" for name, value in settings.items())


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row, its cells one below another; all rows have as many."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return [line.rstrip() for line in lines]


def did_you_mean(word: str, candidates: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or nothing where nothing is near."""
    nearest = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def format_duration(seconds: float) -> str:
    """`12m 30s`, `3h 05m`, `45s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


GIB = 2**30


def gib(size: float) -> str:
    """`17.3 GiB`, `12.0 MiB`"""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
