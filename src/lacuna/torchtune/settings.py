"""What a torchtune recipe reads of a config that decides its memory and the size of its checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lacuna.config.trees import MISSING, get

EIGHT_BIT = 2 * (1 + 4 / 256)
"""Of AdamW's two moments in 8 bits, with an fp32 scale for a block of 256."""
IN_WEIGHT_DTYPE = {"torch.optim.AdamW": 2, "torch.optim.Adam": 2, "torch.optim.SGD": 0}
"""Optimizer → states as large as the weights."""
STATE_BYTES = {
    "bitsandbytes.optim.AdamW": 8, "bitsandbytes.optim.AdamW32bit": 8, "bitsandbytes.optim.AdamW8bit": EIGHT_BIT,
    "bitsandbytes.optim.PagedAdamW": 8, "bitsandbytes.optim.PagedAdamW32bit": 8,
    "bitsandbytes.optim.PagedAdamW8bit": EIGHT_BIT, "torchao.optim.AdamW8bit": EIGHT_BIT,
    "torchao.prototype.low_bit_optim.AdamW8bit": EIGHT_BIT,
}  # fmt: skip
"""Optimizer → bytes of states for a trained parameter, whatever its dtype."""
LOSSES = {
    "torchtune.modules.loss.CEWithChunkedOutputLoss": 8, "torch.nn.CrossEntropyLoss": 1,
}  # fmt: skip
"""Loss → chunks of logits, where the config gives no number."""


@dataclass(frozen=True)
class Step:
    """What a recipe reads of a config that decides its memory."""

    tokens: int
    """Of a micro-batch, padding included."""
    length: int
    width: int
    """Bytes of a weight, an activation and a gradient."""
    chunks: int
    """Of the logits."""
    state_bytes: float
    """Of the optimizer for a trained parameter."""
    gpus: int
    accumulates: bool
    checkpointing: bool
    offloading: bool
    in_backward: bool
    copies_gradients: bool
    """Whether the optimizer makes a copy of them: torch's own, where it is not fused."""
    packed: bool
    cpu_offload: bool
    reshards: bool
    gathers_embedding: bool
    """Whether FSDP holds the embedding from the first layer to the last."""


def read_step(config: Mapping[str, Any], recipe: str, gpus: int, length: int) -> Step | str:
    """The step of a config; or, as a sentence, why what it takes is not known."""
    optimizer, loss = (str(get(config, f"{section}._component_")) for section in ("optimizer", "loss"))
    width = {"bf16": 2, "fp16": 2, "fp32": 4}.get(str(config.get("dtype")))
    batch, accumulation = config.get("batch_size"), config.get("gradient_accumulation_steps", 1)
    if width is None:
        return f"dtype is {config.get('dtype')!r}; bf16, fp16 and fp32 are planned"
    if optimizer not in {**IN_WEIGHT_DTYPE, **STATE_BYTES}:
        return f"what {optimizer} keeps is not known; known are {', '.join([*IN_WEIGHT_DTYPE, *STATE_BYTES])}"
    if loss not in LOSSES:
        return f"what {loss} keeps is not known; known are {' and '.join(LOSSES)}"
    if config.get("tensor_parallel_dim", 1) != 1:
        return "tensor parallelism is not planned"
    if type(batch) is not int or type(accumulation) is not int:
        return "batch_size and gradient_accumulation_steps should be whole numbers"
    states = IN_WEIGHT_DTYPE.get(optimizer, 0) * width + STATE_BYTES.get(optimizer, 0)
    if optimizer.endswith("SGD") and get(config, "optimizer.momentum") not in (MISSING, None, 0):
        states += width
    is_distributed = recipe.endswith("distributed")
    chunks = get(config, "loss.num_output_chunks")
    return Step(
        tokens=batch * length, length=length, width=width, chunks=LOSSES[loss] if chunks is MISSING else chunks,
        state_bytes=states, gpus=gpus if is_distributed else 1, accumulates=accumulation > 1,
        checkpointing=config.get("enable_activation_checkpointing") is True,
        offloading=config.get("enable_activation_offloading") is True,
        in_backward=config.get("optimizer_in_bwd") is True,
        copies_gradients=optimizer.startswith("torch.") and get(config, "optimizer.fused") is not True,
        packed=get(config, "dataset.packed") is True,
        cpu_offload=is_distributed and config.get("fsdp_cpu_offload") is True,
        reshards=config.get("fsdp_reshard_after_forward", True) is True,
        gathers_embedding="tok_embeddings" not in (config.get("custom_sharded_layers") or []),
    )  # fmt: skip
