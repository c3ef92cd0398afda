"""The numbers of a model, of an adapter and of a step that decide its memory and its FLOPs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FAMILIES = {
    "llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "qwen3",
    "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3",
}  # fmt: skip
"""model_type → how a layer of it is built."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NEEDED = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class ModelShape:
    """A decoder of Llama's kind."""

    family: str
    """How a layer is built; one of FAMILIES' values."""
    hidden: int
    layers: int
    mlp: int
    heads: int
    key_value_heads: int
    head_dimension: int
    vocabulary: int
    tied: bool
    """Whether the head is the embedding."""
    biases: tuple[str, ...] = ()
    """Projections that have a bias."""

    @property
    def attention(self) -> int:
        """heads × head dimension."""
        return self.heads * self.head_dimension

    @property
    def key_value(self) -> int:
        """key-value heads × head dimension."""
        return self.key_value_heads * self.head_dimension

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each projection."""
        hidden, attention, key_value, mlp = self.hidden, self.attention, self.key_value, self.mlp
        return {
            "q_proj": (hidden, attention), "k_proj": (hidden, key_value), "v_proj": (hidden, key_value),
            "o_proj": (attention, hidden), "gate_proj": (hidden, mlp), "up_proj": (hidden, mlp),
            "down_proj": (mlp, hidden),
        }  # fmt: skip

    @property
    def norms_heads(self) -> bool:
        """Whether queries and keys have norms of their own."""
        return self.family in ("qwen3", "gemma3")

    @property
    def norms_twice(self) -> bool:
        """Whether attention and MLP have a norm behind them too."""
        return self.family in ("gemma2", "gemma3")

    @property
    def block_matrices(self) -> int:
        """Weights of the seven projections of a layer."""
        return sum(inputs * outputs for inputs, outputs in self.widths.values())

    @property
    def block_vectors(self) -> int:
        """Norms and biases of a layer."""
        norms = (4 if self.norms_twice else 2) * self.hidden
        of_heads = 2 * self.head_dimension if self.norms_heads else 0
        return norms + of_heads + sum(self.widths[name][1] for name in self.biases)

    @property
    def embedding(self) -> int:
        """vocabulary × hidden."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model; a tied head counts once."""
        blocks = self.layers * (self.block_matrices + self.block_vectors)
        return blocks + self.hidden + self.embedding * (1 if self.tied else 2)

    def adapter_parameters(self, rank: int, targets: tuple[str, ...] = PROJECTIONS) -> int:
        """Of LoRA's two matrices on these projections of every layer."""
        return self.layers * rank * sum(sum(self.widths[name]) for name in targets)


def model_shape(config: Mapping[str, Any]) -> ModelShape | None:
    """From a config.json alone; None for a model whose layers are of another kind, so that no number is made up."""
    config = {**config, **config.get("text_config", {})}
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or not all(isinstance(config.get(name), int) for name in NEEDED):
        return None
    hidden, layers, mlp, heads, vocabulary = (config[name] for name in NEEDED)
    biases: tuple[str, ...] = ()
    if config["model_type"] == "qwen2":
        biases = PROJECTIONS[:3]
    elif config.get("attention_bias"):
        biases = PROJECTIONS[:4]
    if config.get("mlp_bias"):
        biases += PROJECTIONS[4:]
    is_gemma = family.startswith("gemma")
    default_dimension = {"gemma": 256, "gemma2": 256, "gemma3": 256, "qwen3": 128}.get(family, hidden // heads)
    return ModelShape(
        family, hidden, layers, mlp, heads, config.get("num_key_value_heads") or heads,
        config.get("head_dim") or default_dimension, vocabulary,
        bool(config.get("tie_word_embeddings", is_gemma)), biases,
    )  # fmt: skip


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

    @property
    def stream_width(self) -> int:
        """Bytes of a number of the residual stream: without an adapter it is in fp32 under autocast too."""
        return self.width if self.adapter else 4
