"""YAML in and out. Read by YAML 1.2's rules; written so that every reader finds the same values."""

import re
from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import yaml

from lacuna.errors import ConfigError

CORE_TAGS = [f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")]
CORE_SCALARS = [
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

LARGEST = 1_000_000
"""Values in a document, counting what an alias repeats: ten lines of aliases could otherwise fill the memory."""
DEEPEST = 3_000
"""Levels of nesting; libyaml's composer ends the process at some 20,000."""
LONGEST_KEY = 1_000
"""Characters. # ref: https://yaml.org/spec/1.2.2/#example-single-pair-explicit-entry"""


class YamlLoader(yaml.CSafeLoader):
    """PyYAML's safe C loader under YAML 1.2 rules: `3e-4` is a number, `on` and `1:30` are text, `010` is ten."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    yaml_constructors = {tag: yaml.CSafeLoader.yaml_constructors[tag] for tag in [*CORE_TAGS, None]}  # noqa: RUF012
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


def _integer(loader: YamlLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text, 10)


class _Writer(yaml.CSafeDumper):
    """Puts quotes around text that any reader could take for something else: PyYAML, OmegaConf or YAML 1.2."""


for _tag, _pattern, _first in CORE_SCALARS:
    YamlLoader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})$"), [c.strip("\0") for c in _first])
YamlLoader.add_constructor("tag:yaml.org,2002:int", _integer)
_Writer.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(0[xXoObB][0-9a-fA-F_]+|[.0-9][0-9_.:]*([eE][-+]?[0-9_.]*)?)$"),
    [*"-+.0123456789"],
)


def parse_yaml(text: str, name: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The values, and the line of every key by its dotted path. name: for messages.

    Raises ConfigError: broken syntax, a duplicate key, no mapping at the top, or a document without end.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=YamlLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ConfigError(f"{name}: not readable: nested too deeply")
        loader = YamlLoader(text)
        loader.name = name
        root = loader.get_single_node()
        lines = _lines(root, name)
        values = loader.construct_document(root) if root is not None else {}
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{name}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, KeyError) as error:
        raise ConfigError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: a config is a mapping of names to values, this is a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}, lines


def _lines(root: Any, name: str) -> dict[str, int]:
    """Dotted path to line. Raises ConfigError for a document that aliases make endless or huge."""
    lines: dict[str, int] = {}
    waiting: list[tuple[Any, str, int]] = [(root, "", 0)]
    count = 0
    while waiting:
        node, prefix, depth = waiting.pop()
        count += 1
        if count > LARGEST or depth > DEEPEST:
            raise ConfigError(f"{name}:{node.start_mark.line + 1}: an alias contains itself, or repeats too much")
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    lines[f"{prefix}{key.value}"] = key.start_mark.line + 1
                    waiting.append((value, f"{prefix}{key.value}.", depth + 1))
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(item, f"{prefix}{index}.", depth + 1) for index, item in enumerate(node.value)]
    return lines


def dump_yaml(values: dict[str, Any]) -> str:
    """Block YAML in the order of the keys: the same values give the same bytes.

    Raises ConfigError for what YAML has no word for, such as a date or an object.
    """
    lines: list[str] = []
    waiting: list[tuple[str, str, str, Any]] = [("", "", "", values)]
    while waiting:
        lead, mapping_indent, list_indent, value = waiting.pop()
        follows_dash = not lead or lead.endswith("-")
        if isinstance(value, dict) and value:
            parts = [(f"{_key(key)}:", f"{mapping_indent}  ", mapping_indent, item) for key, item in value.items()]
            indent = mapping_indent
        elif isinstance(value, list | tuple) and value:
            parts = [("-", f"{list_indent}  ", f"{list_indent}  ", item) for item in value]
            indent = list_indent
        else:
            lines.append(f"{lead} {_scalar(value)}" if lead else _scalar(value))
            continue
        if not follows_dash:
            lines.append(lead)
        heads = [f"{indent}{part[0]}" for part in parts]
        if follows_dash:
            heads[0] = f"{lead} {parts[0][0]}" if lead else parts[0][0]
        waiting += [(head, *part[1:]) for head, part in zip(heads, parts, strict=True)][::-1]
    return "\n".join(lines) + "\n"


def _key(value: Any) -> str:
    text = _scalar(value)
    if len(text) > LONGEST_KEY:
        raise ConfigError(f"the key {text[:40]}… has {len(text)} characters; YAML's readers take {LONGEST_KEY}")
    return text


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return _text(str(value))
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, dict | list | tuple):
        return "{}" if isinstance(value, dict) else "[]"
    raise ConfigError(f"{value!r} ({type(value).__name__}) cannot be written as YAML: use text or a number")


def _number(value: float) -> str:
    """`3e-05` is text to YAML 1.1, which wants a dot: `3.0e-05`."""
    text = float.__repr__(value)
    if text.lstrip("-") in ("inf", "nan"):
        return text.replace("inf", ".inf").replace("nan", ".nan")
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


@lru_cache(maxsize=65_536)
def _text(value: str) -> str:
    style = '"' if re.search("[\n\r\x85\u2028\u2029]", value) else None
    try:
        text: str = yaml.dump(value, Dumper=_Writer, width=2**30, allow_unicode=True, default_style=style)
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ConfigError(f"{half!r} is half a character (an unpaired surrogate), which no file can hold") from None
    return text.removesuffix("\n").removesuffix("\n...")
