"""The runs of an experiment: every combination once, derived values, names in texts. Pure."""

import ast
import itertools
import math
import operator
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from simpleeval import SimpleEval, safe_mult, safe_power

from lacuna.words import did_you_mean

Settings = dict[str, Any]
NAME_IN_TEXT = re.compile(r"(?<![${])\{([A-Za-z_][\w.]*)\}(?!\})")
"""`{lora_rank}`; `${output_dir}` is OmegaConf's, `{{ … }}` a template's."""
WORD = re.compile(r"(?<![\w.])[A-Za-z_][\w.]*")
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: safe_mult, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: safe_power, ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}  # fmt: skip
"""Not `^`, which would be an exclusive or, and not comparisons."""
FUNCTIONS = {"sqrt": math.sqrt, "log": math.log, "log2": math.log2, "min": min, "max": max, "round": round, "int": int}


def combinations(
    variables: Mapping[str, Sequence[Any]], paired: Sequence[Settings], seeds: Sequence[int]
) -> Iterator[Settings]:
    """The full product, the first variable slowest; paired settings move as one, seeds fastest."""
    factors = [[{name: value} for value in values] for name, values in variables.items()]
    factors += [list(paired)] * bool(paired) + [[{"seed": seed} for seed in seeds]] * bool(seeds)
    for parts in itertools.product(*factors):
        yield {name: value for part in parts for name, value in part.items()}


def matches(settings: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether a run agrees with all settings of an exclude entry."""
    return all(
        name in settings and settings[name] == value and isinstance(settings[name], bool) == isinstance(value, bool)
        for name, value in entry.items()
    )


def words_in(expression: str) -> list[str]:
    """The names of an expression, functions too, each once; a dotted name is one."""
    return list(dict.fromkeys(WORD.findall(expression)))


def evaluate(expression: str, names: Mapping[str, Any], known: Iterable[str] = ()) -> float:
    """Arithmetic over names. Raises ValueError: no arithmetic, an unknown name, or no finite number as its result.

    A dotted name is looked up whole, as `optimizer.lr`. known: names to guess a mistyped one from.
    """
    unknown = [word for word in words_in(expression) if word not in names and word not in FUNCTIONS]
    if unknown and re.fullmatch(r"[\w.]+", unknown[0]):
        hint = did_you_mean(unknown[0], [*known])
        raise ValueError(f"{expression!r} names {unknown[0]!r}, which is no number here{hint}")
    aliases = {word: f"lacuna_{index}" for index, word in enumerate(words_in(expression)) if word in names}
    evaluator = SimpleEval(
        operators=OPERATORS,
        functions=FUNCTIONS,
        allowed_attrs={},
        names={alias: names[name] for name, alias in aliases.items()},
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # simpleeval warns of an assignment or a second expression, and goes on
            result = evaluator.eval(WORD.sub(lambda word: aliases.get(word[0], word[0]), expression))
    except Exception as error:  # simpleeval's own, and whatever the arithmetic raises
        spoken = {alias: name for name, alias in aliases.items()}
        shown = re.sub(r"lacuna_\d+", lambda alias: spoken.get(alias[0], alias[0]), str(error))
        raise ValueError(f"{expression!r} cannot be worked out: {shown}") from None
    if isinstance(result, bool) or not isinstance(result, int | float) or not math.isfinite(result):
        raise ValueError(f"{expression!r} gives {result!r}, which is no number")
    return result


def fill(text: str, names: Mapping[str, Any], in_path: bool = False) -> str:
    """Put the values of known names for `{name}`; other braces stay as they are.

    in_path: every name must be known, and a value is one folder name: its slashes become underscores.
    Raises ValueError for a name that stands for a list or a mapping, one that is nearly a known one, and, in a path,
    an unknown one or a value that is no folder name.
    """

    def value_of(found: re.Match[str]) -> str:
        name = found[1]
        if name not in names:
            hint = did_you_mean(name, list(names))
            if hint or in_path:
                raise ValueError(f"{text!r}: {{{name}}} is unknown{hint}; known: {', '.join(names)}")
            return found[0]
        value = names[name]
        if isinstance(value, dict | list):
            raise ValueError(f"{text!r}: {{{name}}} is no single value, but {value!r}")
        written = str(value).lower() if value is None or isinstance(value, bool) else str(value)
        if in_path and written.replace("/", "_") in ("", ".", ".."):
            raise ValueError(f"{text!r}: {{{name}}} is {written!r}, which is no folder name")
        return written.replace("/", "_") if in_path else written

    return NAME_IN_TEXT.sub(value_of, text) if "{" in text else text


def names_in(text: str) -> set[str]:
    """The names that a text asks for."""
    return {found[1] for found in NAME_IN_TEXT.finditer(text)}
