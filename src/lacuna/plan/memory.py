"""How much memory a step takes, from the shape of the model: what is kept of each layer, and what comes on top.

Nothing here imports torch. The numbers of bytes are counts of the tensors that are alive in the real step; trace.py
counts them anew, and tests/test_plan_memory.py holds the two against each other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lacuna.plan.shape import PROJECTIONS, ModelShape

GIB = 2**30
QUANTISED_BYTES = {(4, True): 0.5 + 1 / 64 + 4 / (64 * 256), (4, False): 0.5 + 4 / 64, (8, True): 1.0, (8, False): 1.0}
"""Bytes of a frozen weight of so many bits, with and without quantised scales: one scale for 64 weights, and one for
256 scales. # ref: arXiv 2305.14314, section 3"""
CHUNK_ELEMENTS, CPU_CHUNK_TOKENS = 2**27, 256
"""Logits that exist at one time: see train/loss.py."""
CONTEXT = {"cuda": 0.75 * GIB, "mps": 0.5 * GIB, "cpu": 0.0}
"""CUDA's context, the workspaces of its libraries and what its allocator cannot use. An assumption."""
SAME_INPUT = (PROJECTIONS[:3], PROJECTIONS[3:4], PROJECTIONS[4:6], PROJECTIONS[6:])
"""Projections that read the same tensor."""


@dataclass(frozen=True)
class Adapter:
    """LoRA on some projections of every layer."""

    rank: int
    targets: tuple[str, ...] = PROJECTIONS
    dropout: bool = True
    bits: int | None = None
    """4 or 8: of a frozen weight of the layers. None: not quantised."""
    double: bool = True
    """Whether the scales of 4-bit weights are quantised too."""


@dataclass(frozen=True)
class Step:
    """What decides the memory of an optimizer step besides the model."""

    rows: int
    """In a forward pass of one process."""
    length: int
    """Tokens in a row."""
    bf16: bool
    checkpointing: bool
    device: str = "cuda"
    """cuda, mps or cpu."""
    accumulates: bool = True
    """Whether gradients of earlier forward passes are there while a later one is made."""
    attention: str = "sdpa"
    """sdpa, eager, or flash_attention_2, which needs no mask to tell packed documents apart."""
    adapter: Adapter | None = None
    processes: int = 1
    """That share weights, gradients and optimizer; with an adapter each has all of them."""
    chunk: int | None = None
    """Tokens whose logits exist at one time. None: the device's own number."""

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def width(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.bf16 else 4


def chunk_of(step: Step, vocabulary: int) -> int:
    """Tokens whose logits exist at one time."""
    on_device = CPU_CHUNK_TOKENS if step.device == "cpu" else max(CHUNK_ELEMENTS // vocabulary, CPU_CHUNK_TOKENS)
    return min(step.chunk or on_device, step.tokens)


def kept_of_layer(shape: ModelShape, step: Step) -> float:
    """Bytes that the backward pass of a layer needs, without its weights."""
    width, is_frozen = step.width, step.adapter is not None
    hidden, mlp = (8, 3 * width) if is_frozen else ({2: 26, 4: 24}[width], 4 * width)
    queries = 2 * width
    small = 8.0
    if shape.norms_heads:
        of_heads = 4 if is_frozen else 6 if step.bf16 and shape.family == "qwen3" else 8
        queries += of_heads
        small += 4 * (shape.heads + shape.key_value_heads)
    else:
        of_heads = 0
    if shape.norms_twice:
        hidden += 8 if is_frozen else 16
        small += 8
    repeated = _repeated(shape, step)
    kept = hidden * shape.hidden + (queries + repeated * width) * shape.attention
    kept += ((2 - repeated) * width + of_heads) * shape.key_value
    kept += mlp * shape.mlp + small + _attention_kept(shape, step)
    return step.tokens * (kept + (_adapter_kept(shape, step, step.adapter) if step.adapter else 0))


def _repeated(shape: ModelShape, step: Step) -> int:
    """Of keys and values, how many are repeated for the heads that share them; a view does for a single head."""
    if step.attention == "flash_attention_2":
        return 0
    if shape.key_value_heads > 1 or step.attention == "eager":
        return 2
    return 1 if step.bf16 and step.adapter is None else 0


def _attention_kept(shape: ModelShape, step: Step) -> float:
    """Bytes of a token: what the attention itself keeps."""
    if step.attention != "eager":
        mask = step.width * step.length if step.attention == "sdpa" else 0
        return 4 * shape.heads + mask
    scores = 8 if shape.family == "gemma2" else 6 if step.bf16 else 4
    return scores * shape.heads * step.length - (step.width * shape.attention if step.adapter else 0)


def _adapter_kept(shape: ModelShape, step: Step, adapter: Adapter) -> float:
    """Bytes of a token: inputs of LoRA's two matrices, and the dropout's mask."""
    width = step.width
    casts = adapter.bits is None and step.bf16
    inputs = {name: shape.widths[name][0] for name in adapter.targets}
    kept = float(width * adapter.rank * len(inputs))
    if adapter.dropout:
        noise = 1 if step.device == "cuda" else 4 if casts else width
        kept += (noise + width) * sum(inputs.values())
    elif casts:
        kept += width * sum(inputs.values())
    if adapter.bits == 8 or not adapter.dropout and not casts:
        is_eager = step.attention == "eager"
        shared = [set(group) & set(inputs) for group in SAME_INPUT]
        kept += sum(width * shape.widths[group.pop()][0] for group in shared if group and (is_eager or group != {"o_proj"}))
    return kept
