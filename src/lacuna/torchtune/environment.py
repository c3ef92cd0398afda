"""Everything that knows torchtune: where it is, its recipes and configs, its own checks. Never imported here.

torchtune's pins exclude today's peft, so it lives in an environment of its own, which is asked as a subprocess.
"""

import fnmatch
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lacuna.config.trees import leaves
from lacuna.config.yaml_format import parse_yaml
from lacuna.errors import ConfigError, Problem
from lacuna.torchtune.recipe import RecipeFacts, recipe_facts
from lacuna.words import did_you_mean

VERSION = "0.6.1"
FOLDER = ".venv-torchtune"
HOW_TO_GET_IT = (
    f"torchtune {VERSION} was not found: in a checkout of lacuna `make torchtune` builds {FOLDER}; elsewhere install "
    "'lacuna[torchtune]' into an environment of its own and pass --torchtune-python ENVIRONMENT/bin/python"
)
ASK = """
import importlib.util, importlib.metadata, json
spec = importlib.util.find_spec("torchtune")
print(json.dumps(spec and [spec.origin, importlib.metadata.version("torchtune")]))
"""
METHODS = {
    "qlora": "QLoRA", "qdora": "QDoRA", "dora": "DoRA", "lora": "LoRA", "full": "full", "dpo": "DPO", "ppo": "PPO",
    "kd": "distillation", "qat": "QAT", "exit": "early exit",
}  # fmt: skip
TASKS = {"eleuther_eval": "evaluation", "quantize": "quantization"}


@dataclass(frozen=True)
class Environment:
    """A Python that can import torchtune. packages: its site-packages, where torchtune's recipes lie too."""

    python: str
    packages: Path


@dataclass(frozen=True)
class Recipe:
    """One of torchtune's shipped configs. config: its name; recipe: the script that runs it."""

    config: str
    recipe: str
    file: Path
    distributed: bool

    @property
    def model(self) -> str:
        """`llama3_2 1B`; a config for no certain size has its family alone, or nothing."""
        family, _, rest = self.config.rpartition("/")
        size = rest.partition("_KD")[0] if "_KD" in rest else rest.partition("_")[0]
        return f"{family} {size}".strip() if size[:1].isdigit() or size == "mini" else family

    @property
    def method(self) -> str:
        """LoRA, QLoRA, DoRA, full, …, and what it is for where that is not plain fine-tuning."""
        words = self.config.lower().replace("/", "_").split("_")
        return " ".join(text for word, text in METHODS.items() if word in words) or TASKS.get(self.recipe, "generation")


def find_environment(python: str | None) -> Environment | None:
    """The given Python's torchtune; else the one in `.venv-torchtune` here or beside lacuna, on the PATH, or our own.

    Raises ConfigError where the given one has none, or where it is of another version.
    """
    if python is not None:
        found = _ask(python)
        if found is None:
            raise ConfigError(f"--torchtune-python {python}: this Python has no torchtune. {HOW_TO_GET_IT}")
        return found
    folders = [Path.cwd(), *Path.cwd().parents, Path(__file__).parents[3]]
    candidates = [folder / FOLDER / "bin" / "python" for folder in folders]
    tune = shutil.which("tune")
    candidates += [Path(tune).parent / "python"] if tune else []
    existing = [str(path) for path in candidates if path.exists()] + [sys.executable]
    return next((found for path in existing if (found := _ask(path))), None)


def need_environment(python: str | None) -> Environment:
    """Like find_environment; raises ConfigError that says how to get torchtune where there is none."""
    found = find_environment(python)
    if found is None:
        raise ConfigError(HOW_TO_GET_IT)
    return found


