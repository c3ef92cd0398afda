"""The trainers and what their configs look like."""

from collections.abc import Mapping
from typing import Any

from lacuna.config.finetune import FinetuneConfig
from lacuna.config.training import FLAT, TrainingConfig

CONFIGS: dict[str, type[TrainingConfig] | type[FinetuneConfig]] = {**FLAT, "finetune": FinetuneConfig}


def trainer_of(values: Mapping[str, Any]) -> Any:
    """What a file's `trainer` key says; without one, a file with finetune's sections is finetune's. Else None."""
    has_sections = {"model", "dataset", "training"} <= values.keys() <= FinetuneConfig.model_fields.keys()
    return values.get("trainer", "finetune" if has_sections else None)
