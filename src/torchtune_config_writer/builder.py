"""A torchtune config by a chain of calls: the same merge and the same names as experiment.yaml."""

import math
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from lacuna.config.files import Layer, read_layer
from lacuna.config.names import find_path, place
from lacuna.config.trees import MISSING, copied, get, leaves, merge, nested, without
from lacuna.config.yaml_format import dump_yaml, parse_yaml
from lacuna.errors import ConfigError
from lacuna.experiment.base import Base, load_own, load_recipe
from lacuna.experiment.folder import summarise
from lacuna.experiment.generator import check_configs
from lacuna.files import digest, write_whole
from lacuna.torchtune import environment as torchtune
from lacuna.torchtune.dataset import KINDS
from lacuna.torchtune.templates import with_todays_template
from lacuna.version import __version__

READERS = ("instruct_dataset", "chat_dataset", "text_completion_dataset", "preference_dataset")
"""Dataset components of torchtune that read any source."""


class TorchtuneConfigBuilder:
    """Start from a shipped config (`llama3_2/1B_lora_single_device`), a file or a mapping; change; save.

    Every method but `build`, `save` and `list_available` returns the builder. A change that the config has no place
    for raises ConfigError, and so does `validate`, with all problems.
    """

    def __init__(self, base_config: str, *, torchtune_python: str | None = None) -> None:
        self._start(load_recipe(base_config, "", None, torchtune_python), {"base_config": base_config})

    def _start(self, base: Base, source: dict[str, Any]) -> None:
        self._base = base
        self._source = source
        self._values, said = with_todays_template(copied(base.values))
        self._changes: list[dict[str, Any]] = []
        self._touched: set[str] = set()
        _warn([said] if said else [])

    @classmethod
    def from_file(cls, path: str | Path, *, torchtune_python: str | None = None) -> Self:
        """Start from an own torchtune config. Raises ConfigError where it cannot be read, or is not torchtune's."""
        source = {"file": str(path), "sha256": digest(Path(path).read_bytes()) if Path(path).is_file() else None}
        return cls._from_layer(read_layer(path), source, torchtune_python)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, torchtune_python: str | None = None) -> Self:
        """Start from a mapping, which stays as it is."""
        values = dict(config)
        source = {"mapping": True, "sha256": digest(dump_yaml(values).encode())}
        return cls._from_layer(Layer("the mapping", values), source, torchtune_python)

    @classmethod
    def _from_layer(cls, layer: Layer, source: dict[str, Any], torchtune_python: str | None) -> Self:
        builder = cls.__new__(cls)
        base = load_own(layer, None, None, torchtune_python)
        if base.trainer != "torchtune":
            raise ConfigError(f"{layer.name}: this is a config for {base.trainer}, not for torchtune")
        builder._start(base, source)
        return builder

    @staticmethod
    def list_available(pattern: str = "", *, torchtune_python: str | None = None) -> list[str]:
        """The names of torchtune's configs that hold the pattern."""
        return [recipe.config for recipe in torchtune.list_recipes(pattern, torchtune_python)]

    def override(self, overrides: Mapping[str, Any]) -> Self:
        """Merge settings on top: nested mappings, dotted paths or flat names such as `learning_rate`.

        Raises ConfigError for what the config has no place for (`+name` adds it all the same) and for a value of
        another kind; nothing is changed then.
        """
        if not isinstance(overrides, Mapping) or not all(isinstance(name, str) for name in overrides):
            raise TypeError("overrides must be a mapping of names to values")
        values = self._values
        problems: list[str] = []
        touched: set[str] = set()
        for name, value in overrides.items():
            path, wrong = place("torchtune", values, name, [value])
            problems += wrong
            if not wrong:
                given = nested(path, copied(value))
                touched.update(leaf for leaf, _ in leaves(given))
                values = merge(values, given)
        if problems:
            raise ConfigError(problems)
        self._values, said = with_todays_template(values)
        self._touched |= touched
        _warn([said] if said else [])
        self._changes.append({"override": copied(dict(overrides))})
        return self

    def delete(self, path: str) -> Self:
        """Take out what stands at a dotted path. Raises ConfigError where nothing does."""
        _expect(path, str, "path")
        found, missing = find_path(path, "torchtune", self._values)
        if missing or get(self._values, found) is MISSING:
            raise ConfigError(f"nothing to delete: {missing or path}")
        self._values = without(self._values, found)
        self._changes.append({"delete": path})
        return self

    def build(self) -> dict[str, Any]:
        """The config, as a mapping that is the caller's own."""
        values: dict[str, Any] = copied(self._values)
        return values

    def save(self, path: str | Path) -> Path:
        """Write the config, and beside it `.meta.yaml`: where it comes from and what was changed, in order.

        Raises ConfigError, with nothing written, where the file is not one that a builder saved, or was changed since.
        """
        path = Path(path)
        if path.suffix not in (".yaml", ".yml"):
            raise ConfigError(f"{path}: a torchtune config ends in .yaml or .yml")
        meta = path.with_suffix(".meta.yaml")
        text = dump_yaml(self._values)
        saved = _saved(meta) if meta.exists() else None
        current = digest(path.read_bytes()) if path.is_file() else None
        if (meta.exists() and saved is None) or (path.exists() and current not in (digest(text.encode()), saved or "")):
            raise ConfigError(f"{path} or {meta} was not saved by a builder, or was changed since: move it away")
        facts = {
            "source": self._source,
            "versions": {"lacuna": __version__, "torchtune": torchtune.VERSION},
            "changes": self._changes,
            "sha256": digest(text.encode()),
            "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
            write_whole(meta, dump_yaml(facts))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
        return path

    def validate(self, *, here: bool = False) -> Self:
        """Run torchtune's validation, and look for what is wrong on every machine.

        What torchtune would refuse when it starts, such as packing without a length, is a warning. here: that is an
        error too, and so is what is not on this machine, such as the model and the data.

        Raises ConfigError with all problems.
        """
        base = replace(self._base, environment=self._base.environment or torchtune.need_environment(None))
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.yaml").write_text(dump_yaml(self._values), encoding="utf-8")
            problems = check_configs(base, {"config": self._values}, sorted(self._touched), Path(folder))
        if errors := [problem for problem in problems if problem.kind == "wrong" or (here and problem.stops_a_start)]:
            raise ConfigError(summarise(errors))
        refused = [problem for problem in problems if problem.kind == "start"]
        unsure = [problem for problem in problems if problem.kind == "unsure"]
        _warn([*(f"torchtune would refuse to start {line}" for line in summarise(refused)), *summarise(unsure)])
        return self

    def with_dataset(self, path: str) -> Self:
        """Train on another data set (scientific).

        A file (json, jsonl, csv, parquet, txt) becomes `source` and `data_files` with `split: train`, and `field:
        train` where a json file holds its rows under that name; a folder or a hub name becomes `source`. A component
        that reads any source stays; another one becomes torchtune.datasets.instruct_dataset (columns input, output).
        """
        _expect_text(path, "path")
        current = get(self._values, "dataset")
        component = str(current.get("_component_", "")) if isinstance(current, dict) else ""
        kept = {key: current[key] for key in ("packed",) if isinstance(current, dict) and key in current}
        if component.rpartition(".")[2] in READERS:
            kept = {
                key: value for key, value in current.items() if key not in ("source", "data_files", "field", "split")
            }
        settings = {"_component_": "torchtune.datasets.instruct_dataset", **kept, "source": path, "split": "train"}
        kind = KINDS.get(Path(path).suffix)
        if kind is not None:
            settings |= {"source": kind, "data_files": path}
            if kind == "json" and Path(path).is_file() and re.match(r'\s*\{\s*"train"\s*:\s*\[', _head(path)):
                settings["field"] = "train"
        unchanged = self._values
        self._values = without(unchanged, "dataset") if current is not MISSING else unchanged
        try:
            return self.override({"+dataset": settings})
        except ConfigError:
            self._values = unchanged
            raise

    def with_dataset_template(self, template: str) -> Self:
        """Set how prompts are written (scientific): the dotted path of a template, such as
        torchtune.data.SummarizeTemplate. torchtune 0.6.1 reads it from `tokenizer.prompt_template`, which is what
        this writes. A template that torchtune had in 0.2 and has no longer, such as
        torchtune.data.AlpacaInstructTemplate, is written as what gives the same prompts, with a warning."""
        _expect_text(template, "template")
        return self.override({"+prompt_template": template})

    def with_output_dir(self, path: str) -> Self:
        """Set where checkpoints and logs go (engineering)."""
        _expect_text(path, "path")
        return self.override({"output_dir": path})

    def with_learning_rate(self, lr: float) -> Self:
        """Set the peak learning rate, after warmup (scientific)."""
        if isinstance(lr, bool) or not isinstance(lr, int | float):
            raise TypeError(f"lr must be float, got {type(lr).__name__}")
        if isinstance(lr, float) and not math.isfinite(lr):
            raise ValueError(f"lr must be finite, got {lr}")
        if lr <= 0:
            raise ValueError(f"lr must be positive, got {lr}")
        return self.override({"learning_rate": float(lr)})

    def with_batch_size(self, batch_size: int) -> Self:
        """Set the rows in a forward pass of one device. It changes what a step averages, unless
        gradient_accumulation_steps changes with it (so scientific, whatever it is called elsewhere)."""
        return self.override({"batch_size": _positive(batch_size, "batch_size")})

    def with_epochs(self, epochs: int) -> Self:
        """Set the passes over the data (scientific)."""
        return self.override({"epochs": _positive(epochs, "epochs")})

    def with_lora_params(self, rank: int, alpha: int) -> Self:
        """Set LoRA's rank and alpha together (scientific); the adapter is scaled by alpha / rank."""
        for value, name in ((rank, "rank"), (alpha, "alpha")):
            _expect(value, int, name)
        return self.override({"lora_rank": _positive(rank, "rank"), "lora_alpha": _positive(alpha, "alpha")})

    def with_gradient_accumulation_steps(self, steps: int) -> Self:
        """Set the forward passes that one optimizer step averages (scientific)."""
        return self.override({"gradient_accumulation_steps": _positive(steps, "steps")})

    def with_max_seq_length(self, length: int) -> Self:
        """Set the longest sample in tokens (scientific); longer ones are cut. Null in most configs: no limit."""
        return self.override({"+max_seq_len": _positive(length, "length")})

    def with_seed(self, seed: int) -> Self:
        """Set the random seed of adapters and dropout (scientific). torchtune's sampler does not read it: the order
        of the data is that of seed 0. `override({"seed": None})` takes it away."""
        _expect(seed, int, "seed")
        if seed < 0:
            raise ValueError(f"seed must be non-negative, got {seed}")
        return self.override({"seed": seed})

    def with_dtype(self, dtype: str) -> Self:
        """Set the precision: bf16 or fp32; most recipes refuse fp16, and `validate` says so. bf16 and fp32 end in
        different weights (so scientific, whatever it is called elsewhere)."""
        _expect_text(dtype, "dtype")
        return self.override({"dtype": dtype})

    def with_activation_checkpointing(self, enabled: bool) -> Self:
        """Trade time for memory (engineering)."""
        _expect(enabled, bool, "enabled")
        return self.override({"enable_activation_checkpointing": enabled})

    def with_packed(self, enabled: bool) -> Self:
        """Put several samples in a row, up to tokenizer.max_seq_len, which must be set. It changes how many samples
        make a step (so scientific, whatever it is called elsewhere)."""
        _expect(enabled, bool, "enabled")
        return self.override({"packed": enabled})

    def with_compile(self, enabled: bool) -> Self:
        """Use torch.compile on model and loss: faster after a slow first step (engineering)."""
        _expect(enabled, bool, "enabled")
        return self.override({"compile": enabled})


def _warn(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        warnings.warn(sentence, stacklevel=3)


def _expect(value: Any, kind: type, name: str) -> None:
    """Raises TypeError for another type; a bool is no int."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{name} must be {kind.__name__}, got {type(value).__name__}")


def _expect_text(value: Any, name: str) -> None:
    _expect(value, str, name)
    if not value:
        raise ValueError(f"{name} cannot be empty")


def _positive(value: int, name: str) -> int:
    _expect(value, int, name)
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def _head(path: str) -> str:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.read(4096)


def _saved(meta: Path) -> str | None:
    """The hash of the config that a builder's meta file belongs to; None where the file is another one."""
    if not meta.is_file():
        return None
    try:
        values, _ = parse_yaml(meta.read_text(encoding="utf-8"), str(meta))
    except (ConfigError, UnicodeDecodeError):
        return None
    found = values.get("sha256") if "changes" in values else None
    return found if isinstance(found, str) else None
