"""FinetuneConfig: every setting of the adapter trainer, its default and what it means.

Its sections and names are those of the YAML that users write; `as_sft` gives the same in the names of our own loop,
whose data, evaluation and checkpoints it shares.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from lacuna.config.files import setting_paths
from lacuna.config.training import (
    MAY_CHANGE_ON_RESUME,
    RESTARTS_NEED_GPUS,
    STRICT,
    ModelPlace,
    Place,
    PositiveInt,
    SFTConfig,
)
from lacuna.config.trees import MISSING, get, leaves
from lacuna.errors import ConfigError
from lacuna.words import did_you_mean

NotNegativeInt = Annotated[int, Field(ge=0)]

IN_SFT = {
    "model_name": "model.path", "model_revision": "model.revision", "dataset": "dataset.path",
    "dataset_format": "dataset.format", "dataset_subset": "dataset.subset", "dataset_split": "dataset.train_split",
    "dataset_schema": "dataset.type", "text_column": "dataset.text_field",
    "validation_dataset": "dataset.validation_path", "validation_split": "dataset.validation_split",
    "validation_share": "dataset.validation_share", "split_seed": "dataset.split_seed",
    "unreadable_share": "dataset.unreadable_share", "chat_template": "dataset.chat_template",
    "too_long": "dataset.too_long", "output_dir": "training.output_dir",
    "sequence_length": "training.sequence_length", "packing": "training.packing",
    "micro_batch_size": "training.batch_size", "epochs": "training.num_epochs", "steps": "training.max_steps",
    "learning_rate": "training.learning_rate", "warmup_share": "training.warmup_share",
    "warmup_steps": "training.warmup_steps", "weight_decay": "training.weight_decay",
    "max_gradient_norm": "training.max_gradient_norm", "seed": "training.seed", "device": "device", "gpus": "gpus",
    "max_restarts": "max_restarts",
    "precision": "training.precision", "attention": "training.attention",
    "activation_checkpointing": "training.gradient_checkpointing", "log_every": "training.logging_steps",
    "evaluate_every": "training.eval_steps", "save_every": "training.save_steps", "keep_best": "training.keep_best",
    "keep_last": "training.keep_last", "final_weights": "training.final_weights", "tracker": "training.tracker",
    "tracker_project": "training.tracker_project",
}  # fmt: skip
"""SFTConfig's settings and where this config has them."""
BATCH = "training.batch_size × gradient_accumulation_steps"
BATCH_SETTINGS = "training.batch_size or training.gradient_accumulation_steps"

FINETUNE_ALTERNATIVES = [
    ("training.warmup_share", "training.warmup_steps"),
    ("dataset.validation_path", "dataset.validation_share"),
]
FINETUNE_MAY_CHANGE = {IN_SFT[name] for name in MAY_CHANGE_ON_RESUME & IN_SFT.keys()} - {"training.batch_size", "gpus"}


class Section(BaseModel):
    model_config = STRICT


class ModelSection(Section):
    """The model that gets an adapter."""

    path: ModelPlace
    """Folder of a downloaded model, or its name on the hub."""
    base_model: ModelPlace | None = None
    """Folder or hub name that the tokenizer is loaded from. Default: path."""
    revision: str | None = None
    """Commit, tag or branch of a hub model."""


