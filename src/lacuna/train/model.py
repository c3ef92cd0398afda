"""The model: loading it, what the loop wraps around it, and the proof that packing does not leak."""

import importlib.util
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from lacuna.config.training import SFTConfig, TrainingConfig
from lacuna.errors import ConfigError, ModelError
from lacuna.platform.detect import Device
from lacuna.train.loss import chunked_cross_entropy

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Execution:
    """What `auto` settings came to on this device."""

    device: Device
    dtype: torch.dtype
    attention: str
    compile: bool

    @property
    def peak_flops(self) -> float | None:
        """Of the device in this precision; None where it is not known."""
        return self.device.peak_bf16_flops if self.dtype == torch.bfloat16 else None

    @property
    def flatten_rows(self) -> bool:
        """transformers' flash attention tells documents apart only in a batch of one row."""
        return self.attention.startswith("flash_attention")


def flash_attention_works(device: Device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None


def resolve_execution(config: TrainingConfig, device: Device) -> Execution:
    """Settle precision, attention and compilation. Raises ConfigError for what the device cannot do."""
    on_cuda = device.type == "cuda"
    has_bf16 = torch.cuda.is_bf16_supported() if on_cuda else True
    wanted = {"auto": "bf16" if device.type != "cpu" and has_bf16 else "fp32"}.get(config.precision, config.precision)
    if wanted == "bf16" and not has_bf16:
        raise ConfigError(f"precision 'bf16': {device.name} has no bf16; choose --precision fp32")
    dtype = torch.bfloat16 if wanted == "bf16" else torch.float32
    has_flash = flash_attention_works(device)
    attention = config.attention
    if attention == "auto":
        attention = "flash_attention_2" if has_flash and dtype == torch.bfloat16 else "sdpa"
    if attention == "flash_attention_2" and not (has_flash and dtype == torch.bfloat16):
        raise ConfigError(
            "attention 'flash_attention_2' needs CUDA, bf16 and the package flash-attn; choose --attention auto"
        )
    has_compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    if config.compile is True and not has_compiler:
        raise ConfigError("compile = true needs a C compiler (gcc or clang), and there is none; choose --compile auto")
    return Execution(device, dtype, attention, on_cuda and has_compiler if config.compile == "auto" else config.compile)


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
            raise ConfigError(f"chat_template {config.chat_template}: {error.strerror}") from error
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
            f"sequence_length {config.sequence_length} is more than the {longest} positions of {config.model_name}: "
            f"pass --sequence-length {longest} or less"
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
            f"model_name {config.model_name}: no such folder; to download a model into it: "
            f"hf download OWNER/{name} --local-dir {config.model_name}"
        )
    if (Path(config.model_name) / "adapter_config.json").is_file():
        raise ModelError(
            f"model_name {config.model_name}: this is an adapter, no model: take its base, or `lacuna merge` both"
        )
    if is_folder and config.model_revision is not None:
        raise ModelError(f"model_revision is for hub models, but {config.model_name} is a folder")


def _cannot_load(config: TrainingConfig, what: str, error: Exception) -> ModelError:
    """The same words for the tokenizer, the config and the weights where the hub has no such model at all."""
    name, cause = config.model_name, error.__cause__
    if isinstance(cause, GatedRepoError):
        return ModelError(f"model_name {name}: accept its terms on its hub page, then log in with `hf auth login`")
    if isinstance(cause, RepositoryNotFoundError):
        return ModelError(f"model_name {name}: no such folder or hub model; a private one needs `hf auth login`")
    if isinstance(cause, RevisionNotFoundError):
        return ModelError(f"model_revision {config.model_revision}: no such commit, tag or branch of {name}")
    if isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return ModelError(
            f"model_name {name}: no such folder, not downloaded before, and the hub is out of reach; where it can be "
            f"reached: hf download {name}"
        )
    said = str(error).strip().splitlines() or [type(error).__name__]
    if "scaled_dot_product_attention" in said[0]:
        return ModelError(f"{name}: transformers has no sdpa attention for this model: pass --attention eager")
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


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that repeat: what is compiled, checkpointed and sharded one by one."""
    wanted = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return list(module)
    raise ModelError(f"{type(model).__name__}: no list of {wanted} layers found in it")


def prepare_blocks(model: PreTrainedModel, checkpointing: bool, compiled: bool) -> None:
    """Activation checkpointing first, compilation inside it: each block's recomputation then runs compiled too."""
    if checkpointing:
        model.activation_checkpointing_enable()
    if compiled:
        for block in transformer_blocks(model):
            block.compile()


