"""The names that an experiment may vary, where each trainer reads them, and what their values may be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from lacuna.config.files import field_at, setting_paths, without_subject
from lacuna.config.finetune import SPELLING
from lacuna.config.trainers import CONFIGS
from lacuna.config.trees import MISSING, get, leaves, nested, prefixes, type_conflicts
from lacuna.words import did_you_mean

Kind = Literal["scientific", "engineering"]
SCIENTIFIC: Kind = "scientific"
ENGINEERING: Kind = "engineering"

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class Parameter:
    """kind: scientific changes the result of a run, engineering its speed, memory or place."""

    paths: tuple[str, ...]
    """Where a config may hold it; the first that is there counts."""
    kind: Kind
    type: Any
    note: str = ""


def _at(paths: str, kind: Kind, type: Any, note: str = "") -> Parameter:
    return Parameter(tuple(paths.split()), kind, type, note)


TORCHTUNE: dict[str, Parameter] = {
    "learning_rate": _at("optimizer.lr", SCIENTIFIC, Positive, "peak, after warmup"),
    "weight_decay": _at("optimizer.weight_decay", SCIENTIFIC, NotNegative),
    "num_warmup_steps": _at("lr_scheduler.num_warmup_steps", SCIENTIFIC, Annotated[int, Field(ge=0)]),
    "epochs": _at("epochs", SCIENTIFIC, Count, "passes over the data"),
    "max_steps_per_epoch": _at("max_steps_per_epoch", SCIENTIFIC, Count | None),
    "batch_size": _at(
        "batch_size", SCIENTIFIC, Count,
        "rows in a forward pass of one device. Called engineering elsewhere, but with gradient_accumulation_steps it "
        "sets how many samples a step averages and how many steps there are",
    ),
    "gradient_accumulation_steps": _at("gradient_accumulation_steps", SCIENTIFIC, Count),
    "clip_grad_norm": _at("clip_grad_norm", SCIENTIFIC, Positive | None),
    "seed": _at(
        "seed", SCIENTIFIC, Annotated[int, Field(ge=0, lt=2**32)] | None,
        "adapters and dropout; torchtune's sampler shuffles by seed 0 whatever it is",
    ),
    "shuffle": _at("shuffle dataloader.shuffle", SCIENTIFIC, bool),
    "lora_rank": _at("model.lora_rank", SCIENTIFIC, Count),
    "lora_alpha": _at("model.lora_alpha", SCIENTIFIC, Positive, "the adapter is scaled by lora_alpha / lora_rank"),
    "lora_dropout": _at("model.lora_dropout", SCIENTIFIC, Share),
    "lora_attn_modules": _at("model.lora_attn_modules", SCIENTIFIC, Annotated[list[str], Field(min_length=1)]),
    "apply_lora_to_mlp": _at("model.apply_lora_to_mlp", SCIENTIFIC, bool),
    "apply_lora_to_output": _at("model.apply_lora_to_output", SCIENTIFIC, bool),
    "max_seq_len": _at("tokenizer.max_seq_len", SCIENTIFIC, Count | None, "longer samples are cut; null: never"),
    "prompt_template": _at("tokenizer.prompt_template", SCIENTIFIC, str | dict[str, Any] | None),
    "train_on_input": _at("dataset.train_on_input", SCIENTIFIC, bool, "whether the prompt counts in the loss"),
    "packed": _at(
        "dataset.packed dataloader.packed", SCIENTIFIC, bool,
        "several samples in a row. Called engineering elsewhere, but it changes how many samples make a step",
    ),
    "dtype": _at(
        "dtype", SCIENTIFIC, str,
        "called engineering elsewhere, but bf16 and fp32 end in different weights",
    ),
    "optimizer_in_bwd": _at("optimizer_in_bwd", SCIENTIFIC, bool, "no gradient clipping or accumulation then"),
    "enable_activation_checkpointing": _at("enable_activation_checkpointing", ENGINEERING, bool),
    "enable_activation_offloading": _at("enable_activation_offloading", ENGINEERING, bool, "CUDA only"),
    "compile": _at("compile", ENGINEERING, bool),
    "fused": _at("optimizer.fused", ENGINEERING, bool, "torch's optimizers only"),
    "device": _at("device", ENGINEERING, Annotated[str, Field(pattern=r"^(cuda|cpu|mps|xpu|npu)(:\d+)?$")]),
    "log_every_n_steps": _at("log_every_n_steps", ENGINEERING, Count),
    "checkpoint_dir": _at("checkpointer.checkpoint_dir", SCIENTIFIC, str, "the weights to start from"),
    "output_dir": _at("output_dir", ENGINEERING, str, "of the experiment; each run gets a folder below"),
    "resume_from_checkpoint": _at("resume_from_checkpoint", ENGINEERING, bool),
    "save_adapter_weights_only": _at("save_adapter_weights_only", ENGINEERING, bool),
}  # fmt: skip


OURS = {
    "packed": "packing", "max_seq_len": "sequence_length", "num_warmup_steps": "warmup_steps",
    "clip_grad_norm": "max_gradient_norm", "enable_activation_checkpointing": "activation_checkpointing",
    "dtype": "precision", "max_steps_per_epoch": "steps", "checkpoint_dir": "model_name",
    "gradient_accumulation_steps": "micro_batch_size", "dataset.source": "dataset", "dataset.data_files": "dataset",
}  # fmt: skip
"""torchtune's names and those of our own trainers, where they differ."""


SECTIONS = ("model", "dataset", "training")
"""Of a finetune config: these words are no setting's name."""


