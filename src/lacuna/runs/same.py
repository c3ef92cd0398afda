"""Whether a run folder holds this very run: its settings against a config's. Nothing here imports torch."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lacuna.config.files import check, field_at, merge_layers, read_layer, setting_paths
from lacuna.config.names import find_path, output_path
from lacuna.config.training import TrainingConfig
from lacuna.errors import ConfigError
from lacuna.runs.folder import starts_of
from lacuna.runs.metrics import read_metrics

Config = TypeVar("Config", bound=TrainingConfig)


def has_run(folder: Path) -> bool:
    """Whether a run was begun there that holds anything to lose."""
    is_begun = (folder / "config.toml").exists()
    return is_begun and (any(folder.glob("checkpoints/step-*")) or bool(read_metrics(folder)))


def recorded(folder: Path, kind: type[Config]) -> Config:
    """The config that the folder's run was started with last. Raises ConfigError where it is none of this kind."""
    return check(kind, *merge_layers([read_layer(folder / "config.toml")], []))


def difference(folder: Path, config: TrainingConfig, processes: int, varied: Iterable[str] = ()) -> str | None:
    """What makes the folder's run another one than the config's; None where it is the same.

    processes: that the config's run has. varied: names that an experiment varies: its runs are told apart by them, so
    they must be equal, also where a resumed run may change them.
    Raises ConfigError where the folder's config.toml cannot be read.
    """
    trainer, found = config.model_dump()["trainer"], read_layer(folder / "config.toml").values.get("trainer")
    if found is None:
        raise ConfigError(
            f"{folder / 'config.toml'}: names no trainer: it is damaged; restore it, or choose another folder"
        )
    if found != trainer:
        return f"{output_path(trainer)} {folder} holds a {found} run"
    before = recorded(folder, type(config)).settings((starts_of(folder) or [{}])[-1].get("devices") or 1)
    fixed = {leaf for name in varied for leaf in _settings_under(find_path(name, trainer, {})[0], before)}
    different = changes(before, config.settings(processes), config.may_change - fixed)
    return f"the run in {folder} has other settings ({different})" if different else None


def _settings_under(path: str, settings: Iterable[str]) -> list[str]:
    return [name for name in settings if name == path or name.startswith(f"{path}.")]


def with_defaults(kind: type[TrainingConfig], before: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its settings, and of those that its version of lacuna did not have their defaults."""
    return {**{path: field_at(kind, path).default for path in setting_paths(kind)}, **before}


def changes(before: Mapping[str, Any], now: Mapping[str, Any], may_change: Iterable[str]) -> str:
    """Every setting that would make a resumed run another one, with both values; nothing where there is none."""
    different = [name for name in now if name not in may_change and before.get(name) != now[name]]
    return "; ".join(f"{name} was {before.get(name)!r}, now {now[name]!r}" for name in different)
