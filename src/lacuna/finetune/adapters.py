"""The frozen model, quantised or not, and the adapter on it."""

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModelForCausalLM, TaskType
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lacuna.config.finetune import FinetuneConfig
from lacuna.data.chat import Renderer
from lacuna.errors import ConfigError
from lacuna.machine.detect import Device
from lacuna.machine.quantised import quantised_product
from lacuna.train.loading import check_loaded, load_weights
from lacuna.train.model import (
    Execution,
    stop_at_end_of_turn,
    supervised_loss,
    transformer_blocks,
)
from lacuna.words import did_you_mean


class AdapterModel(PeftModelForCausalLM):
    """PEFT's model, whose forward pass is the loss, so that whatever wraps the module covers both."""

    dtype_of_products: torch.dtype
    chunked: bool

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The frozen model, with the adapter in its layers."""
        return cast(PreTrainedModel, self.get_base_model())

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, position_ids: Tensor, predicting: Tensor, targets: Tensor, scale: float
    ) -> Float[Tensor, ""]:
        """See supervised_loss."""
        return supervised_loss(
            self.causal_lm, input_ids, position_ids, predicting, targets, scale, self.dtype_of_products, self.chunked
        )


def check_quantisation(config: FinetuneConfig, device: Device) -> None:
    """Quantise a few weights and multiply by them. Raises ConfigError where bitsandbytes does not work here."""
    if config.method != "qlora":
        return
    advice = "set training.method: lora, which needs no quantisation"
    try:
        if not quantised_product(config.quantization_bits, device.type):
            raise ConfigError(f"training.method qlora: bitsandbytes gives no finite product on {device.name}: {advice}")
    except (ImportError, RuntimeError, NotImplementedError, AttributeError, OSError, ValueError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"training.method qlora: bitsandbytes does not work on {device.name} ({said[0]}): {advice}"
        ) from error


def load_frozen(config: FinetuneConfig, execution: Execution, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model whose weights will not move, quantised for qlora, on the device. Raises ModelError."""
    settings: dict[str, Any] = {"dtype": execution.dtype, "attn_implementation": execution.attention}
    if config.method == "qlora":
        settings["quantization_config"] = quantisation(config, execution.dtype)
        if execution.device.type != "cpu":
            settings["device_map"] = {"": execution.device.type}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="bitsandbytes")
        model, missing = load_weights(config, settings)
    check_loaded(config, model, missing, tokenizer)
    if config.method == "qlora":
        _keep_as_loaded(model)
        return cast(PreTrainedModel, model)
    return cast(PreTrainedModel, model.to(execution.device.type))


def _keep_as_loaded(model: nn.Module) -> None:
    """On some CPUs bitsandbytes repacks 4-bit weights when it evaluates, and would go on training with other ones."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quantisation(config: FinetuneConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """# ref: Dettmers et al. 2023, QLoRA, arXiv 2305.14314"""
    if config.quantization_bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = {"auto": dtype, "bf16": torch.bfloat16, "fp32": torch.float32}[config.quantization_compute_dtype]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization_type,
        bnb_4bit_use_double_quant=config.double_quantization,
        bnb_4bit_compute_dtype=compute,
    )


def add_adapter(causal_lm: PreTrainedModel, config: FinetuneConfig, dtype: torch.dtype) -> AdapterModel:
    """Draw an adapter, in fp32, from the config's seed. Raises ConfigError for layers that the model does not have."""
    targets = target_modules(causal_lm, config.target_modules)
    torch.manual_seed(config.seed)
    adapter = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        bias=config.bias,
        base_model_name_or_path=config.model_name,
        revision=config.model_revision,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        try:
            model = AdapterModel(causal_lm, adapter)
        except ValueError as error:
            raise ConfigError(f"training.target_modules: PEFT cannot adapt this model so: {error}") from error
    model.dtype_of_products = dtype
    to_fp32(model)
    return model


def to_fp32(model: nn.Module) -> None:
    """Trainable weights in fp32: in bf16 most updates are too small to change them.

    # ref: https://github.com/huggingface/peft/issues/2889
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def target_modules(causal_lm: PreTrainedModel, wanted: list[str] | None) -> list[str]:
    """Names of the layers that get an adapter: the wanted ones, or all linear ones in the transformer blocks.

    Raises ConfigError for each name that no layer has: PEFT passes over it as long as one other name fits.
    """
    inside = {id(module) for block in transformer_blocks(causal_lm) for module in block.modules()}
    names = [name for name, module in causal_lm.named_modules() if is_linear(module) and id(module) in inside]
    known = sorted({name.rpartition(".")[2] for name in names})
    problems = [
        f"training.target_modules: {type(causal_lm).__name__} has no linear layer {target!r}"
        f"{did_you_mean(target, known)}; it has {', '.join(known)}. Leave target_modules out to take all of them"
        for target in wanted or []
        if not any(name == target or name.endswith(f".{target}") for name in names)
    ]
    if problems:
        raise ConfigError(problems)
    return wanted or known


def is_linear(module: nn.Module) -> bool:
    """Linear layers of torch and bitsandbytes, and GPT-2's, which are called Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def describe(model: AdapterModel) -> str:
    """Which layers have an adapter, and how much is trained."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    adapter = cast(LoraConfig, model.peft_config["default"])
    experts = any(parameter.ndim == 3 and not parameter.requires_grad for parameter in model.parameters())
    without = "; the experts are no linear layers, and get none" if experts else ""
    return f"adapter on {', '.join(sorted(adapter.target_modules or []))}: {trained:,} weights to train{without}"


def save_adapter(model: AdapterModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A folder that plain PEFT loads, with the tokenizer, its template and where generation stops."""
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    if tokenizer.chat_template is not None:
        stop_at_end_of_turn(model.causal_lm, tokenizer, Renderer(tokenizer).stop_token)
    model.causal_lm.generation_config.save_pretrained(folder)
