"""What torchtune's config and environment say of a run, for its provenance. Nothing here imports torch."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from lacuna.config.trees import MISSING, get
from lacuna.files import sha256_of, sha256_of_all, without_home
from lacuna.machine.detect import Device, nvidia_smi
from lacuna.runs.provenance import (
    PACKAGES,
    config_facts,
    file_facts,
    hardware,
    hub_facts,
    model_files,
    parent_run,
    slurm_facts,
    weights_fingerprint,
)
from lacuna.version import __version__

ASK = """
import importlib.metadata, json, platform, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps({"python": platform.python_version(), "packages": found}))
"""
TOKENIZER = ("path", "merges_file", "vocab_path", "merges_path", "special_tokens_path")


def torchtune_facts(values: Mapping[str, Any], words: Sequence[str], config: Path, devices: int) -> dict[str, Any]:
    """words: `tune run RECIPE --config FILE`. devices: of all nodes."""
    return {
        "trainer": "torchtune",
        "recipe": recipe_of(words),
        **torchtune_software(words[0]),
        **config_facts([config]),
        "config_sha256": sha256_of(config),
        **torchtune_inputs(values),
        **hardware(torchtune_device(values), devices, None),
        "precision": {"fp32": "float32", "bf16": "bfloat16"}.get(str(values.get("dtype")), values.get("dtype")),
        "compile": values.get("compile"),
        "activation_checkpointing": values.get("enable_activation_checkpointing"),
        "seed": values.get("seed"),
        "slurm": slurm_facts(os.environ),
    }


def recipe_of(words: Sequence[str]) -> str:
    """`tune run RECIPE --config FILE` → RECIPE."""
    return words[words.index("--config") - 1]


def torchtune_software(tune: str) -> dict[str, Any]:
    """Python and packages of the environment that `tune` is in, and lacuna's version."""
    python = Path(tune).with_name("python")
    try:
        words = [str(python), "-c", ASK, *PACKAGES]
        found: dict[str, Any] = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return {"python": None, "packages": {"lacuna": __version__}}
    return {**found, "packages": {"lacuna": __version__, **found["packages"]}}


def torchtune_inputs(values: Mapping[str, Any]) -> dict[str, Any]:
    """Data, tokenizer and model, as they are now."""
    tokenizer = [Path(path) for name in TOKENIZER if isinstance(path := get(values, f"tokenizer.{name}"), str)]
    place = get(values, "checkpointer.checkpoint_dir")
    model = Path(place) if isinstance(place, str) else None
    is_here = model is not None and model.is_dir()
    present = [file for file in tokenizer if file.is_file()]
    weights = model_files(model, with_weights=True) if model is not None and is_here else []
    return {
        "data_files": torchtune_data(values),
        "tokenizer": without_home(str(tokenizer[0])) if tokenizer else None,
        "tokenizer_sha256": sha256_of_all(present),
        "tokenizer_files": [file_facts(file) for file in present],
        "model": without_home(str(model)) if model is not None else None,
        "model_files": [file_facts(file) for file in weights],
        "weights_fingerprint": weights_fingerprint(model) if model is not None and is_here else None,
        "parent_run": parent_run(model) if model is not None and is_here else None,
    }


def torchtune_data(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every file of the data sets; of the hub's, the commit."""
    given = values.get("dataset")
    entries: list[dict[str, Any]] = []
    for section in given if isinstance(given, list) else [given]:
        if not isinstance(section, Mapping):
            continue
        files = section.get("data_files")
        listed = [*files.values()] if isinstance(files, Mapping) else files if isinstance(files, list) else [files]
        found = sorted(Path(path) for pattern in listed if isinstance(pattern, str) for path in glob(pattern))
        entries += [{"use": "training", **file_facts(path)} for path in found]
        source = section.get("source")
        if files is None and isinstance(source, str) and not Path(source).exists():
            subset, split = section.get("name"), str(section.get("split", "train"))
            entries.append({"use": "training", **hub_facts(source, subset, split)})
        elif files is None and isinstance(source, str):
            inside = sorted(path for path in Path(source).rglob("*") if path.is_file())
            entries += [{"use": "training", **file_facts(path)} for path in inside]
    return entries


def torchtune_device(values: Mapping[str, Any]) -> Device:
    """By the driver, as torch is not here to be asked."""
    kind = str(values.get("device"))
    if kind != "cuda":
        return Device(kind, {"cpu": "CPU", "mps": "Apple GPU (MPS)"}.get(kind, kind))
    try:
        name, memory = nvidia_smi("name,memory.total")[0].rsplit(",", 1)
        return Device("cuda", name.strip(), int(memory) * 2**20)
    except (ValueError, IndexError):
        return Device("cuda", "CUDA")


def log_folder(values: Mapping[str, Any], folder: Path) -> Path | None:
    """Where torchtune's logger writes; None where that is not written out."""
    place = get(values, "metric_logger.log_dir")
    if place is MISSING or not isinstance(place, str):
        return None
    place = place.replace("${output_dir}", str(folder))
    return Path(place) if "${" not in place else None
