"""FLOPs and MFU."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lacuna.cost.flops import ModelFlops
from lacuna.data.collate import MicroBatch
from lacuna.train.model import transformer_blocks


def model_flops(model: PreTrainedModel, sequence_length: int) -> ModelFlops | None:
    """None where the formula would be wrong: experts of which a token uses some, or attention that is not full."""
    text_config = model.config.get_text_config()
    config = text_config.to_dict()
    has_experts = any(config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    window = config.get("sliding_window")
    harmless = {"full_attention"} | ({"sliding_attention"} if window and window >= sequence_length else set())
    slides_everywhere = "layer_types" not in config and window is not None and window < sequence_length
    if has_experts or slides_everywhere or not harmless.issuperset(config.get("layer_types") or []):
        return None
    blocks = transformer_blocks(model)
    heads = text_config.num_attention_heads
    head_dimension = config.get("head_dim") or text_config.hidden_size // heads
    sizes = [size for block in blocks for size in _matrices(block)]
    head: Any = model.get_output_embeddings().weight
    inputs: Any = model.get_input_embeddings().weight
    block_parameters = sum(size for size, _ in sizes)
    others = (p.numel() for name, p in model.named_parameters() if p.ndim != 2)
    embeddings = {id(p): p.numel() for p in (inputs, head)}
    return ModelFlops(
        block_parameters=block_parameters,
        head_parameters=head.numel(),
        all_parameters=block_parameters + sum(embeddings.values()) + sum(others),
        layers=len(blocks),
        attention_width=heads * head_dimension,
        frozen_block_parameters=sum(size for size, is_trained in sizes if not is_trained),
        is_head_frozen=not head.requires_grad,
    )


def _matrices(block: nn.Module) -> Iterator[tuple[int, bool]]:
    """Size of every matrix in a block, and whether it is trained. A quantised weight is stored in another shape."""
    for module in block.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Linear) and parameter is module.weight:
                yield module.in_features * module.out_features, parameter.requires_grad
            elif parameter.ndim == 2:
                yield parameter.numel(), parameter.requires_grad


@dataclass
class Window:
    """What is added up between two lines of metrics."""

    seconds: float = 0.0
    data_seconds: float = 0.0
    tokens: int = 0
    flops: int = 0
    palm_flops: int = 0

    def add(self, batch: list[MicroBatch], flops: ModelFlops | None, sequence_length: int, all_tokens: int) -> None:
        """batch: what this process did; all_tokens: of all processes."""
        tokens = sum(micro.tokens for micro in batch)
        self.tokens += all_tokens
        if flops is not None:
            targets = sum(len(micro.targets) for micro in batch)
            self.flops += flops.training(tokens, targets, sum(micro.attention_pairs for micro in batch))
            self.palm_flops += flops.palm(tokens, sequence_length)

    def speed(self, peak_flops: float | None) -> dict[str, float]:
        """tokens_per_second of all processes, data_wait (share of the time) and, where the device's peak is known, mfu
        and mfu_palm."""
        speed = {
            "tokens_per_second": self.tokens / self.seconds,
            "data_wait": self.data_seconds / self.seconds,
        }
        if peak_flops is not None and self.flops:
            speed["mfu"] = self.flops / self.seconds / peak_flops
            speed["mfu_palm"] = self.palm_flops / self.seconds / peak_flops
        return speed
