"""A model's tokenizer, config and weights: from a folder or the hub, in one process or split among many."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lacuna.config.training import SFTConfig, TrainingConfig
from lacuna.errors import ConfigError, ModelError
from lacuna.machine.detect import Device
from lacuna.train.checkpoint import load_tensors, stored_shapes, weights_of
from lacuna.train.distributed import World, shard
from lacuna.train.model import Execution, LossModel, transformer_blocks


def load_tokenizer(config: TrainingConfig) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer, with the config's chat template if it gives one. Raises ModelError."""
    _check_model_name(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model_name, **_source(config))
    except (OSError, ValueError) as error:
        raise _cannot_load(config, "no tokenizer could be loaded", error) from error
    if tokenizer.vocab_size < 2:
        raise ModelError(f"{config.model_name}: no tokenizer could be loaded: there is none in it")
    if not tokenizer.is_fast:
        raise ModelError(f"{config.model_name}: only fast tokenizers (tokenizer.json) give exact loss masks")
    if isinstance(config, SFTConfig) and config.chat_template is not None:
        try:
            tokenizer.chat_template = Path(config.chat_template).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{config.spelled('chat_template')} {config.chat_template}: {error.strerror}") from error
    return tokenizer


def load_model_config(config: TrainingConfig) -> Any:
    """The model's config.json. Raises ModelError: not there, or too short for sequence_length."""
    _check_model_name(config)
    try:
        model_config = AutoConfig.from_pretrained(config.model_name, **_source(config))
    except (OSError, ValueError) as error:
        raise _cannot_load(config, "no model could be found", error) from error
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.sequence_length > longest:
        raise ModelError(
            f"{config.spelled('sequence_length')} {config.sequence_length} is more than the {longest} positions of "
            f"{config.model_name}: pass {config.flag('sequence_length')} {longest} or less"
        )
    return model_config


def _source(config: TrainingConfig) -> dict[str, Any]:
    """A model's own code is never run."""
    return {"revision": config.model_revision or "main", "trust_remote_code": False}


def _check_model_name(config: TrainingConfig) -> None:
    is_folder = Path(config.model_name).is_dir()
    looks_like_path = config.model_name.startswith(("/", ".", "~")) or config.model_name.count("/") > 1
    if looks_like_path and not is_folder:
        name = Path(config.model_name).name
        raise ModelError(
            f"{config.spelled('model_name')} {config.model_name}: no such folder; to download a model into it: "
            f"hf download OWNER/{name} --local-dir {config.model_name}"
        )
    if (Path(config.model_name) / "adapter_config.json").is_file():
        raise ModelError(
            f"{config.spelled('model_name')} {config.model_name}: this is an adapter, no model: take its base, or "
            "`lacuna merge` both"
        )
    if is_folder and config.model_revision is not None:
        revision = config.spelled("model_revision")
        raise ModelError(f"{revision} is for hub models, but {config.model_name} is a folder")


def _cannot_load(config: TrainingConfig, what: str, error: Exception) -> ModelError:
    """The same words for the tokenizer, the config and the weights where the hub has no such model at all."""
    name, cause = config.model_name, error.__cause__
    model, revision = f"{config.spelled('model_name')} {name}", config.spelled("model_revision")
    if isinstance(cause, GatedRepoError):
        return ModelError(f"{model}: accept its terms on its hub page, then log in with `hf auth login`")
    if isinstance(cause, RepositoryNotFoundError):
        return ModelError(f"{model}: no such folder or hub model; a private one needs `hf auth login`")
    if isinstance(cause, RevisionNotFoundError):
        return ModelError(f"{revision} {config.model_revision}: no such commit, tag or branch of {name}")
    if isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return ModelError(
            f"{model}: no such folder, not downloaded before, and the hub is out of reach; where it can be "
            f"reached: hf download {name}"
        )
    said = str(error).strip().splitlines() or [type(error).__name__]
    if "scaled_dot_product_attention" in said[0]:
        flag = config.flag("attention")
        return ModelError(f"{name}: transformers has no sdpa attention for this model: pass {flag} eager")
    return ModelError(f"{name}: {what}: {said[0]}")


