"""YAML and TOML in, layers of settings over each other, one checked config out.

A layer is one file or the command line. Later layers win; every value knows the layer and line it came from.
"""

import difflib
import re
import tomllib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from lacuna.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel)

YAML_1_2_TAGS = [f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")]
YAML_1_2_SCALARS = [
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
]
"""Tag, pattern and first characters of the YAML 1.2 core schema. # ref: https://yaml.org/spec/1.2.2/#103-core-schema"""


class YamlLoader(yaml.CSafeLoader):
    """PyYAML's safe C loader under YAML 1.2 rules: `3e-4` is a number, `on` and `1:30` are text, `010` is ten."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    yaml_constructors = {  # noqa: RUF012
        tag: yaml.CSafeLoader.yaml_constructors[tag] for tag in [*YAML_1_2_TAGS, None]
    }
    name: str

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first_lines: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self.name}:{line}: a key is a name, not a list or a mapping")
            if key_node.value in first_lines:
                raise ConfigError(
                    f"{self.name}:{line}: the key {key_node.value!r} is already on line "
                    f"{first_lines[key_node.value]}: keep one of them"
                )
            first_lines[key_node.value] = line
        return super().construct_mapping(node, deep)


def _yaml_integer(loader: YamlLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text, 10)


for _tag, _pattern, _first in YAML_1_2_SCALARS:
    YamlLoader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})$"), [c.strip("\0") for c in _first])
YamlLoader.add_constructor("tag:yaml.org,2002:int", _yaml_integer)


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
    return _parse_toml(path, text) if path.suffix == ".toml" else _parse_yaml(path, text)


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


def _parse_yaml(path: Path, text: str) -> Layer:
    try:
        loader = YamlLoader(text)
        loader.name = str(path)
        root = loader.get_single_node()
        values = loader.construct_document(root) if root is not None else {}
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of names to values, this is a {type(values).__name__}")
    lines: dict[str, int] = {}
    _note_lines(root, "", (), lines, str(path))
    return Layer(str(path), {str(key): value for key, value in values.items()}, lines)


def _note_lines(node: Any, prefix: str, above: tuple[Any, ...], lines: dict[str, int], name: str) -> None:
    """Write the line of every key into lines. Raises ConfigError for a mapping that holds itself by an alias."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        line = key.start_mark.line + 1
        if any(value is parent for parent in (*above, node)):
            raise ConfigError(f"{name}:{line}: {key.value!r} contains itself")
        lines[f"{prefix}{key.value}"] = line
        _note_lines(value, f"{prefix}{key.value}.", (*above, node), lines, name)


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


def check(model: type[Config], values: Mapping[str, Any], origins: Mapping[str, Layer]) -> Config:
    """Build the config, or raise one ConfigError that lists every problem with its file and line."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = [line for details in error.errors() for line in _problem(model, details, origins).split("\n")]
        raise ConfigError(list(dict.fromkeys(problems))) from None


def _problem(model: type[BaseModel], details: Any, origins: Mapping[str, Layer]) -> str:
    path = ".".join(str(part) for part in details["loc"])
    top = str(details["loc"][0]) if details["loc"] else ""
    where = f"{origins[top].where(path if path in origins[top].lines else top)}: " if top in origins else ""
    match details["type"]:
        case "extra_forbidden":
            return f"{where}unknown setting {path!r}{did_you_mean(path, list(model.model_fields))}"
        case "missing":
            sources = dict.fromkeys(layer.name for layer in origins.values() if layer.lines)
            return f"{', '.join(sources) or 'the config'}: {path!r} is missing: add it, or pass {flag_name(path)}"
        case "value_error":
            return f"{where}{details['ctx']['error']}"
        case _:
            given = details["input"]
            return f"{where}{top!r} is {given!r} ({type(given).__name__}): {without_subject(details['msg'])}"


def without_subject(message: str) -> str:
    """Pydantic's `Input should be …` → `should be …`, to follow the setting's name."""
    return (message[0].lower() + message[1:]).replace("input ", "")


def flag_name(setting: str) -> str:
    """`learning_rate` → `--learning-rate`."""
    return "--" + setting.replace("_", "-")
