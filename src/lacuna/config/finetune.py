"""FinetuneConfig: every setting of the adapter trainer: those of SFT, and what LoRA adds.

Users write them in the sections of `SPELLING`, which files.py translates where a config is read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from lacuna.config.files import setting_paths
from lacuna.config.training import MAY_CHANGE_ON_RESUME, RESTARTS_NEED_GPUS, ModelPlace, Place, PositiveInt, SFTConfig
from lacuna.config.trees import MISSING, Values, get, leaves, merge, nested
from lacuna.errors import ConfigError
from lacuna.words import did_you_mean

NotNegativeInt = Annotated[int, Field(ge=0)]

SPELLING = {
    "trainer": "trainer",
    "model_name": "model.path", "base_model": "model.base_model", "model_revision": "model.revision",
    "dataset": "dataset.path", "dataset_format": "dataset.format", "dataset_schema": "dataset.type",
    "text_column": "dataset.text_field", "dataset_split": "dataset.train_split", "dataset_subset": "dataset.subset",
    "validation_dataset": "dataset.validation_path", "validation_split": "dataset.validation_split",
    "validation_share": "dataset.validation_share", "split_seed": "dataset.split_seed",
    "unreadable_share": "dataset.unreadable_share", "chat_template": "dataset.chat_template",
    "too_long": "dataset.too_long",
    "method": "training.method", "output_dir": "training.output_dir", "lora_r": "training.lora_r",
    "lora_alpha": "training.lora_alpha", "lora_dropout": "training.lora_dropout",
    "target_modules": "training.target_modules", "bias": "training.bias",
    "quantization_bits": "training.quantization_bits", "quantization_type": "training.quantization_type",
    "double_quantization": "training.double_quantization",
    "quantization_compute_dtype": "training.quantization_compute_dtype", "learning_rate": "training.learning_rate",
    "micro_batch_size": "training.batch_size", "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "epochs": "training.num_epochs", "steps": "training.max_steps", "warmup_steps": "training.warmup_steps",
    "warmup_share": "training.warmup_share", "scheduler": "training.scheduler",
    "weight_decay": "training.weight_decay", "max_gradient_norm": "training.max_gradient_norm",
    "optimizer": "training.optimizer", "sequence_length": "training.sequence_length", "packing": "training.packing",
    "activation_checkpointing": "training.gradient_checkpointing", "attention": "training.attention",
    "precision": "training.precision", "seed": "training.seed", "log_every": "training.logging_steps",
    "evaluate_every": "training.eval_steps", "save_every": "training.save_steps", "keep_best": "training.keep_best",
    "keep_last": "training.keep_last", "final_weights": "training.final_weights", "tracker": "training.tracker",
    "tracker_project": "training.tracker_project",
    "device": "device", "gpus": "gpus", "max_restarts": "max_restarts",
}  # fmt: skip
"""Every setting and where its user writes it, in the order of files."""

BATCH = "training.batch_size × gradient_accumulation_steps"
BATCH_SETTINGS = "training.batch_size or training.gradient_accumulation_steps"
ALTERNATIVES = [
    ("training.warmup_share", "training.warmup_steps"),
    ("dataset.validation_path", "dataset.validation_share"),
]
MAY_CHANGE = {SPELLING[name] for name in MAY_CHANGE_ON_RESUME & SPELLING.keys()} - {"training.batch_size", "gpus"}
FOUR_BIT = ("quantization_type", "double_quantization", "quantization_compute_dtype")


class FinetuneConfig(SFTConfig):
    """LoRA and QLoRA with TRL and PEFT. What `spelling` leaves out of SFT's settings stays at its default."""

    spelling: ClassVar[Mapping[str, str]] = SPELLING
    may_change: ClassVar[set[str]] = MAY_CHANGE
    alternatives: ClassVar[list[tuple[str, str]]] = ALTERNATIVES

    batch_size: ClassVar[int]  # type: ignore[misc]
    """No setting here: see rows_in_step."""

    trainer: Literal["finetune"] = "finetune"  # type: ignore[assignment]
    """What the config is for."""
    base_model: ModelPlace | None = None
    """Folder or hub name that the tokenizer is loaded from. Default: model_name."""
    validation_dataset: Place | None = None
    """Like dataset. Or give validation_share."""
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the distinct samples kept for validation, each with its copies. 0: no validation."""
    chat_template: Place | None = None
    """File with a Jinja chat template, for a tokenizer that has none or another one."""
    method: Literal["lora", "qlora"] = "lora"
    """qlora: the frozen weights are quantised."""
    output_dir: Place | None = None  # type: ignore[assignment]
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
    compile: Literal["auto"] | bool = False
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
    gradient_accumulation_steps: PositiveInt = 4
    """An optimizer step sees micro_batch_size × gradient_accumulation_steps × devices samples."""
    epochs: PositiveInt = 3
    """Passes over the data."""
    steps: PositiveInt | None = None
    """Optimizer steps, whatever epochs says."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the steps in which the learning rate rises linearly. Default: 0.03."""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on after warmup: down to 0, or not."""
    optimizer: Literal["auto", "adamw", "paged_adamw_32bit"] = "auto"
    """auto: bitsandbytes' paged AdamW for qlora on CUDA, else torch's."""
    sequence_length: Annotated[int, Field(gt=1)] = 1024
    """Longest sample in tokens."""
    packing: bool = True
    """Lay out the samples of an optimizer step without padding; they never see each other. Same samples, same loss."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16: frozen weights and computation in bf16, the adapter in fp32. auto: bf16 on accelerators, fp32 on CPU."""
    keep_best: NotNegativeInt = 3
    """Checkpoints kept for their validation loss."""
    keep_last: PositiveInt = 1
    """Newest checkpoints kept."""

    @classmethod
    def spelled(cls, setting: str) -> str:
        return BATCH if setting == "batch_size" else cls.spelling.get(setting, setting)

    @classmethod
    def flag(cls, setting: str) -> str:
        return BATCH_SETTINGS if setting == "batch_size" else cls.spelled(setting)

    @model_validator(mode="before")
    @classmethod
    def _a_given_alternative_replaces_a_default(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("validation_dataset") is not None and "validation_share" not in data:
            return {**data, "validation_share": 0.0}
        return data

    def _disagreements(self) -> list[str]:
        problems = []
        if self.validation_dataset is not None and self.validation_share:
            problems.append("give dataset.validation_path or dataset.validation_share, not both")
        if self.validation_dataset is None and self.validation_split != "validation":
            problems.append("dataset.validation_split is a split of dataset.validation_path, which is not given")
        if not self.validation_share and self.changed_from_default("split_seed"):
            problems.append("dataset.split_seed decides what dataset.validation_share keeps, which is not given")
        if self.warmup_steps is not None and self.warmup_share is not None:
            problems.append("give training.warmup_share or training.warmup_steps, not both")
        if self.tracker_project is not None and self.tracker != "wandb":
            problems.append("training.tracker_project is W&B's: it needs tracker: wandb")
        if any(name.split(".")[-1] in ("lm_head", "embed_out") for name in self.target_modules or []):
            problems.append("training.target_modules: the head takes no adapter here; leave it out")
        if self.method == "qlora" and self.quantization_bits == 8 and (given := self.changed_from_default(*FOUR_BIT)):
            problems.append(f"{', '.join(map(self.spelled, given))}: only 4-bit weights have it")
        if self.method == "qlora" and self.bias != "none":
            problems.append("training.bias: bitsandbytes rounds the biases of its layers; with qlora it is none")
        unused = self.changed_from_default("evaluate_every", "final_weights", "keep_best")
        unused = [self.spelled(name) for name in unused if (name, self.keep_best) != ("keep_best", 0)]
        if unused and not self.has_validation:
            instead = "give dataset.validation_path or dataset.validation_share"
            problems.append(f"{', '.join(unused)}: there is no validation; {instead}")
        if self.gpus == 1 and self.changed_from_default("max_restarts"):
            problems.append(RESTARTS_NEED_GPUS)
        return problems

    @property
    def packs_rows(self) -> bool:
        """A row of the data is one sample; packing is of a step's samples."""
        return False

    @property
    def run_folder(self) -> str:
        return self.output_dir or default_output_dir(self.model_name, "")

    def rows_in_step(self, devices: int | None = None) -> int:
        return self.micro_batch_size * self.gradient_accumulation_steps * (devices or self.gpus)

    def written(self, exclude_none: bool = False) -> Values:
        values = self.model_dump(exclude_none=exclude_none)
        tree: Values = {}
        for name, path in self.spelling.items():
            if name in values:
                tree = merge(tree, nested(path, values[name]))
        return tree

    def get(self, path: str) -> Any:
        """The value at a dotted path, such as `training.lora_r`. Raises ConfigError where there is no such setting."""
        value = get(self.written(), path)
        if value is MISSING:
            raise ConfigError(f"no setting {path!r}{did_you_mean(path, setting_paths(FinetuneConfig))}")
        return value

    def settings(self, devices: int = 1) -> dict[str, Any]:
        """Dotted path to value; what makes up a batch as one number, because how it is made up does not matter."""
        made_up_of = {"training.batch_size", "training.gradient_accumulation_steps", "gpus"}
        settings = {path: value for path, value in leaves(self.written()) if path not in made_up_of}
        return {**settings, BATCH: self.rows_in_step(devices)}

    def in_folder(self, output_dir: str, resume: str = "auto") -> "FinetuneConfig":
        """resume: as in SFT; here it is the command that says it."""
        return self.model_copy(update={"output_dir": output_dir, "resume": resume})


def default_output_dir(model: str, time: str) -> str:
    """`./checkpoints/<model>-<time>`"""
    return f"./checkpoints/{Path(model).name}-{time}"
