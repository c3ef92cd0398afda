"""FLOPs and MFU."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lacuna.data.collate import MicroBatch
from lacuna.train.model import transformer_blocks


@dataclass(frozen=True)
class ModelFlops:
    """The numbers of a model that decide its FLOPs."""

    block_parameters: int
    """Weights of the matrix products in all transformer blocks."""
    head_parameters: int
    """hidden size × vocabulary."""
    all_parameters: int
    layers: int
    attention_width: int
    """heads × head dimension."""
    frozen_block_parameters: int = 0
    """Of block_parameters, those that are not trained."""
    is_head_frozen: bool = False

    def training(self, tokens: int, targets: int, attention_pairs: int) -> int:
        """FLOPs of a forward and backward pass that cannot be avoided; recomputation does not count.

        A weight costs 2 FLOPs for each token forward and 4 backward, 2 where it is frozen; a query-key pair costs
        4 × attention width forward (scores, then values) and twice that backward. The head is needed for supervised
        tokens only. attention_pairs: of causal attention within documents, n(n+1)/2 for n tokens.
        """
        return (
            (6 * self.block_parameters - 2 * self.frozen_block_parameters) * tokens
            + (4 if self.is_head_frozen else 6) * self.head_parameters * targets
            + 12 * self.layers * self.attention_width * attention_pairs
        )

    def palm(self, tokens: int, sequence_length: int) -> int:
        """FLOPs as PaLM counts them: every parameter, full attention over the whole row.

        # ref: Chowdhery et al. 2022, arXiv 2204.02311, appendix B
        """
        return tokens * (6 * self.all_parameters + 12 * self.layers * self.attention_width * sequence_length)


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
