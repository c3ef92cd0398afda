"""Runs inside torchtune's environment, as a script: torchtune's own `validate`, and what it misses.

Reads one JSON request on standard input and answers with one JSON line: a list of run, path, what, todo, is_local.
It can import torchtune and what torchtune needs, but not lacuna.
"""

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import json
import os
import pydoc
import re
import sys
import types
import typing
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

POSITIONAL = {"optimizer": ["params"], "lr_scheduler": ["optimizer"], "dataset": ["tokenizer"]}
"""What a recipe hands over besides the section's own settings, by position …"""
BY_NAME = {"lr_scheduler": ["num_training_steps", "last_epoch"], "checkpointer": ["should_load_recipe_state"]}
"""… and by name."""
PACKAGES = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard", "CometLogger": "comet_ml"}
GONE = {
    "AlpacaInstructTemplate": "it left torchtune in 0.3: use the dataset torchtune.datasets.alpaca_dataset, which "
    "writes Alpaca's format itself",
}
NO_FP16 = re.compile(r"fp16 \w+ is not supported")
LACKS = "torchtune's environment lacks"
Found = tuple[str, str, str]
"""Path, what, what to do."""


def nearest(word: str, known: Any) -> str:
    found = difflib.get_close_matches(word, [*known], n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


@cache
def locate(path: str) -> Any:
    """The object of a dotted path, or the reason as an exception object."""
    try:
        found = pydoc.locate(path)
    except pydoc.ErrorDuringImport as error:
        if isinstance(error.value, ModuleNotFoundError):
            return ImportError(f"needs {error.value.name}, which {LACKS}")
        return ImportError(f"cannot be imported: {error.value}")
    if found is None:
        parent, _, name = path.rpartition(".")
        try:
            siblings = dir(importlib.import_module(parent))
        except (ImportError, ValueError):
            siblings = []
        hint = GONE.get(name) or nearest(name, siblings)
        return ImportError(f"does not exist{'; ' + hint if name in GONE else hint}")
    return found if callable(found) else ImportError("is not callable")


@cache
def signature(path: str) -> inspect.Signature:
    return inspect.signature(locate(path))


@cache
def loader_arguments(source: str | None) -> set[str]:
    """What datasets.load_dataset takes for this kind of file; for a hub data set, what any kind takes."""
    from datasets import load_dataset
    from datasets.packaged_modules.csv.csv import CsvConfig
    from datasets.packaged_modules.json.json import JsonConfig
    from datasets.packaged_modules.parquet.parquet import ParquetConfig
    from datasets.packaged_modules.text.text import TextConfig

    kinds = {"json": JsonConfig, "csv": CsvConfig, "parquet": ParquetConfig, "text": TextConfig}
    chosen = [kinds[source]] if source in kinds else list(kinds.values())
    common = [p.name for p in inspect.signature(load_dataset).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return {*common, *(field.name for kind in chosen for field in dataclasses.fields(kind))}


def fits(value: Any, annotation: Any) -> bool:
    """Whether a plain value can be what an annotation asks for; unknown annotations fit everything."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin in (list, tuple) and isinstance(value, list):
        return all(fits(item, parts[0]) for item in value) if origin is list and parts else True
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (bool, str):
        return isinstance(value, annotation)
    wanted = origin or annotation
    return isinstance(value, wanted) if wanted in (list, dict) else True


def components(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping with a `_component_`, wherever it stands."""
    if isinstance(node, dict):
        if "_component_" in node:
            yield path, node
        for key, value in node.items():
            yield from components(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from components(value, f"{path}.{index}")


def check_component(path: str, node: dict[str, Any], touched: set[str]) -> Iterator[Found]:
    name = node["_component_"]
    here = f"{path}._component_"
    if not isinstance(name, str) or not name:
        yield here, f"is {name!r}, not the dotted path of a component", "write one, such as torch.optim.AdamW"
        return
    if isinstance(found := locate(name), ImportError):
        yield here, f"{name} {found}", "write the path of something that torchtune's environment can import"
        return
    if (package := PACKAGES.get(name.rpartition(".")[2])) and importlib.util.find_spec(package) is None:
        yield here, f"{name} needs {package}, which {LACKS}", f"pip install {package} there"
    section = re.sub(r"^\w+_(checkpointer)$", r"\1", path)
    is_dataset = path == "dataset" or bool(re.fullmatch(r"datasets?\.\d+", path))
    known = signature(name).parameters
    positional = POSITIONAL["dataset"] if is_dataset else POSITIONAL.get(section, [])
    given = {key: value for key, value in node.items() if key != "_component_"}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    others = loader_arguments(node.get("source")) if is_dataset else set(given)
    allowed = set(known) | (others if takes_any else set())
    for key, value in given.items():
        place = f"{path}.{key}"
        if key not in allowed:
            if here in touched and place not in touched:
                yield place, f"is left over: {name} takes no {key!r}", f"delete it: '~{place}: null' under controls"
            else:
                yield place, f"{name} takes no {key!r}{nearest(str(key), known)}", "correct the name, or leave it out"
        elif key in known and not fits(value, known[key].annotation):
            wanted = inspect.formatannotation(known[key].annotation)
            yield place, f"is {value!r} ({type(value).__name__}), {name} takes {wanted}", "write a value of that type"
    if "." in path and not is_dataset:
        return
    handed = [*[p for p in known if p not in given][: len(positional)], *BY_NAME.get(section, [])]
    for key, parameter in known.items():
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL,
        )  # fmt: skip
        if not optional and key not in given and key not in handed:
            yield f"{path}.{key}", f"is missing: {name} cannot do without it", "add it"


def check_rules(config: dict[str, Any]) -> Iterator[Found]:
    """Combinations that the recipes refuse, or that do nothing."""
    tokenizer = section if isinstance(section := config.get("tokenizer"), dict) else {}
    data = config.get("dataset")
    parts = [data] if isinstance(data, dict) else [part for part in data or [] if isinstance(part, dict)]
    if any(part.get("packed") is True for part in parts) and tokenizer.get("max_seq_len") is None:
        yield "dataset.packed", "needs tokenizer.max_seq_len, which is null", "set max_seq_len, such as 2048"
    template = tokenizer.get("prompt_template")
    if isinstance(template, str) and isinstance(found := locate(template), ImportError):
        yield (
            "tokenizer.prompt_template",
            f"{template} {found}",
            "name a template that exists, such as " + ("torchtune.data.SummarizeTemplate"),
        )
    if config.get("optimizer_in_bwd") is True:
        if config.get("clip_grad_norm") is not None:
            yield "clip_grad_norm", "cannot be with optimizer_in_bwd: true", "set one of them to null or false"
        if (config.get("gradient_accumulation_steps") or 1) > 1:
            yield "gradient_accumulation_steps", "cannot be above 1 with optimizer_in_bwd: true", "set either back"
    if config.get("enable_activation_offloading") is True:
        if not str(config.get("device")).startswith("cuda"):
            yield "enable_activation_offloading", "works with device: cuda alone", "set it to false"
        if config.get("enable_activation_checkpointing") is not True:
            yield "enable_activation_offloading", "needs enable_activation_checkpointing: true", "set both"


@dataclasses.dataclass(frozen=True)
class RecipeKeys:
    """Top-level keys. read: those that the recipe looks at; needed: those it cannot do without; shipped: those that
    some of torchtune's own configs for it hold, read or not."""

    read: set[str]
    needed: set[str]
    shipped: set[str]
    refuses_fp16: bool


@cache
def recipe_keys(packages: str, recipe: str) -> RecipeKeys | None:
    """From the recipe's source: every `cfg.key`, `cfg.get("key")`, `cfg["key"]` and `"key" in cfg`."""
    file = Path(packages, "recipes", f"{recipe}.py")
    if not file.exists():
        return None
    source = file.read_text()
    read, attributes = {"profiler"}, set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id="cfg" | "config"), attr=key):
                attributes.add(key)
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id="self"), attr="cfg" | "_cfg"), attr=key):
                attributes.add(key)
            case ast.Call(
                func=ast.Attribute(value=holder, attr="get" | "pop"), args=[ast.Constant(value=str(key)), *_]
            ):
                if ast.unparse(holder) in ("cfg", "config", "self.cfg", "self._cfg"):
                    read.add(key)
            case ast.Subscript(value=ast.Name(id="cfg"), slice=ast.Constant(value=str(key))):
                read.add(key)
            case ast.Compare(left=ast.Constant(value=str(key)), comparators=[ast.Name(id="cfg")]):
                read.add(key)
    attributes -= {"get", "pop", "keys", "items", "instantiate", "parse", "log_config", "validate"}
    held = shipped_keys(packages, recipe)
    return RecipeKeys(
        read | attributes,
        set.intersection(attributes, *held) if held else set(),
        set.union(set(), *held),
        bool(NO_FP16.search(source)),
    )


