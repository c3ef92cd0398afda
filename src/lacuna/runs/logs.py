"""What the end of a log says. Nothing here imports torch."""

import os
import re
from pathlib import Path

TAIL_BYTES = 4096


def tail(file: Path | str, after: int = 0) -> str:
    """The last lines of a file after so many bytes, the first perhaps cut; nothing where it cannot be read."""
    try:
        with open(file, "rb", buffering=0) as opened:
            opened.seek(max(after, os.fstat(opened.fileno()).st_size - TAIL_BYTES))
            return opened.read().decode(errors="replace")
    except OSError:
        return ""


def last_words(text: str) -> str:
    """The line that says most about the end: the last exception's or error's, else the last with words in it."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    errors = [line for line in lines if re.match(r"(?:[\w.]*(?:Error|Exception|Exit|Interrupt)|error): \S", line)]
    spoken = [line for line in lines if re.search(r"\w", line)]
    return (errors or spoken or [""])[-1]
