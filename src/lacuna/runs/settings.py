"""Whether a run folder holds this very run: its settings against a config's. Nothing here imports torch."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lacuna.config.files import check, merge_layers, read_layer
from lacuna.config.finetune import FinetuneConfig
from lacuna.config.training import TrainingConfig
from lacuna.runs.folder import starts_of
from lacuna.runs.metrics import read_metrics


def has_run(folder: Path) -> bool:
    """Whether a run was begun there that holds anything to lose."""
    is_begun = (folder / "config.toml").exists()
    return is_begun and (any(folder.glob("checkpoints/step-*")) or bool(read_metrics(folder)))


def difference(folder: Path, config: TrainingConfig | FinetuneConfig, processes: int) -> str | None:
    """What makes the folder's run another one than the config's; None where it is the same.

    processes: that the config's run has. Raises ConfigError where the folder's config.toml cannot be read.
    """
    values, origins = merge_layers([read_layer(folder / "config.toml")], [])
    if values.get("trainer") != config.model_dump()["trainer"]:
        return f"output_dir {folder} holds a {values.get('trainer')} run"
    before = check(type(config), values, origins).settings((starts_of(folder) or [{}])[-1].get("devices", 1))
    different = changes(before, config.settings(processes), config.may_change)
    return f"the run in {folder} has other settings ({different})" if different else None


def changes(before: Mapping[str, Any], now: Mapping[str, Any], may_change: Iterable[str]) -> str:
    """Every setting that would make a resumed run another one, with both values; nothing where there is none."""
    different = [name for name in now if name not in may_change and before.get(name) != now[name]]
    return "; ".join(f"{name} was {before.get(name)!r}, now {now[name]!r}" for name in different)
