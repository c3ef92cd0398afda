"""PretrainConfig and SFTConfig: every setting of our own training loop, its default and what it means.

The string under a field is its documentation: `--help` and docs/settings.md print it.
"""

import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

STRICT = ConfigDict(
    strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, defer_build=True
)
"""How the config of every run is read."""

PositiveInt = Annotated[int, Field(gt=0)]
Place = Annotated[str, Field(min_length=1)]
"""Of data or a run: a path, or a hub name."""
ModelPlace = Annotated[Place, AfterValidator(os.path.expanduser)]
Share = Annotated[float, Field(gt=0, lt=1)]

ALTERNATIVES = [("epochs", "steps"), ("warmup_share", "warmup_steps"), ("validation_dataset", "validation_share")]
"""Settings that exclude each other; where a later layer gives one, it replaces an earlier layer's other."""

MAY_CHANGE_ON_RESUME = {
    "output_dir", "resume", "device", "gpus", "max_restarts", "sharding", "attention", "compile",
    "activation_checkpointing", "micro_batch_size", "log_every", "evaluate_every", "save_every", "keep_best",
    "keep_last", "final_weights", "tracker", "tracker_project",
}  # fmt: skip
"""What leaves the sequence of samples and the mathematics of a run as they are."""

WARMUP_SHARE = 0.03
"""Of the steps, where nothing says how long the warmup is."""

RESTARTS_NEED_GPUS = "max_restarts is for gpus > 1; under torchrun, give it --max-restarts"


