"""YAML and TOML in, layers of settings over each other, one checked config out.

A layer is one file or the command line. Later layers win; every value knows the layer and line it came from.
"""

import re
import reprlib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lacuna.config.trees import MISSING, get, leaves, merge, without
from lacuna.config.yaml_format import parse_yaml
from lacuna.errors import ConfigError
from lacuna.words import did_you_mean

Config = TypeVar("Config", bound=BaseModel)


@dataclass(frozen=True)
class Layer:
    """Settings from one place: a file, or the command line."""

    name: str
    values: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)
    """Dotted path to line number, where the layer is a file."""

    def where(self, path: str) -> str:
        """`file:line` of a setting, or the flag's name."""
        return f"{self.name}:{self.lines[path]}" if path in self.lines else self.name


def read_layer(path: str | Path) -> Layer:
    """Read a `.toml`, `.yaml` or `.yml` file; its ending decides.

    Raises ConfigError: no such file, an unknown ending, broken syntax, a duplicate key, or no mapping at the top.
    """
    path = Path(path)
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise ConfigError(f"{path}: a config file ends in .toml, .yaml or .yml")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        folder = path.parent
        nearby = [str(p) for p in sorted(folder.glob("*")) if p.suffix in (".toml", ".yaml", ".yml")]
        raise ConfigError(f"{path}: no such config file{did_you_mean(str(path), nearby)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return _parse_toml(path, text) if path.suffix == ".toml" else Layer(str(path), *parse_yaml(text, str(path)))


def _parse_toml(path: Path, text: str) -> Layer:
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise ConfigError(f"{path}{':' + line[1] if line else ''}: not valid TOML: {error}") from None
    lines: dict[str, int] = {}
    section = ""
    for number, line_text in enumerate(text.split("\n"), 1):
        if header := re.match(r"\s*\[+([^\[\]]+)\]+\s*(#|$)", line_text):
            found = header[1].strip()
            section = found + "."
        elif key := re.match(r"\s*([\w.\-\"']+)\s*=", line_text):
            found = section + re.sub(r"[\"']", "", key[1])
        else:
            continue
        for end in [*(dot.start() for dot in re.finditer(r"\.", found)), len(found)]:
            lines.setdefault(found[:end], number)
    return Layer(str(path), values, lines)


def merge_layers(
    layers: Sequence[Layer], alternatives: Sequence[tuple[str, str]]
) -> tuple[dict[str, Any], dict[str, Layer]]:
    """Put layers over each other, the later one on top; mappings are merged, all else is replaced.

    alternatives: pairs of settings, as dotted paths, that exclude each other (`epochs`, `steps`); a later layer's one
    removes an earlier layer's other. Within one layer both stay, for the model to refuse.
    Returns the values and, for the dotted path of each, the layer that it came from, in the order of the layers.
    """
    values: dict[str, Any] = {}
    origins: dict[str, Layer] = {}
    for layer in layers:
        given = dict(leaves(layer.values))
        for pair in alternatives:
            for one, other in (pair, pair[::-1]):
                if other not in given and given.get(one) is not None and get(values, other) is not MISSING:
                    values = without(values, other)
                    origins.pop(other, None)
        values = merge(values, layer.values)
        origins = {path: origin for path, origin in origins.items() if path not in given} | dict.fromkeys(given, layer)
    return values, origins


def flag_name(setting: str) -> str:
    """`learning_rate` → `--learning-rate`."""
    return "--" + setting.replace("_", "-")


def set_flag(path: str) -> str:
    """`training.lora_r` → `--set training.lora_r=…`."""
    return f"--set {path}=…"


def check(
    model: type[Config],
    values: Mapping[str, Any],
    origins: Mapping[str, Layer],
    flag: Callable[[str], str] | None = flag_name,
) -> Config:
    """Build the config, or raise one ConfigError that lists every problem with its file and line.

    flag: how a setting is given on the command line, for messages; None where it cannot be.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        found = [*error.errors(), *_hidden_disagreements(model, values, error)]
        problems = [line for details in found for line in _problem(model, details, origins, flag).split("\n")]
        raise ConfigError(list(dict.fromkeys(problems))) from None


def _hidden_disagreements(model: type[BaseModel], values: Mapping[str, Any], error: ValidationError) -> list[Any]:
    """Settings of a section that disagree are found only where none is wrong in itself: without the wrong ones."""
    if not all(len(details["loc"]) > 1 for details in error.errors()):
        return []
    rest = dict(values)
    for details in error.errors():
        path = ".".join(map(str, details["loc"][:2]))
        rest = without(rest, path) if get(rest, path) is not MISSING else rest
    try:
        model.model_validate(rest)
    except ValidationError as again:
        return [details for details in again.errors() if details["type"] == "value_error"]
    return []


def _problem(
    model: type[BaseModel], details: Any, origins: Mapping[str, Layer], flag: Callable[[str], str] | None
) -> str:
    path = ".".join(str(part) for part in details["loc"])
    where, setting = _place(path, origins)
    if not path and flag is None and origins:
        where = f"{next(iter(origins.values())).name}: "
    match details["type"]:
        case "extra_forbidden":
            settings = setting_paths(model)
            elsewhere = [setting for setting in settings if setting.endswith(f".{path.rpartition('.')[2]}")]
            hint = f"; did you mean {elsewhere[0]!r}?" if elsewhere else did_you_mean(path, settings)
            return f"{where}unknown setting {path!r}{hint}"
        case "missing":
            sources = dict.fromkeys(layer.name for layer in origins.values() if layer.lines)
            inner = [name for name in setting_paths(model) if name.startswith(f"{path}.")]
            needed = [name for name in inner if field_at(model, name).is_required()] or [path]
            return "\n".join(
                f"{', '.join(sources) or 'the config'}: {name!r} is missing: add it"
                f"{f', or pass {flag(name)}' if flag is not None else ''}"
                for name in needed
            )
        case "value_error":
            lines = str(details["ctx"]["error"]).split("\n")
            return "\n".join(f"{_where_mentioned(line, origins) or where}{line}" for line in lines)
        case _:
            given, message = details["input"], without_subject(details["msg"])
            message = "should be a mapping of settings" if details["type"] == "model_type" else message
            value = reprlib.repr(given) if isinstance(given, dict | list) else repr(given)
            return f"{where}{setting!r} is {value} ({type(given).__name__}): {message}"


def _where_mentioned(line: str, origins: Mapping[str, Layer]) -> str:
    """`file:line: ` of the last layer's setting in a sections' disagreement; nothing where it names none."""
    named = [path for path in origins if "." in path and re.search(rf"(?<![\w.]){re.escape(path)}(?![\w.])", line)]
    return f"{origins[named[-1]].where(named[-1])}: " if named else ""


def _place(path: str, origins: Mapping[str, Layer]) -> tuple[str, str]:
    """`file:line: ` and the name of the setting that a path of pydantic's, which may lead into its value, is about."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        setting = ".".join(parts[:end])
        layer = origins.get(setting) or next((o for p, o in origins.items() if p.startswith(f"{setting}.")), None)
        if layer is not None:
            return f"{layer.where(path if path in layer.lines else setting)}: ", setting
    return "", path


def setting_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted paths of all settings of a config, sections left out."""
    paths = []
    for name, details in model.model_fields.items():
        section = _section(details)
        paths += setting_paths(section, f"{prefix}{name}.") if section is not None else [f"{prefix}{name}"]
    return paths


def _section(details: FieldInfo) -> type[BaseModel] | None:
    """The model of a section, which may be one that can be left out."""
    kinds = get_args(details.annotation) or (details.annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def field_at(model: type[BaseModel], path: str) -> FieldInfo:
    """The field of a setting, by its dotted path."""
    *sections, name = path.split(".")
    for section in sections:
        inner = _section(model.model_fields[section])
        assert inner is not None, path
        model = inner
    return model.model_fields[name]


def without_subject(message: str) -> str:
    """Pydantic's `Input should be …` → `should be …`, to follow the setting's name."""
    return (message[0].lower() + message[1:]).replace("input ", "")
