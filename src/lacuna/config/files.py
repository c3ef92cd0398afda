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

from lacuna.config.training import TrainingConfig
from lacuna.config.trees import MISSING, get, leaves, merge, without
from lacuna.config.yaml_format import parse_yaml
from lacuna.errors import ConfigError
from lacuna.words import did_you_mean

Config = TypeVar("Config", bound=BaseModel)
NO_SECTION = "should be a mapping of settings"


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
    spelling = _spelling(model)
    named, strangers = by_name(values, spelling)
    found = [(path, _stranger(model, path, value, origins)) for path, value in strangers.items()]
    try:
        config = model.model_validate(named)
        if not found:
            return config
    except ValidationError as error:
        wrong_sections = tuple(f"{path}." for path in strangers if path in _sections(spelling))
        for details in [*error.errors(), *_hidden_disagreements(model, named, error)]:
            path = _spelled(details["loc"], spelling)
            is_hidden = path.startswith(wrong_sections) if path else any("." not in other for other in strangers)
            if not is_hidden:
                found.append((path, _problem(model, path, details, origins, flag)))
    if spelling:
        known = setting_paths(model)
        found.sort(key=lambda pair: _rank(pair[0], known))
    raise ConfigError(list(dict.fromkeys(line for _, problem in found for line in problem.split("\n"))))


def _rank(path: str, known: Sequence[str]) -> float:
    """Problems are told in the order of settings, what is unknown after all of its section."""
    setting, section = ".".join(path.split(".")[:2]), f"{path.partition('.')[0]}."
    if setting in known:
        return known.index(setting)
    return max((place for place, name in enumerate(known) if name.startswith(section)), default=len(known)) + 0.5


def _spelling(model: type[BaseModel]) -> Mapping[str, str]:
    return model.spelling if issubclass(model, TrainingConfig) else {}


def _sections(spelling: Mapping[str, str]) -> set[str]:
    return {path.partition(".")[0] for path in spelling.values() if "." in path}


def by_name(values: Mapping[str, Any], spelling: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a user has written, under the names of settings; and, by its dotted path, what is none.

    spelling: setting to its dotted path; empty where users write the names themselves.
    """
    if not spelling:
        return dict(values), {}
    sections, names = _sections(spelling), {path: name for name, path in spelling.items()}
    by_path: dict[str, Any] = {}
    for key, value in values.items():
        is_section = key in sections and isinstance(value, dict)
        by_path |= {f"{key}.{inner}": item for inner, item in value.items()} if is_section else {key: value}
    named = {names[path]: value for path, value in by_path.items() if path in names}
    return named, {path: value for path, value in by_path.items() if path not in names}


def _spelled(location: Sequence[Any], spelling: Mapping[str, str]) -> str:
    """The dotted path of what pydantic has found."""
    parts = [str(part) for part in location]
    return ".".join([spelling.get(part, part) for part in parts[:1]] + parts[1:])


def _stranger(model: type[BaseModel], path: str, value: Any, origins: Mapping[str, Layer]) -> str:
    where, setting = _place(path, origins)
    if path in _sections(_spelling(model)):
        return f"{where}{setting!r} is {_shown(value)} ({type(value).__name__}): {NO_SECTION}"
    return _unknown(model, path, where)


def _unknown(model: type[BaseModel], path: str, where: str) -> str:
    settings = setting_paths(model)
    elsewhere = [setting for setting in settings if setting.endswith(f".{path.rpartition('.')[2]}")]
    hint = f"; did you mean {elsewhere[0]!r}?" if elsewhere else did_you_mean(path, settings)
    return f"{where}unknown setting {path!r}{hint}"


def _shown(value: Any) -> str:
    return reprlib.repr(value) if isinstance(value, dict | list) else repr(value)


def _hidden_disagreements(model: type[BaseModel], values: Mapping[str, Any], error: ValidationError) -> list[Any]:
    """Settings of a section that disagree are found only where none is wrong in itself: without the wrong ones."""
    spelling = _spelling(model)
    if not all("." in _spelled(details["loc"], spelling) for details in error.errors()):
        return []
    rest = dict(values)
    for details in error.errors():
        path = ".".join(map(str, details["loc"][: 1 if spelling else 2]))
        rest = without(rest, path) if get(rest, path) is not MISSING else rest
    try:
        model.model_validate(rest)
    except ValidationError as again:
        return [details for details in again.errors() if details["type"] == "value_error"]
    return []


def _problem(
    model: type[BaseModel], path: str, details: Any, origins: Mapping[str, Layer], flag: Callable[[str], str] | None
) -> str:
    where, setting = _place(path, origins)
    if not path and flag is None and origins:
        where = f"{next(iter(origins.values())).name}: "
    match details["type"]:
        case "extra_forbidden":
            return _unknown(model, path, where)
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
            message = NO_SECTION if details["type"] == "model_type" else message
            return f"{where}{setting!r} is {_shown(given)} ({type(given).__name__}): {message}"


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
    """Dotted paths of all settings of a config, as users write them, sections left out."""
    if spelling := _spelling(model):
        return [*spelling.values()]
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
    if spelling := _spelling(model):
        return model.model_fields[next(name for name, place in spelling.items() if place == path)]
    *sections, name = path.split(".")
    for section in sections:
        inner = _section(model.model_fields[section])
        assert inner is not None, path
        model = inner
    return model.model_fields[name]


def without_subject(message: str) -> str:
    """Pydantic's `Input should be …` → `should be …`, to follow the setting's name."""
    return (message[0].lower() + message[1:]).replace("input ", "")