class TrainingConfig(BaseModel):
    """What pretraining and SFT share."""

    model_config = STRICT

    model_name: ModelPlace
    """Hugging Face model: a hub name, or a folder with config.json and tokenizer files."""
    model_revision: str | None = None
    """Commit, tag or branch of a hub model."""
    initialise: Literal["pretrained", "random"] = "pretrained"
    """Start from the model's weights, or from random ones in its shape."""
    dataset: Place
    """File (jsonl, json, csv, parquet, text), folder, glob, or the name of a hub data set."""
    dataset_format: Literal["auto", "jsonl", "json", "csv", "parquet", "text"] = "auto"
    """Kind of the files. auto: by their endings."""
    dataset_subset: str | None = None
    """Configuration name of a hub data set, such as sample-10BT."""
    dataset_split: str = "train"
    """Split of a hub data set, or of a folder whose files are named by split."""
    validation_dataset: str | None = None
    """Like dataset; its loss is what 'best' means. Or give validation_share."""
    validation_split: str = "validation"
    """Split of validation_dataset."""
    validation_share: Share | None = None
    """Share of the distinct documents kept for validation, each with its copies."""
    split_seed: Annotated[int, Field(ge=0)] = 42
    """Which documents validation_share keeps: the same ones whatever the seed."""
    text_column: str = "text"
    """Column of plain text."""
    unreadable_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of rows that may be broken; they are counted and left out. More of them stop the run."""
    output_dir: Place
    """The run folder: config, metrics, checkpoints and the final model."""
    sequence_length: Annotated[int, Field(gt=1)] = 2048
    """Tokens in a row."""
    packing: bool = True
    """Fill rows with several documents, which never see each other; otherwise one padded document a row."""
    batch_size: PositiveInt = 64
    """Rows in an optimizer step, over all processes."""
    micro_batch_size: PositiveInt = 4
    """Rows in a forward pass of a process; the rest of the batch is gradient accumulation."""
    epochs: PositiveInt | None = None
    """Passes over the data. Either this or steps."""
    steps: PositiveInt | None = None
    """Optimizer steps. Either this or epochs."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate, reached after warmup."""
    final_learning_rate_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where the cosine ends, as a share of the peak."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] | None = WARMUP_SHARE
    """Share of the steps in which the learning rate rises linearly. Or give warmup_steps."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps in which the learning rate rises linearly."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay of AdamW, on matrices only (no biases, no norms)."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's mean of squared gradients."""
    max_gradient_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Fixes initial weights, order of the samples and dropout."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: CUDA, else MPS, else CPU."""
    gpus: PositiveInt = 1
    """Processes on this machine, one for each GPU; more than one start themselves under torchrun."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often a run with gpus > 1 starts again from its last checkpoint after a process of it died."""
    sharding: Literal["full", "hybrid"] = "full"
    """What is split among processes is split over all, or (hybrid) within a node and repeated on every node."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16: computation in bf16, weights and optimizer in fp32. auto: bf16 on accelerators, fp32 on CPU."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention backend. auto: flash_attention_2 where it is installed on CUDA, else sdpa."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile of each transformer block. auto: on CUDA."""
    activation_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass. auto: where a step would not fit without."""
    log_every: PositiveInt = 10
    """Steps between two lines of metrics."""
    evaluate_every: PositiveInt | None = None
    """Steps between two validations, besides the first and the last. Default: with each save."""
    save_every: PositiveInt = 500
    """Steps between two checkpoints, besides the last."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """Checkpoints kept for their validation loss; those saved at a step without validation have none."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept."""
    final_weights: Literal["last", "best"] = "last"
    """Which weights the final folder holds: of the last step, or of the best checkpoint by validation loss."""
    resume: str = "auto"
    """auto: from the newest whole checkpoint of the run folder; never; or a checkpoint's path."""
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    """Where metrics go besides metrics.jsonl."""
    tracker_project: str | None = None
    """W&B project. Default: lacuna."""

    spelling: ClassVar[Mapping[str, str]] = {}
    """Setting to where its user writes it, where that is another name."""
    may_change: ClassVar[set[str]] = MAY_CHANGE_ON_RESUME
    alternatives: ClassVar[list[tuple[str, str]]] = ALTERNATIVES

    @classmethod
    def spelled(cls, setting: str) -> str:
        """What its user calls a setting, for messages."""
        return cls.spelling.get(setting, setting)

    @classmethod
    def flag(cls, setting: str) -> str:
        """How its user gives a setting, for messages: `--output-dir`."""
        return f"--{setting.replace('_', '-')}"

    @property
    def has_validation(self) -> bool:
        return self.validation_dataset is not None or bool(self.validation_share)

    @property
    def packs_rows(self) -> bool:
        """Whether several documents share a row."""
        return self.packing

    @property
    def whole_epochs(self) -> int | None:
        """Passes over the data, where steps do not say how long to train."""
        return self.epochs if self.steps is None else None

    @property
    def run_folder(self) -> str:
        """output_dir, or what it is by default."""
        return self.output_dir

    def rows_in_step(self, devices: int | None = None) -> int:
        """Rows that an optimizer step of so many processes sees. Default: gpus."""
        return self.batch_size

    def written(self, exclude_none: bool = False) -> dict[str, Any]:
        """Every setting, as its user writes it into a file."""
        return self.model_dump(exclude_none=exclude_none)

    def settings(self, devices: int = 1) -> dict[str, Any]:
        """Name to value: what a resumed run is compared by."""
        return self.written()

    @model_validator(mode="before")
    @classmethod
    def _a_given_alternative_replaces_a_default(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("warmup_share", 0.0) is None and data.get("warmup_steps") is None:
            return {**data, "warmup_share": 0.0}
        if isinstance(data, dict) and data.get("warmup_steps") is not None and "warmup_share" not in data:
            return {**data, "warmup_share": None}
        return data

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if problems := self._disagreements():
            raise ValueError("\n".join(problems))
        return self

    def _disagreements(self) -> list[str]:
        problems = [
            f"give {first} or {second}, not both"
            for first, second in ALTERNATIVES
            if getattr(self, first) is not None and getattr(self, second) is not None
        ]
        if self.epochs is None and self.steps is None:
            problems.append("say how long to train: epochs or steps (--epochs or --steps)")
        if self.batch_size % self.micro_batch_size:
            problems.append(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}: "
                f"try --micro-batch-size {_largest_divisor(self.batch_size, self.micro_batch_size)}"
            )
        if self.batch_size < self.gpus:
            problems.append(f"batch_size {self.batch_size} leaves some of {self.gpus} gpus without a row: raise it")
        if self.gpus == 1 and self.changed_from_default("max_restarts"):
            problems.append(RESTARTS_NEED_GPUS)
        if not self.has_validation:
            unused = self.changed_from_default("evaluate_every", "final_weights", "keep_best", "validation_split")
            if unused := [name for name in unused if (name, self.keep_best) != ("keep_best", 0)]:
                problems.append(
                    f"{', '.join(unused)}: there is no validation; give validation_dataset or validation_share"
                )
        if self.validation_share is None and self.changed_from_default("split_seed"):
            problems.append("split_seed decides what validation_share keeps, which is not given")
        if self.tracker_project is not None and self.tracker != "wandb":
            problems.append("tracker_project is W&B's: it needs tracker = 'wandb'")
        return problems

    def changed_from_default(self, *names: str) -> list[str]:
        """Those of the settings that are not at their defaults: a run's own config.toml names all of them."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]


class PretrainConfig(TrainingConfig):
    """Next-token prediction on plain text."""

    trainer: Literal["pretrain"] = "pretrain"
    """What the config is for."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate, reached after warmup."""
    final_learning_rate_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Where the cosine ends, as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay of AdamW, on matrices only (no biases, no norms)."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of AdamW's mean of squared gradients."""
    streaming: bool = False
    """Read and tokenise while training, for data that does not fit in memory; needs steps."""
    streaming_window: PositiveInt = 256
    """Rows that are read, packed and shuffled together when streaming."""

    def _disagreements(self) -> list[str]:
        problems = super()._disagreements()
        if self.streaming and self.steps is None:
            problems.append("streaming does not know the length of the data: give steps, not epochs")
        if self.streaming and self.validation_share is not None:
            problems.append("streaming cannot set a share aside: give validation_dataset")
        if not self.streaming and self.changed_from_default("streaming_window"):
            problems.append("streaming_window needs streaming = true")
        return problems


class SFTConfig(TrainingConfig):
    """Supervised fine-tuning: the loss is on the assistant's tokens only."""

    trainer: Literal["sft"] = "sft"
    """What the config is for."""
    dataset_schema: Literal["auto", "chat", "prompt_completion", "instruction", "sharegpt", "text"] = "auto"
    """Columns of the data. auto: found from the first rows, and said."""
    chat_template: str | None = None
    """File with a Jinja chat template, for a tokenizer that has none or another one."""
    too_long: Literal["drop", "truncate", "stop"] = "drop"
    """What happens to conversations longer than sequence_length; they are counted and said."""


FLAT: dict[str, type[TrainingConfig]] = {"pretrain": PretrainConfig, "sft": SFTConfig}
"""Our own loop's configs, whose settings are flags too."""


def _largest_divisor(number: int, limit: int) -> int:
    return next(candidate for candidate in range(min(number, limit), 0, -1) if number % candidate == 0)