@cache
def shipped_keys(packages: str, recipe: str) -> list[set[str]]:
    from omegaconf import OmegaConf
    from torchtune._recipe_registry import get_all_recipes  # type: ignore[import-not-found]

    files = [
        Path(packages, "recipes", "configs", c.file_path)
        for r in get_all_recipes()
        if r.name == recipe
        for c in r.configs
    ]
    return [set(OmegaConf.load(file)) for file in files if file.exists()]


def check_keys(config: dict[str, Any], text: str, keys: RecipeKeys, recipe: str, mine: set[str]) -> Iterator[Found]:
    """mine: top-level keys that the user answers for."""
    for key in sorted(keys.needed - set(config)):
        yield key, f"is missing: the recipe {recipe} cannot do without it", "add it"
    for key in config:
        if key not in keys.read and key in mine and not re.search(rf"\$\{{{re.escape(str(key))}[.}}]", text):
            hint = nearest(str(key), keys.read)
            yield str(key), f"the recipe {recipe} never reads it{hint}", "correct the name, or leave it out"
    if config.get("dtype") == "fp16" and keys.refuses_fp16:
        yield "dtype", f"fp16 is refused by {recipe}", "use bf16 or fp32"


def check_interpolations(config: Any) -> Iterator[Found]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    waiting: list[tuple[str, Any]] = [("", OmegaConf.to_container(config, resolve=False))]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{path}.{key}" if path else str(key), item) for key, item in items]
        elif value == "???":
            yield path, "is ???, a value that is still to be given", "give it"
        elif isinstance(value, str) and "${" in value:
            try:
                OmegaConf.select(config, path, throw_on_resolution_failure=True)
            except OmegaConfBaseException as error:
                yield path, f"{value!r} leads nowhere: {str(error).splitlines()[0]}", "name a setting of this config"


