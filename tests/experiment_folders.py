"""Experiments whose runs are plain files, as if they had been trained."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lacuna
from lacuna.config.files import check, read_layer
from lacuna.config.trainers import CONFIGS
from lacuna.files import write_json
from lacuna.runs.folder import write_config

SFT = {
    "trainer": "sft", "model_name": "org/model", "dataset": "data.jsonl", "validation_share": 0.1, "steps": 100,
    "batch_size": 8, "save_every": 50, "log_every": 10,
}  # fmt: skip
FINETUNE = {"model": {"path": "org/model"}, "dataset": {"path": "data.jsonl"}, "training": {"max_steps": 100}}


def write_experiment(folder: Path, base: Mapping[str, Any] = SFT, **experiment: Any) -> list[dict[str, Any]]:
    """Generate FOLDER/configs, whose runs go to FOLDER/runs; the entries of its mapping."""
    folder.mkdir(exist_ok=True)
    (folder / "base.yaml").write_text(json.dumps(base))
    controls = {"output_dir": str(folder / "runs"), **experiment.pop("controls", {})}
    whole = {"experiment_name": "study", "base_config_file": str(folder / "base.yaml"), **experiment}
    done = lacuna.generate({**whole, "controls": controls}, folder / "configs", force=True)
    return list(done.mapping["runs"])


def write_run(
    folder: Path,
    entry: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]] = (),
    state: str = "finished",
    facts: Mapping[str, Any] | None = None,
    **status: Any,
) -> Path:
    """The run folder of an entry, with these lines of metrics. facts: of provenance.json."""
    run = Path(entry["output_dir"])
    run.mkdir(parents=True)
    layer = read_layer(folder / "configs" / entry["config"])
    write_config(run, check(CONFIGS[layer.values["trainer"]], layer.values, {}))
    write_json(run / "status.json", {"state": state, "step": 100, "total_steps": 100, "process": 0, **status})
    write_json(run / "provenance.json", {"starts": [{"device": "CPU", "devices": 1, **(facts or {})}]})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def validated(*losses: float, steps: int = 100) -> list[dict[str, Any]]:
    """Validation losses, the last one at the last step."""
    every = steps // len(losses)
    return [{"step": every * (index + 1), "validation_loss": loss} for index, loss in enumerate(losses)]
