"""YAML and TOML in, layers of settings over each other, one checked config out.

A layer is one file or the command line. Later layers win; every value knows the layer and line it came from.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lacuna.config.yaml_format import parse_yaml
from lacuna.errors import ConfigError

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


def did_you_mean(word: str, candidates: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or nothing where nothing is near."""
    nearest = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def merge_layers(
    layers: Sequence[Layer], alternatives: Sequence[tuple[str, str]]
) -> tuple[dict[str, Any], dict[str, Layer]]:
    """Put flat layers over each other, the later one on top.

    alternatives: pairs of settings that exclude each other (`epochs`, `steps`); a later layer's one removes an
    earlier layer's other. Within one layer both stay, for the model to refuse.
    Returns the values and, for each, the layer that it came from.
    """
    values: dict[str, Any] = {}
    origins: dict[str, Layer] = {}
    for layer in layers:
        for first, second in alternatives:
            for given, other in ((first, second), (second, first)):
                if given in layer.values and other not in layer.values and layer.values[given] is not None:
                    values.pop(other, None)
                    origins.pop(other, None)
        values.update(layer.values)
        origins.update(dict.fromkeys(layer.values, layer))
    return values, origins


def check(
    model: type[Config], values: Mapping[str, Any], origins: Mapping[str, Layer], has_flags: bool = True
) -> Config:
    """Build the config, or raise one ConfigError that lists every problem with its file and line.

    has_flags: whether a setting may also come as a flag, so that messages may say so.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = [
            line for details in error.errors() for line in _problem(model, details, origins, has_flags).split("\n")
        ]
        raise ConfigError(list(dict.fromkeys(problems))) from None


def _problem(model: type[BaseModel], details: Any, origins: Mapping[str, Layer], has_flags: bool) -> str:
    path = ".".join(str(part) for part in details["loc"])
    top = str(details["loc"][0]) if details["loc"] else ""
    where = f"{origins[top].where(path if path in origins[top].lines else top)}: " if top in origins else ""
    if not details["loc"] and not has_flags:
        where = f"{next(iter(origins.values())).name}: " if origins else ""
    match details["type"]:
        case "extra_forbidden":
            return f"{where}unknown setting {path!r}{did_you_mean(path, list(model.model_fields))}"
        case "missing":
            sources = dict.fromkeys(layer.name for layer in origins.values() if layer.lines)
            or_flag = f", or pass {flag_name(path)}" if has_flags else ""
            return f"{', '.join(sources) or 'the config'}: {path!r} is missing: add it{or_flag}"
        case "value_error":
            return "\n".join(f"{where}{line}" for line in str(details["ctx"]["error"]).split("\n"))
        case _:
            given = details["input"]
            return f"{where}{top!r} is {given!r} ({type(given).__name__}): {without_subject(details['msg'])}"


def without_subject(message: str) -> str:
    """Pydantic's `Input should be …` → `should be …`, to follow the setting's name."""
    return (message[0].lower() + message[1:]).replace("input ", "")


def flag_name(setting: str) -> str:
    """`learning_rate` → `--learning-rate`."""
    return "--" + setting.replace("_", "-")