@cache
def _ask(python: str) -> Environment | None:
    try:
        answer = subprocess.run([python, "-c", ASK], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = json.loads(answer)
    if found is None:
        return None
    origin, version = found
    if version != VERSION:
        raise ConfigError(f"{python} has torchtune {version}; lacuna knows {VERSION}. {HOW_TO_GET_IT}")
    return Environment(python, Path(origin).parent.parent)


@cache
def recipes(environment: Environment) -> list[Recipe]:
    """Every shipped config that exists, by torchtune's own registry, which imports nothing."""
    registry = runpy.run_path(str(environment.packages / "torchtune" / "_recipe_registry.py"))
    found = []
    for recipe in registry["get_all_recipes"]():
        for config in recipe.configs:
            file = environment.packages / "recipes" / "configs" / config.file_path
            if file.exists():
                found.append(Recipe(config.name, recipe.name, file, recipe.supports_distributed))
    return found


def list_recipes(pattern: str, torchtune_python: str | None) -> list[Recipe]:
    """The shipped configs whose name holds the pattern, or matches it where it has `*` or `?`."""
    glob = pattern if re.search(r"[*?\[]", pattern) else f"*{pattern}*"
    known = recipes(need_environment(torchtune_python))
    return [recipe for recipe in known if fnmatch.fnmatch(recipe.config.lower(), glob.lower())]


def find_recipe(environment: Environment, name: str, where: str) -> Recipe:
    """By its config's name. Raises ConfigError with the nearest name and its whole family."""
    known = {recipe.config: recipe for recipe in recipes(environment)}
    if name in known:
        return known[name]
    family = name.split("/")[0]
    families = sorted({config.split("/")[0] for config in known if "/" in config})
    relatives = sorted(config for config in known if config.startswith(f"{family}/"))
    listed = f"all of {family}: {', '.join(relatives)}" if relatives else f"the families are {', '.join(families)}"
    raise ConfigError(
        f"{where}torchtune {VERSION} has no config {name!r}{did_you_mean(name, [*known])}; {listed} "
        "(`lacuna recipes` lists all; an own file is given as base_config_file)"
    )


def for_devices(environment: Environment, recipe: Recipe, gpus: int) -> Recipe:
    """The shipped config for so many devices; where torchtune has only the recipe, this config under that recipe.

    Raises ConfigError where torchtune has no such recipe either.
    """
    wanted = paired_recipe(recipe.recipe, gpus)
    if wanted == recipe.recipe:
        return recipe
    known = recipes(environment)
    of_recipe = [other for other in known if other.recipe == wanted]
    if not of_recipe and gpus == 1:
        return recipe
    if not of_recipe:
        raise ConfigError(f"gpus: {gpus}: torchtune has no {wanted}, the counterpart of {recipe.recipe}")
    same = [other for other in of_recipe if _stem(other.config) == _stem(recipe.config)]
    return same[0] if same else Recipe(recipe.config, wanted, recipe.file, gpus > 1)


def paired_recipe(recipe: str, gpus: int) -> str:
    """`lora_finetune_single_device` and 2 → `lora_finetune_distributed`, and back."""
    return re.sub(r"_(single_device|distributed)$", "_distributed" if gpus > 1 else "_single_device", recipe)


def _stem(config: str) -> str:
    return re.sub(r"_(single_device|low_memory|distributed)$", "", config)


def nearest_recipe(environment: Environment, values: dict[str, Any], gpus: int | None) -> Recipe:
    """The shipped config that shares most settings with an own one, of the kind for so many devices."""
    own = _outline(values)

    def likeness(recipe: Recipe) -> tuple[int, float]:
        shipped, _ = parse_yaml(recipe.file.read_text(encoding="utf-8"), str(recipe.file))
        theirs = _outline(shipped)
        return len(own & theirs), len(own & theirs) / len(theirs)

    known = recipes(environment)
    names = {recipe.recipe for recipe in known}
    wrong_kind = {name for name in names if paired_recipe(name, gpus or 1) in names - {name}}
    return max((recipe for recipe in known if recipe.recipe not in wrong_kind), key=likeness)


def _outline(values: dict[str, Any]) -> set[tuple[str, str]]:
    """The paths of a config, and what its components are."""
    return {(path, str(value) if path.endswith("_component_") else "") for path, value in leaves(values)}


def command(environment: Environment | None, recipe: str | None, gpus: int, config: str) -> list[str]:
    """What starts a run: `tune run`, with a process for each device where there are several."""
    tune = str(Path(environment.python).with_name("tune")) if environment else "tune"
    processes = ["--nproc_per_node", str(gpus)] if gpus > 1 or "distributed" in str(recipe) else []
    return [tune, "run", *processes, recipe or "RECIPE", "--config", config]


def facts_of(environment: Environment, recipe: str) -> RecipeFacts:
    """What the recipe reads and needs."""
    script = Path(recipe) if recipe.endswith(".py") else environment.packages / "recipes" / f"{recipe}.py"
    configs = tuple(shipped.file for shipped in recipes(environment) if shipped.recipe == recipe)
    others = tuple(shipped.file for shipped in recipes(environment) if shipped.recipe != recipe)
    return recipe_facts(recipe, script, configs, others)


def validate(environment: Environment, runs: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """torchtune's own checks, and those that need its code, for the whole set in one process of its environment.

    runs: id, file, and `touched`, the paths that the user set. Raises ConfigError where that environment is broken.
    """
    answer = ask(environment, Path(__file__).with_name("inside_checks.py"), {"runs": runs})
    return [Problem(**problem) for problem in answer]


def ask(environment: Environment, script: Path, request: Mapping[str, Any]) -> Any:
    """What a script answers in torchtune's environment. Raises ConfigError where that is broken."""
    process = subprocess.run(
        [environment.python, str(script)], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    if process.returncode != 0:
        reason = process.stderr.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise ConfigError(f"{script.name} could not run with {environment.python}: {reason[0]}")
    return json.loads(process.stdout.splitlines()[-1])
