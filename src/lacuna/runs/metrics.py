"""metrics.jsonl: one JSON object a line, in the order of the steps; evaluation.json. Nothing here imports torch."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from lacuna.errors import RunError
from lacuna.files import write_whole
from lacuna.runs.folder import name_aside


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of a step; a line that a crash cut off is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines() if _step_of(line) is not None]


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


Mark = dict[str, Any]
"""How metrics.jsonl began when a checkpoint was taken: its `bytes`, and the `sha256` of these."""


class MetricsLog:
    """Appends lines; those of steps that will be taken again since the checkpoint are dropped when it opens."""

    def __init__(
        self, folder: Path, after_step: int, mark: Mark | None = None, report: Callable[[str], None] = print
    ) -> None:
        """mark: of the checkpoint that the run goes on from. A file that does not begin so has lost lines, or is
        another one: that is reported, the file is kept aside, and what can be read of it goes on."""
        path = folder / "metrics.jsonl"
        content = path.read_bytes() if path.exists() else b""
        kept = _lines_to(content, after_step)
        if mark is not None and hashlib.sha256(content[: mark["bytes"]]).hexdigest() == mark["sha256"]:
            kept = content[: mark["bytes"]]
        elif mark is not None:
            report(
                f"warning: {path} has lost lines, or is another one: it is not as it was at step {after_step}, from "
                f"which the run goes on{_kept_aside(path, content)}; curves of this run have gaps"
            )
        write_whole(path, kept.decode(errors="replace"))
        self._bytes, self._digest = len(kept), hashlib.sha256(kept)
        self._file: IO[str] = path.open("a", encoding="utf-8", buffering=1)

    def write(self, values: Mapping[str, Any]) -> None:
        line = json.dumps(dict(values)) + "\n"
        self._file.write(line)
        self._bytes += len(line.encode())
        self._digest.update(line.encode())

    def mark(self) -> Mark:
        """What has been written so far, made durable: no checkpoint is whole that knows of lines which may be lost."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _lines_to(content: bytes, step: int) -> bytes:
    """Whole lines of steps up to this one."""
    lines = [line for line in content.splitlines() if (found := _step_of(line)) is not None and found <= step]
    return b"".join(line + b"\n" for line in lines)


def _step_of(line: bytes) -> int | None:
    with suppress(ValueError):
        values = json.loads(line)
        if isinstance(values, dict) and type(values.get("step")) is int:
            return int(values["step"])
    return None


def _kept_aside(path: Path, content: bytes) -> str:
    """Keep what is there under another name; returns how that is said."""
    if not content:
        return ""
    aside = name_aside(path)
    aside.write_bytes(content)
    return f"; what was there is kept as {aside.name}"
