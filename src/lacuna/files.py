"""Files written whole, their hashes, their locks, and paths that name nobody."""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sha256_of_all(files: Iterable[Path]) -> str | None:
    """SHA-256 over the files' names and hashes; None where there are none."""
    lines = [f"{file.name} {sha256_of(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there with all its text, or as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Any) -> None:
    write_whole(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def try_lock(file: IO[str] | int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file, or say that another has it; whatever ends the process closes the file, and frees it.

    Raises OSError where the file system has no locks.
    # ref: https://man7.org/linux/man-pages/man2/flock.2.html (a lock belongs to the open file, which children share)
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file, as far as this machine can see."""
    try:
        with path.open() as file:
            return not try_lock(file, fcntl.LOCK_SH)
    except OSError:
        return False


def without_home(text: str) -> str:
    """The home folder, which names the user, as `~`."""
    home = str(Path.home())
    return re.sub(rf'(?<![^=:"]){re.escape(home)}(?=[/"]|$)', "~", text) if home != "/" else text
