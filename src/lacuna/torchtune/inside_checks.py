"""Runs inside torchtune's environment, as a script: torchtune's own `validate`, and what it misses.

Reads one JSON request on standard input and answers with one JSON line: a list of run, path, what, todo, kind.
It can import torchtune and what torchtune needs, but not lacuna.
"""

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
MOVED = dict.fromkeys(("template", "chat_format"), "; torchtune reads how prompts are written from prompt_template")
"""Arguments of data sets in torchtune 0.2."""
LACKS = "torchtune's environment lacks"
Found = tuple[str, str, str, str]
"""Path, what, what to do, and the kind of problem, as in checks.py."""


def nearest(word: str, known: Any) -> str:
    lowered = {str(name).lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return f"; did you mean {lowered[found[0]]!r}?" if found else ""


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
        return ImportError(f"does not exist{nearest(name, siblings)}")
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
    if origin is list and isinstance(value, list):
        return all(fits(item, parts[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list) and (... in parts or (len(value) == len(parts) and all(map(fits, value, parts))))
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


def walk(root: Any) -> Iterator[tuple[str, Any]]:
    """Every mapping, list and value below a mapping, with its dotted path."""
    waiting: list[tuple[str, Any]] = [("", root)]
    while waiting:
        path, node = waiting.pop()
        yield path, node
        if isinstance(node, dict | list):
            items = node.items() if isinstance(node, dict) else enumerate(node)
            waiting += [(f"{path}.{key}" if path else str(key), item) for key, item in items]


def check_component(path: str, node: dict[str, Any], touched: set[str]) -> Iterator[Found]:
    name = node["_component_"]
    here = f"{path}._component_"
    if not isinstance(name, str) or not name:
        yield here, f"is {name!r}, not the dotted path of a component", "write one, such as torch.optim.AdamW", "wrong"
        return
    if isinstance(found := locate(name), ImportError):
        todo = "write the path of something that torchtune's environment can import"
        yield here, f"{name} {found}", todo, "here" if LACKS in str(found) else "wrong"
        return
    if (package := PACKAGES.get(name.rpartition(".")[2])) and importlib.util.find_spec(package) is None:
        yield here, f"{name} needs {package}, which {LACKS}", f"pip install {package} there", "here"
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
                todo = f"delete it: '~{place}: null' under controls"
                yield place, f"is left over: {name} takes no {key!r}", todo, "wrong"
            else:
                hint = MOVED.get(key) if is_dataset else None
                what = f"{name} takes no {key!r}{hint or nearest(str(key), allowed)}"
                yield place, what, "correct the name, or leave it out", "wrong"
        elif key in known and not fits(value, known[key].annotation):
            wanted = inspect.formatannotation(known[key].annotation)
            what = f"is {value!r} ({type(value).__name__}), {name} takes {wanted}"
            yield place, what, "write a value of that type", "wrong"
    if "." in path and not is_dataset:
        return
    handed = [*[p for p in known if p not in given][: len(positional)], *BY_NAME.get(section, [])]
    for key, parameter in known.items():
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL,
        )  # fmt: skip
        if not optional and key not in given and key not in handed:
            yield f"{path}.{key}", f"is missing: {name} cannot do without it", "add it", "start"


def check_names(config: dict[str, Any]) -> Iterator[Found]:
    """Dotted paths and names outside `_component_`."""
    from torchtune.training import ModelType  # type: ignore[import-not-found]

    template = config["tokenizer"].get("prompt_template") if isinstance(config.get("tokenizer"), dict) else None
    for path, name in (("tokenizer.prompt_template", template), ("collate_fn", config.get("collate_fn"))):
        if isinstance(name, str) and isinstance(found := locate(name), ImportError):
            yield path, f"{name} {found}", "name one that exists", "here" if LACKS in str(found) else "wrong"
    for section, node in config.items():
        if str(section).endswith("checkpointer") and isinstance(node, dict) and "model_type" in node:
            known = [kind.name for kind in ModelType]
            if node["model_type"] not in known:
                hint = nearest(str(node["model_type"]).upper(), known)
                what = f"torchtune knows no model type {node['model_type']!r}{hint}"
                yield f"{section}.model_type", what, f"write one of {', '.join(known)}", "wrong"


def check_interpolations(config: Any) -> Iterator[Found]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for path, value in walk(OmegaConf.to_container(config, resolve=False)):
        if value == "???":
            yield path, "is ???, a value that is still to be given", "give it", "start"
        elif isinstance(value, str) and "${" in value:
            try:
                OmegaConf.select(config, path, throw_on_resolution_failure=True)
            except OmegaConfBaseException as error:
                what = f"{value!r} leads nowhere: {str(error).splitlines()[0]}"
                yield path, what, "name a setting of this config", "wrong"


def malformed(file: str) -> Iterator[Found]:
    """The values that OmegaConf cannot parse, such as `${output_dir` without an end."""
    import yaml
    from omegaconf import OmegaConf

    for path, value in walk(yaml.safe_load(Path(file).read_text(encoding="utf-8"))):
        if isinstance(value, str):
            try:
                OmegaConf.create({"value": value})
            except Exception as error:  # OmegaConf's own, and ANTLR's
                what = f"{value!r} is no text that OmegaConf can read: {str(error).splitlines()[0]}"
                yield path, what, "close what ${ opens", "wrong"


def check_run(run: dict[str, Any]) -> list[Found]:
    from omegaconf import DictConfig, OmegaConf
    from torchtune.config import validate  # type: ignore[import-not-found]

    try:
        config = OmegaConf.load(run["file"])
    except Exception as error:  # OmegaConf's own, yaml's, and ANTLR's
        what = f"is not readable: {str(error).splitlines()[0]}"
        return [*malformed(run["file"])] or [("", what, "correct the file", "wrong")]
    if not isinstance(config, DictConfig) or not config:
        return [("", "the config is empty", "start from a recipe or an own config", "wrong")]
    found = list(check_interpolations(config))
    values: dict[str, Any] = dict(OmegaConf.to_container(config, resolve=not found))  # type: ignore[arg-type]
    for path, node in walk(values):
        if isinstance(node, dict) and "_component_" in node:
            found += check_component(path, node, set(run["touched"]))
    found += check_names(values)
    try:
        validate(config)
    except Exception as error:  # torchtune lets seven kinds escape, TypeError and its own among them
        if not found:
            what = f"torchtune refuses it: {' '.join(str(error).split())}"
            found.append(("", what, "see torchtune's message", "wrong"))
    return found


def main() -> None:
    warnings.filterwarnings("ignore")
    answer, sys.stdout = sys.stdout, sys.stderr
    request = json.load(sys.stdin)
    sys.path[:] = [*sys.path[1:], os.getcwd()]  # components of the user's own, found as torchtune finds them
    problems = []
    for run in request["runs"]:
        for path, what, todo, kind in check_run(run):
            problems.append({"run": run["id"], "path": path, "what": what, "todo": todo, "kind": kind})
    print(json.dumps(problems), file=answer)


if __name__ == "__main__":
    main()