def check_run(packages: str, run: dict[str, Any], shipped: bool) -> list[Found]:
    from omegaconf import DictConfig, OmegaConf
    from torchtune.config import validate  # type: ignore[import-not-found]

    text = Path(run["file"]).read_text(encoding="utf-8")
    config = OmegaConf.load(run["file"])
    if not isinstance(config, DictConfig) or not config:
        return [("", "the config is empty", "start from a recipe or an own config")]
    found = list(check_interpolations(config))
    values: dict[str, Any] = dict(OmegaConf.to_container(config, resolve=not found))  # type: ignore[arg-type]
    touched = set(run["touched"])
    for path, node in components(values):
        found += check_component(path, node, touched)
    keys = recipe_keys(packages, run["recipe"]) if run["recipe"] else None
    if keys:
        set_here = {path.split(".")[0] for path in touched}
        found += check_keys(
            values, text, keys, run["recipe"], set_here if shipped else set(values) - keys.shipped | set_here
        )
        for section in sorted({"model", "tokenizer", "optimizer", "dataset", "checkpointer", "loss"} & keys.needed):
            part = values.get(section, [])
            if not isinstance(part, list) and not (isinstance(part, dict) and "_component_" in part):
                found.append((section, f"is {part!r}, not a mapping with a _component_", "write one"))
    found += check_rules(values)
    try:
        validate(config)
    except Exception as error:  # torchtune lets seven kinds escape, TypeError and its own among them
        if not found:
            found.append(("", f"torchtune refuses it: {' '.join(str(error).split())}", "see torchtune's message"))
    return found


def main() -> None:
    warnings.filterwarnings("ignore")
    answer, sys.stdout = sys.stdout, sys.stderr
    request = json.load(sys.stdin)
    sys.path[:] = [*sys.path[1:], os.getcwd()]  # components of the user's own, found as torchtune finds them
    problems = []
    for run in request["runs"]:
        for path, what, todo in check_run(request["packages"], run, request["shipped"]):
            is_local = LACKS in what
            problems.append({"run": run["id"], "path": path, "what": what, "todo": todo, "is_local": is_local})
    print(json.dumps(problems), file=answer)


if __name__ == "__main__":
    main()
