"""A job of an array, and the base config of the runs that it starts."""

from pathlib import Path
from typing import Any

from lacuna.config.yaml_format import dump_yaml
from lacuna.launch.batch_script import Job


def job(**changes: Any) -> Job:
    facts = {
        "name": "study", "target": Path("/c/run_mapping.yaml"), "sha256": "5" * 64, "directory": Path("/d"),
        "logs": Path("/d/slurm/logs"), "offset": 0, "tasks": (0, 1, 2, 3), "gpus": 1, "resumes": True,
    }  # fmt: skip
    return Job(**{**facts, **changes})


def write_base(folder: Path, model: str = "m", data: str = "d.jsonl", **changes: Any) -> Path:
    values = {
        "trainer": "sft", "model_name": model, "dataset": data, "output_dir": "runs/one", "sequence_length": 64,
        "batch_size": 2, "micro_batch_size": 2, "steps": 5, "learning_rate": 1e-3, "device": "cpu", "log_every": 1,
        "save_every": 1000,
    }  # fmt: skip
    path = folder / "one.yaml"
    path.write_text(dump_yaml({**values, **changes}))
    return path