class DatasetSection(Section):
    """What it is trained on."""

    path: Place
    """File, folder, glob, or the name of a hub data set."""
    format: Literal["auto", "jsonl", "json", "csv", "parquet", "text"] = "auto"
    """Kind of the files. auto: by their endings."""
    type: Literal["auto", "chat", "prompt_completion", "instruction", "sharegpt", "text"] = "auto"
    """What the columns mean. auto: found from the first rows, and said."""
    text_field: str = "text"
    """Column of plain text."""
    train_split: str = "train"
    """Split to train on: of a hub data set, or of a folder whose files are named by split."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    validation_path: Place | None = None
    """Like path. Or give validation_share."""
    validation_split: str = "validation"
    """Split of validation_path."""
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the distinct samples kept for validation, each with its copies. 0: no validation."""
    split_seed: NotNegativeInt = 42
    """Which samples validation_share keeps: the same ones whatever the seed."""
    unreadable_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of rows that may be broken; they are counted and left out. More of them stop the run."""
    chat_template: Place | None = None
    """File with a Jinja chat template, for a tokenizer that has none or another one."""
    too_long: Literal["drop", "truncate", "stop"] = "drop"
    """What happens to conversations longer than sequence_length; they are counted and said."""

    @model_validator(mode="before")
    @classmethod
    def _a_file_replaces_the_default_share(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("validation_path") is not None and "validation_share" not in data:
            return {**data, "validation_share": 0.0}
        return data

    def disagreements(self) -> list[str]:
        """Settings that do not go together, a sentence each."""
        problems = []
        if self.validation_path is not None and self.validation_share:
            problems.append("give dataset.validation_path or dataset.validation_share, not both")
        if self.validation_path is None and self.validation_split != "validation":
            problems.append("dataset.validation_split is a split of dataset.validation_path, which is not given")
        if not self.validation_share and self.split_seed != type(self).model_fields["split_seed"].default:
            problems.append("dataset.split_seed decides what dataset.validation_share keeps, which is not given")
        return problems


class TrainingSection(Section):
    """How it is trained."""

    method: Literal["lora", "qlora"] = "lora"
    """qlora: the frozen weights are quantised."""
    output_dir: Place | None = None
    """The run folder. Default: ./checkpoints/<model>-<time>."""
    lora_r: PositiveInt = 16
    """Rank of the adapter."""
    lora_alpha: PositiveInt = 32
    """The adapter is scaled by lora_alpha / lora_r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout on what goes into the adapter."""
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of the layers that get an adapter. Default: all linear layers but the head."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained along."""
    quantization_bits: Literal[4, 8] = 4
    """Bits of a frozen weight; only used with method: qlora."""
    quantization_type: Literal["nf4", "fp4"] = "nf4"
    """How 4 bits are read; only used with method: qlora."""
    double_quantization: bool = True
    """Quantise the scales of 4-bit weights too; only used with method: qlora."""
    quantization_compute_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """What 4-bit weights are multiplied in; only used with method: qlora. auto: as precision."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate, reached after warmup."""
    batch_size: PositiveInt = 4
    """Samples in a forward pass of one device."""
    gradient_accumulation_steps: PositiveInt = 4
    """An optimizer step sees batch_size × gradient_accumulation_steps × devices samples."""
    num_epochs: PositiveInt = 3
    """Passes over the data."""
    max_steps: PositiveInt | None = None
    """Optimizer steps, whatever num_epochs says."""
    warmup_steps: NotNegativeInt | None = None
    """Steps in which the learning rate rises linearly. Or give warmup_share."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the steps in which the learning rate rises linearly. Default: 0.03."""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on after warmup: down to 0, or not."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay of AdamW, on matrices only (no biases)."""
    max_gradient_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    optimizer: Literal["auto", "adamw", "paged_adamw_32bit"] = "auto"
    """auto: bitsandbytes' paged AdamW for qlora on CUDA, else torch's."""
    sequence_length: Annotated[int, Field(gt=1)] = 1024
    """Longest sample in tokens."""
    packing: bool = True
    """Lay out the samples of an optimizer step without padding; they never see each other. Same samples, same loss."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass. auto: where a step would not fit without."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention backend. auto: flash_attention_2 where it is installed on CUDA, else sdpa."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16: frozen weights and computation in bf16, the adapter in fp32. auto: bf16 on accelerators, fp32 on CPU."""
    seed: NotNegativeInt = 42
    """Fixes the adapter's initial weights, order of the samples and dropout."""
    logging_steps: PositiveInt = 10
    """Steps between two lines of metrics."""
    eval_steps: PositiveInt | None = None
    """Steps between two validations, besides the first, the last, and one with each checkpoint."""
    save_steps: PositiveInt = 500
    """Steps between two checkpoints, besides the last."""
    keep_best: NotNegativeInt = 3
    """Checkpoints kept for their validation loss."""
    keep_last: PositiveInt = 1
    """Newest checkpoints kept."""
    final_weights: Literal["last", "best"] = "last"
    """Which weights the final folder holds: of the last step, or of the best checkpoint by validation loss."""
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    """Where metrics go besides metrics.jsonl."""
    tracker_project: str | None = None
    """W&B project. Default: lacuna."""

    def disagreements(self) -> list[str]:
        """Settings that do not go together, a sentence each."""
        problems = []
        if self.warmup_steps is not None and self.warmup_share is not None:
            problems.append("give training.warmup_share or training.warmup_steps, not both")
        if self.tracker_project is not None and self.tracker != "wandb":
            problems.append("training.tracker_project is W&B's: it needs tracker: wandb")
        if any(name.split(".")[-1] in ("lm_head", "embed_out") for name in self.target_modules or []):
            problems.append("training.target_modules: the head takes no adapter here; leave it out")
        if self.method == "qlora" and self.quantization_bits == 8 and self.four_bit_settings():
            problems.append(f"{', '.join(self.four_bit_settings())}: only 4-bit weights have it")
        if self.method == "qlora" and self.bias != "none":
            problems.append("training.bias: bitsandbytes rounds the biases of its layers; with qlora it is none")
        return problems

    def four_bit_settings(self) -> list[str]:
        """Those of 4-bit quantisation that are not at their defaults."""
        names = ("quantization_type", "double_quantization", "quantization_compute_dtype")
        fields = type(self).model_fields
        return [f"training.{name}" for name in names if getattr(self, name) != fields[name].default]


