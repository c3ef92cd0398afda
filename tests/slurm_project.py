"""What a user of a real SLURM has."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from conftest import SCRIPTS
from slurm_cluster import Cluster

ROOT = Path(__file__).parents[1]


class Project:
    """A working directory of a user of the cluster."""

    def __init__(self, folder: Path, cluster: Cluster, model: Path, data: Path) -> None:
        self.folder, self.cluster = folder, cluster
        self.files = {"model": str(model), "data": str(data)}
        folder.mkdir()

    def lacuna(self, *words: str | Path, code: int = 0) -> str:
        """What the command prints."""
        command = [str(SCRIPTS / "lacuna"), *map(str, words)]
        environment = {**self.cluster.environment, "PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *words: str) -> str:
        """The id of the job."""
        (id,) = re.findall(r"^submitted: job (\d+)$", self.lacuna("slurm", *words, "--submit"), re.MULTILINE)
        return str(id)

    def rows(self, where: str) -> list[dict[str, Any]]:
        """`lacuna status` as it is now, whatever it was half a minute ago."""
        for file in (self.cluster.folder / "cache").glob("lacuna/*"):
            file.unlink()
        found: list[dict[str, Any]] = json.loads(self.lacuna("status", where, "--json"))
        return found

    def step(self, run: str) -> int:
        """The last logged one."""
        file = self.folder / run / "metrics.jsonl"
        lines = file.read_text().splitlines()[:-1] if file.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def wait_for_step(self, run: str, step: int) -> None:
        self.cluster.wait_until(lambda: self.step(run) >= step, 180)

    def wait_for_requeue(self, job: str) -> None:
        """Then it starts at once."""
        self.cluster.wait_until(lambda: self.cluster.jobs().get(job) == "PENDING", 120)
        self.cluster.start_now(job)

    def logs(self) -> str:
        return "".join(file.read_text() for file in sorted(self.folder.glob("slurm/logs/*.log")))
