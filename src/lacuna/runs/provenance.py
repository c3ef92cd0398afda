"""provenance.json: what each start of a run was made of, to trust it and to repeat it. Nothing here imports torch.

No host or user name goes in, no variable of the environment but SLURM's numbers; the home folder is written as `~`.
docs/run_folder.md explains every field.
"""

import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lacuna.config.training import PretrainConfig, SFTConfig, TrainingConfig
from lacuna.data.find import find_files
from lacuna.data.hub import hub_commit
from lacuna.errors import ConfigError, DataError, MissingExtraError
from lacuna.files import digest, sha256_of, sha256_of_all, without_home, write_json
from lacuna.machine.detect import Device, read_host
from lacuna.runs.folder import read_status, starts_of
from lacuna.runs.identity import file_entry
from lacuna.runs.mapping import MAPPING, read_mapping

PACKAGES = (
    "lacuna", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "trl", "peft", "accelerate",
    "bitsandbytes", "flash-attn", "triton", "torchtune", "torchao",
)  # fmt: skip
FIELDS = (
    "time", "command", "trainer", "recipe", "resume", "from_step", "packages", "python", "platform", "git",
    "lacuna_git", "config_files", "config_sha256", "experiment", "data_files", "data_sha256", "data_preparation",
    "tokenizer", "tokenizer_sha256", "tokenizer_files", "chat_template_sha256", "template_date", "model",
    "model_revision",
    "model_commit", "initialise", "model_files", "weights_fingerprint",
    "parent_run", "parameters", "trained_parameters", "device", "device_memory", "devices", "cpu", "cores",
    "host_memory", "cuda", "driver", "precision", "attention", "compile", "activation_checkpointing", "seed",
    "total_steps", "slurm",
)  # fmt: skip
"""Every start has all of them; null where there is none, or where it is not known."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
HERE = Path(__file__).parent.parent
SAMPLES, SAMPLE_BYTES = 16, 2**16
SLURM = {
    "array_task": "SLURM_ARRAY_TASK_ID", "nodes": "SLURM_NNODES", "restarts": "SLURM_RESTART_COUNT",
    "partition": "SLURM_JOB_PARTITION",
}  # fmt: skip


def write_provenance(folder: Path, command: Sequence[str], facts: Mapping[str, Any]) -> None:
    """Add this start to provenance.json: who looks at a run later sees every command that touched it."""
    start = {
        **dict.fromkeys(FIELDS),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [without_home(word) for word in command],
        **software(),
        **facts,
    }
    write_json(folder / "provenance.json", {"starts": [*starts_of(folder), start]})


def add_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Complete the last start by what is known only now."""
    *before, last = starts_of(folder)
    write_json(folder / "provenance.json", {"starts": [*before, {**last, **facts}]})