class AdapterSFTConfig(SFTConfig):
    """A finetune config in the names of our own loop, whose messages spell them as its user does."""

    spelling: ClassVar[Mapping[str, str]] = {**IN_SFT, "batch_size": BATCH}

    @classmethod
    def flag(cls, setting: str) -> str:
        return BATCH_SETTINGS if setting == "batch_size" else cls.spelled(setting)


class FinetuneConfig(Section):
    """LoRA and QLoRA with TRL and PEFT."""

    may_change: ClassVar[set[str]] = FINETUNE_MAY_CHANGE
    alternatives: ClassVar[list[tuple[str, str]]] = FINETUNE_ALTERNATIVES

    trainer: Literal["finetune"] = "finetune"
    """What the config is for."""
    model: ModelSection
    dataset: DatasetSection
    training: TrainingSection = TrainingSection()
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, else MPS, else CPU."""
    gpus: PositiveInt = 1
    """Processes on this machine, one for each GPU, each with the whole model; several start themselves under torchrun.
    """
    max_restarts: NotNegativeInt = 3
    """How often a run with gpus > 1 starts again from its last checkpoint after a process of it died."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        problems = [*self.dataset.disagreements(), *self.training.disagreements(), *self._without_validation()]
        if self.gpus == 1 and self.max_restarts != type(self).model_fields["max_restarts"].default:
            problems.append(RESTARTS_NEED_GPUS)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _without_validation(self) -> list[str]:
        training = self.training
        unused = [
            f"training.{name}"
            for name in ("eval_steps", "final_weights", "keep_best")
            if getattr(training, name) not in (type(training).model_fields[name].default, 0)
        ]
        if self.has_validation or not unused:
            return []
        return [
            f"{', '.join(unused)}: there is no validation; give dataset.validation_path or dataset.validation_share"
        ]

    @property
    def has_validation(self) -> bool:
        return self.dataset.validation_path is not None or self.dataset.validation_share > 0

    def get(self, path: str) -> Any:
        """The value at a dotted path, such as `training.lora_r`. Raises ConfigError where there is no such setting."""
        value = get(self.model_dump(), path)
        if value is MISSING:
            raise ConfigError(f"no setting {path!r}{did_you_mean(path, setting_paths(FinetuneConfig))}")
        return value

    def settings(self, devices: int = 1) -> dict[str, Any]:
        """Dotted path to value; what makes up a batch as one number, because how it is made up does not matter."""
        flat = dict(leaves(self.model_dump()))
        batch = flat.pop("training.batch_size") * flat.pop("training.gradient_accumulation_steps") * devices
        del flat["gpus"]
        return {**flat, BATCH: batch}

    def with_output_dir(self, output_dir: str) -> "FinetuneConfig":
        return self.model_copy(update={"training": self.training.model_copy(update={"output_dir": output_dir})})

    def as_sft(self, devices: int | None = None, resume: str = "auto") -> SFTConfig:
        """The same in the names of our own loop. A row of its batches is one sample. devices: if not gpus."""
        training = self.training
        dumped = self.model_dump()
        values = {name: get(dumped, path) for name, path in IN_SFT.items()}
        warmup_share = 0.03 if training.warmup_steps is training.warmup_share is None else training.warmup_share
        values |= {
            "batch_size": training.batch_size * training.gradient_accumulation_steps * (devices or self.gpus),
            "epochs": None if training.max_steps else training.num_epochs,
            "output_dir": training.output_dir or default_output_dir(self.model.path, ""),
            "validation_share": self.dataset.validation_share or None,
            "warmup_share": warmup_share,
            "keep_best": training.keep_best if self.has_validation else 0,
            "packing": False,
            "compile": False,
            "resume": resume,
        }
        return AdapterSFTConfig(**values)


def default_output_dir(model: str, time: str) -> str:
    """`./checkpoints/<model>-<time>`"""
    return f"./checkpoints/{Path(model).name}-{time}"
