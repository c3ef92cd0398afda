"""Nested mappings over each other. Pure: results share what did not change, and nothing is changed in place.

Mappings merge, everything else replaces. Nothing here recurses, so that depth is no limit.
"""

from collections.abc import Iterator, Mapping
from typing import Any

Values = dict[str, Any]
MISSING = object()


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> Values:
    """The base with the override on top: a new mapping, whose unchanged parts are the base's own."""
    merged = dict(base)
    waiting: list[tuple[Values, Mapping[str, Any]]] = [(merged, override)]
    while waiting:
        target, source = waiting.pop()
        for key, value in source.items():
            below = target.get(key)
            if isinstance(below, dict) and isinstance(value, dict):
                target[key] = dict(below)
                waiting.append((target[key], value))
            else:
                target[key] = value
    return merged


def nested(path: str, value: Any) -> Values:
    """`a.b` and 1 → `{a: {b: 1}}`."""
    for key in reversed(path.split(".")):
        value = {key: value}
    result: Values = value
    return result


def get(values: Mapping[str, Any], path: str) -> Any:
    """What stands at a dotted path, or MISSING."""
    here: Any = values
    for key in path.split("."):
        if not isinstance(here, Mapping) or key not in here:
            return MISSING
        here = here[key]
    return here


def without(values: Mapping[str, Any], path: str) -> Values:
    """The mapping less what stands at a dotted path, which must be there."""
    result = here = dict(values)
    *parents, last = path.split(".")
    for key in parents:
        here[key] = dict(here[key])
        here = here[key]
    del here[last]
    return result


def prefixes(path: str) -> list[str]:
    """`a.b.c` → `a`, `a.b`, `a.b.c`."""
    parts = path.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted path and its value, in order; an empty mapping is a leaf, a list too."""
    waiting = [(f"{prefix}{key}", value) for key, value in values.items()][::-1]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict) and value:
            waiting += [(f"{path}.{key}", item) for key, item in value.items()][::-1]
        else:
            yield path, value


def agree(old: Any, new: Any) -> bool:
    """Whether new may stand where old stood: the same kind of value, or null. A whole number may be a fraction."""
    kinds = [kind(old), kind(new)]
    return "null" in kinds or kinds[0] == kinds[1]


def kind(value: Any) -> str:
    """What a person calls such a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = ((int | float, "a number"), (str, "text"), (dict, "a mapping"), (list | tuple, "a list"))
    return next((name for type_, name in names if isinstance(value, type_)), type(value).__name__)


def type_conflicts(base: Mapping[str, Any], override: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each path where the kinds of value disagree, and how: `is text in the base, here a number`."""
    waiting: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [("", base, override)]
    while waiting:
        prefix, below, above = waiting.pop()
        for key, value in above.items():
            old = below.get(key, MISSING)
            path = f"{prefix}{key}"
            if isinstance(old, dict) and isinstance(value, dict):
                waiting.append((f"{path}.", old, value))
            elif old is not MISSING and not agree(old, value):
                yield path, f"is {kind(old)} in the base config ({_short(old)}), here {kind(value)} ({_short(value)})"


def _short(value: Any) -> str:
    text = "…" if isinstance(value, dict) else repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def copied(value: Any) -> Any:
    """A copy that shares no mapping and no list with the original."""
    holder = [value]
    waiting: list[tuple[Any, Any]] = [(holder, 0)]
    while waiting:
        parent, key = waiting.pop()
        here = parent[key]
        if isinstance(here, dict):
            parent[key] = dict(here)
        elif isinstance(here, list | tuple):
            parent[key] = list(here)
        else:
            continue
        waiting += [(parent[key], name) for name in (here if isinstance(here, dict) else range(len(here)))]
    return holder[0]
