"""The trainers and what their configs look like."""

from collections.abc import Mapping, Sequence
from typing import Any

from lacuna.config.files import Layer, check, flag_name, merge_layers, read_layer, set_flag, setting_paths
from lacuna.config.finetune import FinetuneConfig
from lacuna.config.training import FLAT, TrainingConfig
from lacuna.errors import ConfigError
from lacuna.words import did_you_mean

CONFIGS: dict[str, type[TrainingConfig]] = {**FLAT, "finetune": FinetuneConfig}
NO_TRAINER = f"no `trainer` key says what this is for: add trainer = {' or '.join(map(repr, CONFIGS))}"


def top_keys(model: type[TrainingConfig]) -> list[str]:
    """What stands at the top of a file: settings and sections, in order."""
    return [*dict.fromkeys(path.partition(".")[0] for path in setting_paths(model))]


def trainer_of(values: Mapping[str, Any]) -> Any:
    """What a file's `trainer` key says; without one, a file with finetune's sections is finetune's. Else None."""
    has_sections = {"model", "dataset", "training"} <= values.keys() <= {*top_keys(FinetuneConfig)}
    return values.get("trainer", "finetune" if has_sections else None)


def named_trainer(layer: Layer) -> str:
    """The trainer of lacuna's that a file is for. Raises ConfigError where there is none of that name."""
    trainer = trainer_of(layer.values)
    if not isinstance(trainer, str) or trainer not in CONFIGS:
        hint = did_you_mean(str(trainer), [*CONFIGS])
        raise ConfigError(f"{layer.where('trainer')}: no trainer is called {trainer!r}{hint}; {', '.join(CONFIGS)} are")
    return trainer


def is_torchtune(layer: Layer) -> bool:
    """Whether a file is a config of torchtune's: it has components, and names no trainer of ours."""
    sections = [value for value in layer.values.values() if isinstance(value, dict)]
    return trainer_of(layer.values) is None and any("_component_" in section for section in sections)


def load_trainer_config(files: Sequence[str]) -> TrainingConfig:
    """The checked config that files make, the later over the earlier, for whichever trainer they are for.

    Raises ConfigError that lists every problem with its file and line.
    """
    layers = [read_layer(file) for file in files]
    naming = [layer for layer in layers if trainer_of(layer.values) is not None]
    if not naming:
        raise ConfigError(f"{', '.join(files)}: {NO_TRAINER}")
    trainer = named_trainer(naming[-1])
    model = CONFIGS[trainer]
    values, origins = merge_layers(layers, model.alternatives)
    return check(model, values, origins, flag_name if trainer in FLAT else set_flag)