def software() -> dict[str, Any]:
    """Of this process."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "git": _git_state(Path()),
        "lacuna_git": _git_state(HERE) if _is_checkout(HERE) else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_checkout(folder: Path) -> bool:
    """Whether a repository has the files of the folder; one of an environment inside a repository, it has not."""
    try:
        known = subprocess.run(["git", "ls-files", "__init__.py"], cwd=folder, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return False
    return bool(known)


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of a folder's repository, whether it has uncommitted changes, and the SHA-256 of those to known files;
    None outside a repository."""
    try:
        commit, changes, difference = (
            subprocess.run(["git", *words], cwd=folder, capture_output=True, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"], ["diff", "--binary", "HEAD"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {
        "commit": commit.decode().strip(),
        "uncommitted_changes": bool(changes.strip()),
        "diff_sha256": digest(difference) if difference else None,
    }


def hardware(device: Device, devices: int, cuda: str | None) -> dict[str, Any]:
    """device: of which the run has so many. cuda: that torch was built for."""
    host = read_host()
    return {
        "device": device.name,
        "device_memory": device.memory,
        "devices": devices,
        "cpu": cpu_name(),
        "cores": host.cores,
        "host_memory": host.memory,
        "cuda": cuda,
        "driver": host.driver,
    }


def cpu_name(root: Path = Path("/")) -> str:
    """The CPU's own name, or its kind."""
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", (root / "proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def slurm_facts(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Of the job that this process belongs to; None outside SLURM. Nodes are counted, not named."""
    if "SLURM_JOB_ID" not in environment:
        return None
    job = {"job": environment.get("SLURM_ARRAY_JOB_ID") or environment["SLURM_JOB_ID"]}
    return job | {name: environment.get(variable) for name, variable in SLURM.items()}


def config_facts(files: Sequence[str | Path]) -> dict[str, Any]:
    """The config files that were given, and the experiment that one of them was generated for."""
    found = [{"path": without_home(str(file)), "sha256": sha256_of(Path(file))} for file in files]
    origins = (experiment_of(Path(file), entry["sha256"]) for file, entry in zip(files, found, strict=True))
    return {"config_files": found, "experiment": next((origin for origin in origins if origin is not None), None)}


def experiment_of(config: Path, sha256: str) -> dict[str, Any] | None:
    """The entry of the run mapping beside a config that lists it as it is; None without."""
    if not config.with_name(MAPPING).is_file():
        return None
    try:
        mapping = read_mapping(config.with_name(MAPPING))
    except ConfigError:
        return None
    for index, item in enumerate(mapping.items):
        if sha256 in item and (run := mapping.run(index)).config.name == config.name:
            return {
                "name": mapping.head["experiment"]["experiment_name"],
                "run": run.id,
                "params": run.settings,
                "seed": run.seed,
                "mapping": without_home(str(mapping.file)),
                "mapping_sha256": mapping.sha256,
            }
    return None


def data_facts(config: TrainingConfig) -> dict[str, Any]:
    """Every file of the training and the validation data; of the hub's, the commit. Streamed files are not hashed."""
    streams = isinstance(config, PretrainConfig) and config.streaming
    parts = [("training", config.dataset, config.dataset_split)]
    if config.validation_dataset is not None:
        parts.append(("validation", config.validation_dataset, config.validation_split))
    entries: list[dict[str, Any]] = []
    for use, name, split in parts:
        files = find_files(name, config.dataset_format, split)
        if files is not None:
            entries += [{"use": use, **file_facts(file, hashed=not streams or use != "training")} for file in files]
        else:
            entries.append({"use": use, **hub_facts(name, config.dataset_subset, split)})
    return {"data_files": entries}


def file_facts(file: Path, hashed: bool = True) -> dict[str, Any]:
    return file_entry(file, without_home(str(file)), hashed)


def hub_facts(name: str, subset: str | None, split: str) -> dict[str, Any]:
    """commit: null where the hub's client does not say it."""
    commit = None
    with suppress(DataError, MissingExtraError):
        commit = hub_commit(subset, name)
    return {"hub": name, "subset": subset, "split": split, "commit": commit}


def tokenizer_facts(config: TrainingConfig, origin: str) -> dict[str, Any]:
    """origin: the folder or hub name that the tokenizer is loaded from."""
    revision = config.model_revision if origin == config.model_name else None
    folder = local_folder(origin, revision)
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()] if folder is not None else []
    return {
        "tokenizer": without_home(origin),
        "tokenizer_sha256": sha256_of_all(files),
        "tokenizer_files": [file_facts(file) for file in files],
    }


def template_sha256(template: Any) -> str | None:
    """Of the chat template's text; of several, of their JSON."""
    if template is None:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return digest(text.encode())


def given_template(config: TrainingConfig) -> str | None:
    """SHA-256 of the chat template that the config gives in a file; None without."""
    if not isinstance(config, SFTConfig) or config.chat_template is None:
        return None
    return template_sha256(Path(config.chat_template).expanduser().read_text(encoding="utf-8"))


def model_facts(config: TrainingConfig) -> dict[str, Any]:
    """Of the model that the run starts from, once it is here."""
    folder = local_folder(config.model_name, config.model_revision)
    is_hub = folder is not None and not Path(config.model_name).is_dir()
    is_pretrained = config.initialise == "pretrained" and folder is not None
    files = model_files(folder, is_pretrained) if folder is not None and not is_hub else []
    return {
        "model": without_home(config.model_name),
        "model_revision": config.model_revision,
        "model_commit": folder.name if folder is not None and is_hub else None,
        "initialise": config.initialise,
        "model_files": [file_facts(file) for file in files],
        "weights_fingerprint": weights_fingerprint(folder) if folder is not None and is_pretrained else None,
        "parent_run": parent_run(Path(config.model_name)) if is_pretrained else None,
    }


def model_files(folder: Path, with_weights: bool) -> list[Path]:
    """config.json and the weights of a model's folder."""
    wanted = (path for path in sorted(folder.iterdir()) if path.is_file())
    return [path for path in wanted if path.name == "config.json" or (with_weights and path.suffix in WEIGHTS)]


def local_folder(name: str, revision: str | None) -> Path | None:
    """Where a model's files are: its folder, or what was downloaded of it; None where nothing is here."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    with suppress(ValueError, ModuleNotFoundError):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json", revision=revision or "main")
        return Path(found).parent if isinstance(found, str) else None
    return None


def parent_run(final: Path) -> dict[str, Any] | None:
    """The run whose final folder a model is; None for any other model."""
    folder = final.parent
    configs = [file for name in ("config.toml", "config.yaml") if (file := folder / name).is_file()]
    if final.name != "final" or not configs or not (folder / "provenance.json").is_file():
        return None
    step = (read_status(folder) or {}).get("step")
    return {"folder": without_home(str(folder)), "config_sha256": sha256_of(configs[0]), "step": step}


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over name, size, safetensors header and 16 samples of 64 KiB of each file of weights.

    A file below 1 MiB is read whole. Of a larger one, a change between the samples is not seen: it tells models apart,
    and does not prove that every byte is the same.
    """
    fingerprint = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS and path.is_file()):
        size = path.stat().st_size
        fingerprint.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                length = int.from_bytes(file.read(8), "little")
                fingerprint.update(file.read(min(length, size)))
            for number in range(SAMPLES):
                file.seek(max(size - SAMPLE_BYTES, 0) * number // (SAMPLES - 1))
                fingerprint.update(file.read(SAMPLE_BYTES))
    return fingerprint.hexdigest()
