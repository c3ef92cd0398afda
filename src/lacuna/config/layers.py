"""A finetune config from its files and from what was set beside them."""

from collections.abc import Mapping, Sequence
from typing import Any

from lacuna.config.files import Layer, check, merge_layers, read_layer, set_flag
from lacuna.config.finetune import FinetuneConfig
from lacuna.config.training import FLAT
from lacuna.config.trees import merge, nested, prefixes
from lacuna.config.yaml_format import parse_yaml
from lacuna.errors import ConfigError

SET = "--set"


def load_finetune(files: Sequence[str], settings: Mapping[str, Any]) -> tuple[FinetuneConfig, dict[str, Layer]]:
    """The checked config, and the layer of each value that is no default. Raises ConfigError."""
    layers = [read_layer(file) for file in files]
    for layer in layers:
        wanted = layer.values.get("trainer")
        if isinstance(wanted, str) and wanted in FLAT:
            raise ConfigError(f"{layer.where('trainer')}: this is a config for {wanted!r}: use `lacuna {wanted}`")
    layers.append(Layer(SET, _nested(settings)))
    if not any(layer.values for layer in layers):
        raise ConfigError(f"{', '.join(files)}: the config is empty")
    values, origins = merge_layers(layers, FinetuneConfig.alternatives)
    return check(FinetuneConfig, values, origins, set_flag), origins


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """`["training.lora_r=32"]` → `{"training.lora_r": 32}`; the value is read as YAML. Raises ConfigError."""
    settings: dict[str, Any] = {}
    for word in words:
        path, equals, value = word.partition("=")
        if not equals or not path:
            raise ConfigError(f"{SET} {word!r}: write it as {SET} training.lora_r=32")
        if path in settings:
            raise ConfigError(f"{SET} {path} is given twice: keep one of them")
        try:
            settings[path] = parse_yaml(f"value: {value}", SET)[0]["value"]
        except ConfigError:
            raise ConfigError(f"{SET} {word}: {value!r} is no value in YAML") from None
    return settings


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for path, value in settings.items():
        for section in prefixes(path)[:-1]:
            if not isinstance(settings.get(section, {}), dict):
                raise ConfigError(f"{SET} {path}: {section!r} has a value already")
        values = merge(values, nested(path, value))
    return values
