"""Which jobs were submitted: a small file beside the run mapping, or, of a single config, beside its script."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from lacuna.errors import RunError
from lacuna.files import write_json
from lacuna.runs.mapping import MAPPING

RECORD = "slurm_jobs.json"


@dataclass(frozen=True)
class Submission:
    """A job of SLURM's. sha256: of the mapping or config. Task k of an array is run offset + k.

    tasks: of the array, as SLURM writes them (`0-3,7`).
    time: of the submission, in seconds since 1970.
    """

    job: str
    target: str
    sha256: str
    offset: int
    tasks: str
    script: str
    logs: str
    time: float

    def numbers(self) -> list[int]:
        """The tasks."""
        ends = [part.partition("-")[::2] for part in self.tasks.split(",")]
        return [number for first, last in ends for number in range(int(first), int(last or first) + 1)]


def spans(numbers: Iterable[int]) -> str:
    """Numbers as SLURM writes those of an array: 0, 1, 2, 3, 7 → `0-3,7`."""
    ends: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def record_of(target: Path, scripts: Path) -> Path:
    return target.with_name(RECORD) if target.name == MAPPING else scripts / f"{target.stem}_jobs.json"


def read_submissions(target: Path, scripts: Path = Path()) -> list[Submission]:
    """In the order of submission. Raises RunError where the record cannot be read."""
    file = record_of(target, scripts)
    try:
        return [Submission(**done) for done in json.loads(file.read_bytes())] if file.exists() else []
    except (OSError, ValueError, TypeError):
        raise RunError(
            f"{file}: is damaged, so its jobs are not known: look for them with squeue, and delete it"
        ) from None


def add_submission(done: Submission, target: Path, scripts: Path) -> None:
    write_json(record_of(target, scripts), [asdict(one) for one in [*read_submissions(target, scripts), done]])
