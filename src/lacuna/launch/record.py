"""Which jobs were submitted: a small file beside the run mapping, or, of a single config, beside its script."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lacuna.experiment.folder import MAPPING
from lacuna.runs.folder import write_json

RECORD = "slurm_jobs.json"


@dataclass(frozen=True)
class Submission:
    """A job of SLURM's. sha256: of the mapping or config. Task k of an array is run offset + k, of count runs.

    directory: where its runs start. time: of the submission, in seconds since 1970.
    """

    job: str
    target: str
    sha256: str
    offset: int
    count: int
    directory: str
    script: str
    logs: str
    time: float


def record_of(target: Path, scripts: Path) -> Path:
    return target.with_name(RECORD) if target.name == MAPPING else scripts / f"{target.stem}_jobs.json"


def read_submissions(target: Path, scripts: Path = Path()) -> list[Submission]:
    """In the order of submission."""
    file = record_of(target, scripts)
    return [Submission(**done) for done in json.loads(file.read_text())] if file.exists() else []


def add_submission(done: Submission, target: Path, scripts: Path) -> None:
    write_json(record_of(target, scripts), [asdict(one) for one in [*read_submissions(target, scripts), done]])
