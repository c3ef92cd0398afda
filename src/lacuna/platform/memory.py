"""How much memory a step of an adapter's training takes, from the model's config.json alone.

Nothing here imports torch.

Estimates, checked against traces of Mistral-7B's shape with all seven projections adapted: within 15 %.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

GIB = 2**30
QUANTISED_BYTES = {4: 0.516, 8: 1.0}
"""Bytes of a frozen weight, with 4 bits' doubly quantised scales. # ref: arXiv 2305.14314, section 3"""
ADAPTER_BYTES = 16
"""Of an adapter's parameter: weight, gradient and two moments in fp32."""
KEPT_HIDDEN, KEPT_MLP = 40, 16
"""Bytes that the backward pass needs of a token and layer, per unit of hidden size and of MLP width, in bf16 with an
adapter on every projection."""
BACKWARD_PEAK = 1.4
"""What a layer takes in its backward pass, as a multiple of what it keeps."""
LOGIT_BYTES = 2**27 * 6
"""The loss' largest chunk of logits, in bf16 and fp32."""
CONTEXT = int(0.75 * GIB)
"""CUDA's context, the allocator's rounding and cuBLAS' workspaces."""


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that decide its memory."""

    hidden: int
    layers: int
    mlp: int
    attention: int
    """heads × head dimension."""
    key_value: int
    """key-value heads × head dimension."""
    vocabulary: int
    tied: bool

    @property
    def block_parameters(self) -> int:
        """Weights of the seven projections of a layer with a gated MLP."""
        return 2 * self.hidden * (self.attention + self.key_value) + 3 * self.hidden * self.mlp

    def adapter_parameters(self, rank: int) -> int:
        """Of an adapter on all seven projections of every layer."""
        attention = 2 * (self.hidden + self.attention) + 2 * (self.hidden + self.key_value)
        return self.layers * rank * (attention + 3 * (self.hidden + self.mlp))


@dataclass(frozen=True)
class Step:
    """What decides the memory of a step. bits: 4, 8, 16 or 32, of a frozen weight."""

    rows: int
    length: int
    bits: int
    rank: int
    checkpointing: bool
    bf16: bool


def model_shape(config: Mapping[str, Any]) -> Shape | None:
    """From a config.json; None where its names are not those of Llama's descendants, so that no number is made up."""
    config = config.get("text_config", config)
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size")
    if not all(isinstance(config.get(name), int) for name in names) or config.get("num_local_experts"):
        return None
    hidden, layers, mlp, heads, vocabulary = (config[name] for name in names)
    head = config.get("head_dim") or hidden // heads
    key_value = (config.get("num_key_value_heads") or heads) * head
    return Shape(hidden, layers, mlp, heads * head, key_value, vocabulary, bool(config.get("tie_word_embeddings")))


def step_memory(shape: Shape, step: Step) -> dict[str, float]:
    """Bytes at the peak of a step, by what takes them."""
    width = 2 if step.bf16 else 4
    frozen = QUANTISED_BYTES.get(step.bits, width)
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    tokens = step.rows * step.length
    kept = (KEPT_HIDDEN * shape.hidden + KEPT_MLP * shape.mlp) * width / 2 * tokens
    activations = shape.layers * kept
    if step.checkpointing:
        activations = shape.layers * width * shape.hidden * tokens + BACKWARD_PEAK * kept
    return {
        "frozen weights": frozen * shape.layers * shape.block_parameters + width * embeddings,
        "adapter, gradients, optimizer": ADAPTER_BYTES * shape.adapter_parameters(step.rank),
        "activations": activations,
        "logits": min(LOGIT_BYTES, 6 * shape.vocabulary * tokens),
        "runtime": CONTEXT,
    }


def total(shape: Shape, step: Step) -> float:
    return sum(step_memory(shape, step).values()) / GIB


def describe(shape: Shape, step: Step) -> str:
    """`about 7.9 GiB: frozen weights 3.9, …`"""
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in step_memory(shape, step).items())
    return f"about {total(shape, step):.1f} GiB ({parts})"


def needs_checkpointing(shape: Shape, step: Step, memory: int | None) -> bool:
    """Whether the step would take more than 80 % of a device's memory, in bytes, without."""
    return memory is not None and total(shape, replace(step, checkpointing=False)) * GIB > 0.8 * memory


def savings(shape: Shape, step: Step) -> list[tuple[str, float]]:
    """Settings to change, each with the GiB that a step would take then, all else as it is."""
    smaller = [
        ("training.gradient_checkpointing: true", replace(step, checkpointing=True)),
        (
            f"training.batch_size: {step.rows // 2} with twice the gradient_accumulation_steps (the same batch)",
            replace(step, rows=step.rows // 2),
        ),
        (f"training.sequence_length: {step.length // 2}", replace(step, length=step.length // 2)),
        ("training.quantization_bits: 4" if step.bits == 8 else "training.method: qlora", replace(step, bits=4)),
    ]
    return [
        (text, total(shape, s))
        for text, s in smaller
        if s.rows and s.length > 1 and total(shape, s) < total(shape, step)
    ]