def load_model(
    config: TrainingConfig, model_config: Any, tokenizer: PreTrainedTokenizerBase, execution: Execution
) -> PreTrainedModel:
    """The model in fp32 on the device, random or pretrained. Raises ModelError where weights or vocabulary lack."""
    settings: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": execution.attention}
    torch.manual_seed(config.seed)
    if config.initialise == "random":
        model: Any = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False, **settings)
        missing: Collection[str] = ()
    else:
        model, missing = load_weights(config, settings)
    check_loaded(config, model, missing, tokenizer)
    prepared: PreTrainedModel = model.to(execution.device.type)
    return prepared


def load_weights(config: TrainingConfig, settings: dict[str, Any]) -> tuple[Any, Collection[str]]:
    """The model with its weights, from safetensors only, and the names of those that are missing. Raises ModelError."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.model_name, use_safetensors=True, output_loading_info=True, **_source(config), **settings
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _cannot_load(config, "its weights cannot be loaded", error) from error
    model, information = loaded
    return model, information["missing_keys"]


def weights_folder(config: TrainingConfig) -> Path:
    """Where the model's safetensors are; those of a hub model are downloaded. Raises ModelError."""
    if Path(config.model_name).is_dir():
        return Path(config.model_name)
    try:
        patterns = ["*.json", "*.safetensors"]
        return Path(snapshot_download(config.model_name, revision=config.model_revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise _cannot_load(config, "its weights cannot be loaded", error) from error


def _stored(config: TrainingConfig, folder: Path) -> dict[str, tuple[int, ...]]:
    try:
        return stored_shapes(folder)
    except (OSError, SafetensorError) as error:
        raise _cannot_load(config, "its weights cannot be loaded", error) from error


def load_generation_config(config: TrainingConfig) -> GenerationConfig | None:
    """The model's generation_config.json, if it has one."""
    try:
        return GenerationConfig.from_pretrained(config.model_name, revision=config.model_revision or "main")
    except OSError:
        return None


def check_loaded(
    config: TrainingConfig, model: PreTrainedModel, missing: Collection[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise ModelError where weights are missing or tokens have no embedding, and make what is loaded savable."""
    if missing:
        raise ModelError(
            f"{config.model_name}: the weights lack {', '.join(sorted(missing)[:5])}, which would start at random; "
            "initialise = 'random' of pretrain and sft trains from scratch"
        )
    _mend_generation_config(model)
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"{config.model_name}: the tokenizer has {len(tokenizer)} tokens, the model only {vocabulary} embeddings"
        )


def _mend_generation_config(model: PreTrainedModel) -> None:
    """Sampling settings without do_sample, which many hub models have, could be loaded but never saved again."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True


def load_sharded(
    config: TrainingConfig, model_config: Any, tokenizer: PreTrainedTokenizerBase, execution: Execution, world: World
) -> LossModel:
    """The model, split among the processes before it has any weights: each then reads its own part of them.

    Weights that are random, quantised, or stored under other names or in other shapes than the model's, are made by the
    first process, on its host, and sent from there. Raises ModelError as load_model does.
    """
    settings = {"dtype": torch.float32, "attn_implementation": execution.attention}
    with init_empty_weights(include_buffers=False):
        causal_lm: Any = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False, **settings)
    causal_lm.tie_weights()
    world.agreed(lambda: transformer_blocks(causal_lm))
    buffers = dict(causal_lm.named_buffers())
    model = LossModel(causal_lm, execution.dtype)
    shard(model, config, world, execution)
    model.to_empty(device=execution.device.type)
    for name, buffer in causal_lm.named_buffers():
        buffer.copy_(buffers[name])
    weights = {name.removeprefix("model."): tensor for name, tensor in weights_of(causal_lm).items()}
    folder = world.agreed(lambda: weights_folder(config)) if config.initialise == "pretrained" else None
    stored = world.agreed(lambda: _stored(config, folder)) if folder is not None else {}
    if folder is not None and all(tuple(tensor.shape) == stored.get(name) for name, tensor in weights.items()):
        load_tensors(folder, weights)
        causal_lm.generation_config = load_generation_config(config) or causal_lm.generation_config
        world.agreed(lambda: check_loaded(config, causal_lm, (), tokenizer))
        return model
    on_host = replace(execution, device=Device("cpu", "CPU"))
    source = world.agreed(lambda: load_model(config, model_config, tokenizer, on_host) if world.is_first else None)
    full = {} if source is None else source.state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(causal_lm, full, options=options)
    if source is not None:
        causal_lm.config, causal_lm.generation_config = source.config, source.generation_config
    return model
