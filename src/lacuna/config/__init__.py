"""Configs as plain data: read, layered, checked. Nothing here imports torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lacuna.config.finetune import FinetuneConfig


def load_config(*files: str | Path, settings: Mapping[str, Any] | None = None) -> "FinetuneConfig":
    """Read a `finetune` config from files, merged in order, the later one over the earlier one.

    settings: by dotted path, over all files: `{"training.lora_r": 32}`.
    Raises ConfigError that lists every problem with its file and line.
    """
    from lacuna.config.layers import load_finetune

    return load_finetune([str(file) for file in files], dict(settings or {}))[0]
