"""W&B and TensorBoard, where the config asks for them."""

import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lacuna.config.training import TrainingConfig
from lacuna.errors import MissingExtraError, RunError
from lacuna.files import write_json

OFFLINE = "set WANDB_MODE=offline, which keeps the metrics in the run folder"
Log = Callable[[int, Mapping[str, float]], None]


def check_tracker(config: TrainingConfig, report: Callable[[str], None]) -> None:
    """Without a W&B account the run is logged offline, and that is said. Raises MissingExtraError."""
    if config.tracker == "none":
        return
    if importlib.util.find_spec(config.tracker) is None:
        raise MissingExtraError("track", config.tracker)
    if config.tracker == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        try:
            wandb.login()
        except wandb.errors.Error as error:
            os.environ["WANDB_MODE"] = "offline"
            report(f"warning: W&B: {error} The run is logged offline, in its folder; `wandb sync` uploads it later")


@contextmanager
def open_tracker(config: TrainingConfig, folder: Path, start_step: int, settings: Mapping[str, Any]) -> Iterator[Log]:
    """A function (step, values) that reports to the tracker; a resumed run goes on in the same W&B run or event log."""
    if config.tracker == "wandb":
        yield from _wandb(config, folder, settings)
    elif config.tracker == "tensorboard":
        yield from _tensorboard(folder, start_step)
    else:
        yield lambda step, values: None


def _wandb(config: TrainingConfig, folder: Path, settings: Mapping[str, Any]) -> Iterator[Log]:
    import wandb

    remembered = folder / "wandb_run.json"
    run_id = json.loads(remembered.read_text())["id"] if remembered.exists() else uuid.uuid4().hex[:8]
    write_json(remembered, {"id": run_id})
    try:
        started = wandb.init(
            project=config.tracker_project or "lacuna",
            name=folder.name,
            id=run_id,
            resume="allow",
            dir=folder.absolute(),
            mode="offline" if os.environ.get("WANDB_MODE") == "offline" else None,
            config=dict(settings),
        )
    except wandb.errors.Error as error:
        raise RunError(f"tracker 'wandb': {error} Or {OFFLINE}") from error
    with started as run:
        yield lambda step, values: run.log(dict(values), step=step)


def _tensorboard(folder: Path, start_step: int) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1) as writer:

        def log(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        yield log