@cache
def parameters(trainer: str) -> dict[str, Parameter]:
    """Name to parameter for `torchtune`, `pretrain`, `sft` or `finetune`.

    The last part of a finetune setting's path is its name, where only one has it; what the other trainers call so is
    another name of it.
    """
    if trainer == "torchtune":
        return TORCHTUNE
    model = CONFIGS[trainer]
    paths = [path for path in setting_paths(model) if path != "trainer"]
    ends = [path.rpartition(".")[2] for path in paths]
    places = {end: path for end, path in zip(ends, paths, strict=True) if ends.count(end) == 1}
    if trainer == "finetune":
        others = {
            name: path for name, path in SPELLING.items() if name not in places and name not in (*SECTIONS, "trainer")
        }
        places = {"lora_rank": "training.lora_r", **others, **places}
        places |= {path: path for path in paths if path not in places.values()}
    table = {}
    for name, path in places.items():
        field = field_at(model, path)
        kind = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        table[name] = Parameter(
            (path,), ENGINEERING if path in model.may_change else SCIENTIFIC, kind, field.description or ""
        )
    return table


def output_path(trainer: str) -> str:
    """Where a config says where its run writes."""
    return "training.output_dir" if trainer == "finetune" else "output_dir"


def find_path(name: str, trainer: str, base: Mapping[str, Any]) -> tuple[str, str | None]:
    """Where a flat or dotted name is read, and what is wrong with it (None where nothing is).

    A leading `+` says that the base config need not have it.
    """
    flat = name.removeprefix("+")
    table = parameters(trainer)
    if trainer != "torchtune":
        ours = OURS.get(flat, OURS.get(next((n for n, p in TORCHTUNE.items() if flat in p.paths), ""), ""))
        hint = f"; what torchtune calls so is {ours} here" if ours in table else did_you_mean(flat, [*table])
        if "lora" in flat and trainer != "finetune":
            hint = "; it trains whole models: finetune trains adapters"
        path = table[flat].paths[0] if flat in table else flat
        is_there = path in _names(trainer) or (trainer == "finetune" and path in SECTIONS)
        return path, None if is_there else f"{trainer} has no setting {flat!r}{hint}"
    paths = table[flat].paths if flat in table else (flat,)
    found = next((path for path in paths if get(base, path) is not MISSING), None)
    if found is not None:
        return found, None
    if name.startswith("+"):
        return paths[0], None
    if "lora" in flat and flat in table:
        return paths[0], f"the base config trains no adapters, so it has no {flat!r}: take one of lora, or qlora"
    here = f"{flat!r} ({paths[0]})" if flat in table else repr(flat)
    known = [*table, *(path for path, _ in leaves(base)), *base]
    same_end = [name for name, parameter in table.items() if parameter.paths[0].endswith(f".{flat}") and name != flat]
    hint = f"; did you mean {same_end[0]!r}?" if same_end else "" if flat in table else did_you_mean(flat, known)
    return paths[0], f"the base config has no {here}{hint}; '+{flat}' adds it all the same"


@cache
def _adapter(trainer: str, name: str) -> TypeAdapter[Any]:
    return TypeAdapter(parameters(trainer)[name].type, config=ConfigDict(strict=True, allow_inf_nan=False))


@cache
def _names(trainer: str) -> dict[str, str]:
    return {path: name for name, parameter in parameters(trainer).items() for path in parameter.paths}


def value_problem(trainer: str, path: str, value: Any) -> str | None:
    """Why the trainer could not take this value at this path; None where it can, or where nothing is known of it."""
    name = _names(trainer).get(path)
    if name is None or (isinstance(value, str) and "${" in value):
        return None
    try:
        _adapter(trainer, name).validate_python(value)
    except ValidationError as error:
        advice = "; write it without quotes" if isinstance(value, str) and _is_number(value) else ""
        return f"{value!r} ({type(value).__name__}): {without_subject(error.errors()[0]['msg'])}{advice}"
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


ADVICE = "; to replace it by another kind, delete it by '~path: null' and add it by '+path'"


def place(trainer: str, base: Mapping[str, Any], name: str, values: Sequence[Any]) -> tuple[str, list[str]]:
    """The path of a name, and what is wrong with it or with its values: an unknown name, a value of another kind, or
    a nested key that the base lacks."""
    path, missing = find_path(name, trainer, base)
    if missing:
        return path, [missing]
    problems: dict[str, None] = {}
    for value in values:
        given = nested(path, value)
        found = [
            f"{name if leaf == path else leaf!r} is {wrong}"
            for leaf, item in leaves(given)
            if (wrong := value_problem(trainer, leaf, item))
        ]
        if not found and trainer == "torchtune":
            found = [f"{where} {how}{ADVICE}" for where, how in type_conflicts(base, given)]
        inside = [leaf for leaf, _ in leaves(given) if leaf != path and not name.startswith("+")]
        found += [unknown for leaf in inside if (unknown := _unknown_key(trainer, base, leaf))]
        problems.update(dict.fromkeys(found))
    return path, list(problems)


def _unknown_key(trainer: str, base: Mapping[str, Any], leaf: str) -> str | None:
    """A nested key that the base lacks is an error, but not in a component: its arguments are checked by torchtune."""
    parents = [get(base, prefix) for prefix in prefixes(leaf)]
    if parents[-1] is not MISSING or any(isinstance(node, dict) and "_component_" in node for node in parents):
        return None
    return find_path(leaf, trainer, base)[1]


def expects_whole_number(trainer: str, path: str) -> bool:
    """Whether a fraction such as 4.0 must be written as 4 there."""
    return value_problem(trainer, path, 4.0) is not None and value_problem(trainer, path, 4) is None
