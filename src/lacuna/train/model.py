"""The model: what the loop wraps around it, its loss, and the proof that packing does not leak."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from lacuna.config.training import TrainingConfig
from lacuna.errors import ConfigError, ModelError
from lacuna.machine.detect import Device
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


def resolve_execution(config: TrainingConfig, device: Device, report: Callable[[str], None]) -> Execution:
    """Settle precision, attention and compilation.

    What cannot be had and would not change the result is replaced, and reported. Raises ConfigError for a precision
    that the device does not have.
    """
    on_cuda = device.type == "cuda"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_cuda else True
    wanted = {"auto": "bf16" if device.type != "cpu" and has_bf16 else "fp32"}.get(config.precision, config.precision)
    if wanted == "bf16" and not has_bf16:
        raise ConfigError(f"precision 'bf16': {device.name} has no bf16; choose {config.flag('precision')} fp32")
    dtype = torch.bfloat16 if wanted == "bf16" else torch.float32
    has_flash = flash_attention_works(device)
    attention = config.attention
    if attention == "auto":
        attention = "flash_attention_2" if has_flash and dtype == torch.bfloat16 else "sdpa"
    if attention == "flash_attention_2" and not (has_flash and dtype == torch.bfloat16):
        report("flash_attention_2 is not there (it needs CUDA, bf16 and the package flash-attn): attention by sdpa")
        attention = "sdpa"
    has_compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    wants_compiled = on_cuda if config.compile == "auto" else config.compile
    if wants_compiled and not has_compiler:
        report("compile needs a C compiler (gcc or clang), and there is none: nothing is compiled")
    return Execution(device, dtype, attention, wants_compiled and has_compiler)


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


def supervised_loss(
    causal_lm: PreTrainedModel,
    input_ids: Int[Tensor, "rows length"],
    position_ids: Int[Tensor, "rows length"],
    predicting: Int[Tensor, " targets"],
    targets: Int[Tensor, " targets"],
    scale: float,
    dtype: torch.dtype,
    chunked: bool,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Sum of the targets' cross-entropies times scale.

    position_ids restart with every document: that, with no attention mask and no cache, is what keeps documents
    apart. predicting: flat indices (row × length + column) of the tokens that predict targets. chunk: see
    chunked_cross_entropy. Autocast keeps no casts for a second use: there is none, and all layers' would add up.
    # ref: https://github.com/huggingface/transformers/pull/46634 (a cache or a mask silently joins documents)
    """
    arguments = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
    is_bf16 = dtype == torch.bfloat16
    with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=is_bf16, cache_enabled=False):
        if chunked:
            hidden = causal_lm.base_model(**arguments).last_hidden_state
            picked = hidden.flatten(0, 1).index_select(0, predicting)
            weight: Tensor = causal_lm.get_output_embeddings().weight
            return chunked_cross_entropy(picked, weight, targets, scale, dtype, chunk)
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

    def prove(self, flatten_rows: bool, packing: bool) -> None:
        """See prove_loss; as a method, because weights that are split among processes are there in methods only."""
        self.chunked = prove_loss(self.causal_lm, flatten_rows, packing)


@torch.no_grad()
def prove_loss(causal_lm: PreTrainedModel, flatten_rows: bool, packing: bool, flag: str = "--packing") -> bool:
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
            f"with the one before it): this architecture needs {flag} false"
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