def needs_checkpointing(config: TrainingConfig, model: PreTrainedModel, device: Device, dtype: torch.dtype) -> bool:
    """Whether weights, gradients, AdamW and activations of a step would take more than 80 % of the device's memory.

    What autograd keeps of a token and layer under bf16 autocast is close to 24 bytes × hidden size + 10 × MLP width
    (measured with saved-tensor hooks on Qwen2.5's shapes: 64 to 77 × hidden size), in fp32 about 1.6 times as much.
    """
    if device.memory is None:
        return False
    text_config = model.config.get_text_config()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = config.micro_batch_size * config.sequence_length
    mlp_width = text_config.to_dict().get("intermediate_size") or 4 * text_config.hidden_size
    token_bytes = (24 * text_config.hidden_size + 10 * mlp_width) * (1.6 if dtype == torch.float32 else 1)
    activations = token_bytes * text_config.num_hidden_layers * tokens
    return bool(16 * parameters + activations > 0.8 * device.memory)


def supervised_loss(
    causal_lm: PreTrainedModel,
    input_ids: Int[Tensor, "rows length"],
    position_ids: Int[Tensor, "rows length"],
    predicting: Int[Tensor, " targets"],
    targets: Int[Tensor, " targets"],
    scale: float,
    dtype: torch.dtype,
    chunked: bool,
) -> Float[Tensor, ""]:
    """Sum of the targets' cross-entropies times scale.

    position_ids restart with every document: that, with no attention mask and no cache, is what keeps documents
    apart. predicting: flat indices (row × length + column) of the tokens that predict targets.
    # ref: https://github.com/huggingface/transformers/pull/46634 (a cache or a mask silently joins documents)
    """
    arguments = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
    with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        if chunked:
            hidden = causal_lm.base_model(**arguments).last_hidden_state
            picked = hidden.flatten(0, 1).index_select(0, predicting)
            weight: Tensor = causal_lm.get_output_embeddings().weight
            return chunked_cross_entropy(picked, weight, targets, scale, dtype)
        logits = causal_lm(**arguments).logits
    picked = logits.flatten(0, 1).index_select(0, predicting).float()
    return functional.cross_entropy(picked, targets, reduction="sum") * scale


class LossModel(nn.Module):
    """The model and its loss as one forward pass, so that whatever wraps the module covers both."""

    def __init__(self, causal_lm: PreTrainedModel, dtype: torch.dtype, chunked: bool = True) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.dtype = dtype
        self.chunked = chunked

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, predicting: Tensor, targets: Tensor, scale: float
    ) -> Float[Tensor, ""]:
        """See supervised_loss."""
        return supervised_loss(
            self.causal_lm, input_ids, position_ids, predicting, targets, scale, self.dtype, self.chunked
        )


@torch.no_grad()
def prove_loss(causal_lm: PreTrainedModel, flatten_rows: bool, packing: bool) -> bool:
    """Try on tiny documents what the loss relies on, in fp32 where the attention can.

    Returns whether the head is a plain matrix product, also for hidden states as large as trained ones, so that the
    chunked loss is right. Raises ModelError where a document's logits change with the document before it.
    """
    was_training = causal_lm.training
    causal_lm.eval()
    device = causal_lm.device
    vocabulary: int = causal_lm.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(1 if flatten_rows else 2, -1).to(device)
    last = torch.arange(14) * 7 % vocabulary
    precise = not flatten_rows and causal_lm.dtype == torch.float32
    tolerance = 1e-5 if precise else 2e-2

    def outputs(step: int) -> tuple[Tensor, Tensor]:
        ids = torch.cat([torch.arange(10) * step % vocabulary, last]).expand_as(positions).to(device)
        arguments = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        with torch.autocast(device.type, torch.bfloat16, enabled=not precise):
            return causal_lm.base_model(**arguments).last_hidden_state, causal_lm(**arguments).logits.float()

    _, behind_one = outputs(step=3)
    _, behind_another = outputs(step=5)
    hook = causal_lm.base_model.register_forward_hook(_enlarge_hidden_states)
    hidden, logits = outputs(step=3)
    hook.remove()
    causal_lm.train(was_training)
    leak = float((behind_one - behind_another)[:, 10:].abs().max() / behind_one.abs().max())
    if packing and leak > tolerance:
        raise ModelError(
            f"{type(causal_lm).__name__} lets packed documents see each other (the logits of one change by {leak:.1e} "
            "with the one before it): this architecture needs --packing false"
        )
    head: Any = causal_lm.get_output_embeddings()
    product = (hidden.float() @ head.weight.float().T - logits).abs().max() / logits.abs().max()
    return head.bias is None and float(product) < max(tolerance, 1e-3)


def _enlarge_hidden_states(_: nn.Module, __: Any, output: Any) -> Any:
    output.last_hidden_state = output.last_hidden_state * 1000
    return output


def stop_at_end_of_turn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_token: str) -> None:
    """Make generation end where the assistant's turn ends, also where that is not the tokenizer's end of sequence."""
    before = model.generation_config.eos_token_id
    known = [before] if isinstance(before, int) else list(before or [])
    wanted = [tokenizer.convert_tokens_to_ids(stop_token), tokenizer.eos_token_id]
    model.generation_config.eos_token_id = list(dict.fromkeys(token for token in wanted + known if token is not None))
