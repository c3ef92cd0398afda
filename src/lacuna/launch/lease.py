"""Who may start a run: a lock in its folder, held by the caller and by the run that it has started.

The trainers' own lock is taken seconds after their start. This one is taken before, and its descriptor is handed down:
whichever of caller and run is killed, the other still holds it; when both are gone, so is the lock.
"""

import os
from pathlib import Path

from lacuna.errors import RunError
from lacuna.files import is_locked, try_lock
from lacuna.runs.folder import is_held

LEASE = ".lease"


def take(folder: Path) -> int | None:
    """An open descriptor that holds the run, whose folder is made; None where another has it, or trains there.

    Closing it frees the run, unless a process that it was handed to still lives.
    Raises RunError where the folder cannot be written, or its file system has no locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lease = os.open(folder / LEASE, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunError(f"output_dir {folder}: cannot be written: {error.strerror}") from None
    try:
        is_taken = try_lock(lease) and not is_held(folder)
    except OSError as error:
        os.close(lease)
        raise RunError(f"output_dir {folder}: its file system has no locks: {error.strerror}") from None
    if is_taken:
        return lease
    os.close(lease)
    return None


def is_leased(folder: Path) -> bool:
    """Whether another caller, or a run that one has started, holds the run, as far as this machine can see."""
    return is_locked(folder / LEASE)
