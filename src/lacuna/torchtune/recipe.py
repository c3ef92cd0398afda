"""What a torchtune recipe reads, from its source and from the configs that are shipped for it. Nothing is imported."""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lacuna.config.trees import MISSING, Values, get, kind, leaves
from lacuna.config.yaml_format import parse_yaml
from lacuna.errors import Problem
from lacuna.words import did_you_mean

METHODS_OF_A_MAPPING = {"get", "pop", "keys", "items"}
READ_BY_ANOTHER_NAME = {"profiler"}
REFUSES_FP16 = re.compile(r"fp16 \w+ is not supported")
COMPONENT = "a mapping with a _component_"
ROLES = ("system", "user", "assistant", "ipython", "tool")


@dataclass(frozen=True)
class RecipeFacts:
    """read: top-level keys that the recipe looks at. needed: dotted paths that it cannot do without.
    shipped: torchtune's own configs for it. kinds: what its configs hold at a top-level key, over all recipes."""

    name: str
    read: frozenset[str]
    needed: frozenset[str]
    shipped: tuple[Values, ...]
    kinds: Mapping[str, frozenset[str]]
    refuses_fp16: bool


@cache
def recipe_facts(name: str, script: Path, configs: Sequence[Path], others: Sequence[Path]) -> RecipeFacts:
    """From every `cfg.key`, `cfg.get("key")`, `cfg["key"]`, `"key" in cfg` and `cfg_model.key` of the script.

    configs: those that are shipped for this recipe; others: for the other ones.
    """
    source = script.read_text(encoding="utf-8")
    read: set[str] = set(READ_BY_ANOTHER_NAME)
    attributes: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=holder, attr=key) if key not in METHODS_OF_A_MAPPING:
                if (section := _section(holder)) is not None:
                    attributes.add(f"{section}.{key}".lstrip("."))
            case (
                ast.Call(func=ast.Attribute(value=holder, attr="get" | "pop"), args=[ast.Constant(str(key)), *_])
                | ast.Subscript(value=holder, slice=ast.Constant(str(key)))
                | ast.Compare(left=ast.Constant(str(key)), comparators=[holder])
            ) if _section(holder) == "":
                read.add(key)
    shipped, rest = (
        tuple(parse_yaml(file.read_text(encoding="utf-8"), str(file))[0] for file in files)
        for files in (configs, others)
    )
    kinds: dict[str, set[str]] = {}
    for key, value in (item for config in (*shipped, *rest) for item in config.items()):
        is_component = isinstance(value, dict) and "_component_" in value
        kinds.setdefault(key, {"null"}).add(COMPONENT if is_component else kind(value))
    needed = {path for path in attributes if all(get(config, path) is not MISSING for config in shipped)}
    return RecipeFacts(
        name,
        frozenset(read | {path.partition(".")[0] for path in attributes}),
        frozenset(needed if shipped else ()),
        shipped,
        {key: frozenset(found) for key, found in kinds.items()},
        bool(REFUSES_FP16.search(source)),
    )


def _section(holder: ast.expr) -> str | None:
    """`cfg` → "", `cfg.model` and `cfg_model` → "model"; None for what is no config."""
    text = ast.unparse(holder)
    found = re.fullmatch(r"(?:self\._?)?cfg(?:[._](\w+))?", text)
    return None if found is None else found[1] or ""


def check_recipe(facts: RecipeFacts, values: Values, touched: Sequence[str], is_shipped: bool) -> Iterator[Problem]:
    """What the recipe would miss, never read, or refuse.

    touched: paths that the user set. is_shipped: whether the rest comes from torchtune itself.
    """
    for path in sorted(facts.needed):
        if get(values, path) is MISSING and get(values, path.rpartition(".")[0] or path) is not None:
            yield Problem("", path, f"is missing: the recipe {facts.name} cannot do without it", "add it", "start")
    mine = {path.partition(".")[0] for path in touched}
    referenced = {name for _, value in leaves(values) for name in re.findall(r"\$\{(\w+)[.}]", str(value))}
    for key, value in values.items():
        held = [config[key] for config in facts.shipped if key in config]
        if key not in facts.read and key not in referenced and (key in mine or not (is_shipped or value in held)):
            hint = did_you_mean(str(key), sorted(facts.read))
            what = f"the recipe {facts.name} never reads it{hint}"
            yield Problem("", str(key), what, "correct the name, or leave it out")
            continue
        found = COMPONENT if isinstance(value, dict) and "_component_" in value else kind(value)
        kinds = facts.kinds.get(key, frozenset())
        allowed = kinds | ({"a list"} if COMPONENT in kinds else set())
        if key in facts.needed and None not in held and COMPONENT in kinds:
            allowed -= {"null"}
        if kinds - {"null"} and found not in allowed and "${" not in str(value):
            what = f"is {value!r}, and should be {' or '.join(sorted(kinds - {'null'}))}"
            yield Problem("", key, what, "correct it")
    component = str(get(values, "model._component_")).rpartition(".")[2]
    if facts.name.startswith("full_") and re.match(r"q?[ld]ora_", component):
        what = f"{component} has adapters, whose weights {facts.name} does not find in the checkpoint"
        yield Problem("", "model._component_", what, "take a lora recipe, or the model without", "start")
    if values.get("dtype") == "fp16" and facts.refuses_fp16:
        yield Problem("", "dtype", f"fp16 is refused by {facts.name}", "use bf16 or fp32", "start")
    yield from _combinations(values)


def _combinations(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Settings that the recipes refuse together, or that do nothing alone."""
    tokenizer = part if isinstance(part := values.get("tokenizer"), dict) else {}
    data = values.get("dataset")
    parts = [part for part in (data if isinstance(data, list) else [data]) if isinstance(part, dict)]
    if any(part.get("packed") is True for part in parts) and tokenizer.get("max_seq_len") is None:
        what = "needs tokenizer.max_seq_len, which is null"
        yield Problem("", "dataset.packed", what, "set max_seq_len, such as 2048", "start")
    template = tokenizer.get("prompt_template")
    for role, pair in template.items() if isinstance(template, dict) else ():
        if role not in ROLES or not (isinstance(pair, list) and [type(text) for text in pair] == [str, str]):
            what = f"{role}: {pair!r} is not a role with the texts before and after it"
            yield Problem("", "tokenizer.prompt_template", what, f"write one of {', '.join(ROLES)}, and two texts")
    if values.get("optimizer_in_bwd") is True:
        if values.get("clip_grad_norm") is not None:
            what = "cannot be with optimizer_in_bwd: true"
            yield Problem("", "clip_grad_norm", what, "set one of them to null or false", "start")
        if values.get("gradient_accumulation_steps") not in (None, 1):
            what = "cannot be above 1 with optimizer_in_bwd: true"
            yield Problem("", "gradient_accumulation_steps", what, "set either back", "start")
    if values.get("enable_activation_offloading") is True:
        if not str(values.get("device")).startswith("cuda"):
            what = "works with device: cuda alone"
            yield Problem("", "enable_activation_offloading", what, "set it to false", "start")
        if values.get("enable_activation_checkpointing") is not True:
            what = "needs enable_activation_checkpointing: true"
            yield Problem("", "enable_activation_offloading", what, "set both, or neither", "start")
