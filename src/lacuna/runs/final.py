"""final/ as it was written: its files by size and hash. Nothing here imports torch."""

import os
from pathlib import Path
from typing import Any

from lacuna.errors import RunError
from lacuna.files import sha256_of
from lacuna.runs.folder import read_status
from lacuna.runs.identity import cached_sha256

WEIGHTS = ".safetensors"


def sync(path: Path) -> None:
    """Return when a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def entries_of(final: Path) -> dict[str, Any]:
    """Size and SHA-256 of each file."""
    files = sorted(path for path in final.rglob("*") if path.is_file())
    return {str(file.relative_to(final)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files}


def damage_of_final(run: Path) -> str | None:
    """What is wrong with the final folder of a finished run; None where all is as it was written, or nothing is known.

    Weights must be the same to the bit; any other file may have been edited or taken away, but not emptied.
    """
    written = (read_status(run) or {}).get("final")
    for name, entry in written.items() if isinstance(written, dict) else ():
        file = run / "final" / name
        if not file.is_file():
            if file.suffix == WEIGHTS:
                return f"{name} is missing"
            continue
        if file.stat().st_size == 0 and entry["bytes"]:
            return f"{name} is empty"
        if file.suffix == WEIGHTS and file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        if file.suffix == WEIGHTS and cached_sha256(file) != entry["sha256"]:
            return f"{name} has changed since it was written"
    return None


def refuse_damaged_final(run: Path) -> None:
    """Raises RunError where the final folder of a run is not as it was written."""
    if (run / "final").is_dir() and (damage := damage_of_final(run)) is not None:
        raise RunError(
            f"{run / 'final'}: damaged: {damage}; the command of the run makes it again from its last checkpoint"
        )
