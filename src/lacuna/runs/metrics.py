"""metrics.jsonl: one JSON object a line, in the order of the steps; evaluation.json. Nothing here imports torch."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from lacuna.errors import RunError
from lacuna.runs.folder import write_whole


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of a step; a line that a crash cut off is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and type(values.get("step")) is int:
            lines.append(values)
    return lines


def validation_losses(folder: Path) -> dict[int, float]:
    """Validation loss by step."""
    return {line["step"]: line["validation_loss"] for line in read_metrics(folder) if "validation_loss" in line}


def read_evaluation(folder: Path) -> dict[str, float]:
    """What the user's own evaluation wrote into evaluation.json; nothing where it wrote none.

    Raises RunError for anything but one flat JSON object of finite numbers.
    """
    path = folder / "evaluation.json"
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise RunError(f'{path}: should be one JSON object of numbers, such as {{"accuracy": 0.81}}')
    numbers = {name: _finite(value) for name, value in values.items()}
    if wrong := [name for name, number in numbers.items() if number is None]:
        raise RunError([f"{path}: {name!r} is {values[name]!r}, which is no finite number" for name in wrong])
    return {name: number for name, number in numbers.items() if number is not None}


def _finite(value: Any) -> float | None:
    """A number as a float that is finite; None for anything else."""
    with suppress(OverflowError):
        return float(value) if type(value) in (int, float) and math.isfinite(value) else None
    return None


class MetricsLog:
    """Appends lines; those of steps that will be taken again since the checkpoint are dropped when it opens."""

    def __init__(self, folder: Path, after_step: int) -> None:
        kept = [line for line in read_metrics(folder) if line["step"] <= after_step]
        path = folder / "metrics.jsonl"
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file: IO[str] = path.open("a", encoding="utf-8", buffering=1)

    def write(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(dict(values)) + "\n")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
