"""How much memory a step takes, from the shape of the model: what is kept of each layer, and what comes on top.

Nothing here imports torch. The numbers of bytes are counts of the tensors that are alive in the real step; trace.py
counts them anew, and tests/cost/test_memory.py holds the two against each other.
"""

from dataclasses import dataclass, replace

from lacuna.cost.shape import PROJECTIONS, ModelShape
from lacuna.words import GIB

QUANTISED_BYTES = {(4, True): 0.5 + 1 / 64 + 4 / (64 * 256), (4, False): 0.5 + 4 / 64, (8, True): 1.0, (8, False): 1.0}
"""Bytes of a frozen weight of so many bits, with and without quantised scales: one scale for 64 weights, and one for
256 scales. # ref: arXiv 2305.14314, section 3"""
CPU_CHUNK_TOKENS = 256
"""Tokens whose logits exist at one time on a CPU: measured the fastest of 64 to 1360, also in bf16."""
ACCELERATOR_CHUNK_ELEMENTS = 2**27
"""Logits that exist at one time elsewhere: large enough for full matrix units, small beside the activations."""
CONTEXT = {"cuda": 0.75 * GIB, "mps": 0.5 * GIB, "cpu": 0.0}
"""CUDA's context, the workspaces of its libraries and what its allocator cannot use. An assumption."""
SAME_INPUT = (PROJECTIONS[:3], PROJECTIONS[3:4], PROJECTIONS[4:6], PROJECTIONS[6:])
"""Projections that read the same tensor."""

FULL_TRANSIENT = {False: (0.0, 8.0), True: (5.0, 2.0)}
"""By bf16: as the next one, without an adapter."""
ADAPTER_TRANSIENT = {
    (False, None, False, False): (0, 12), (False, None, False, True): (0, 8),
    (False, None, True, False): (0, 12), (False, None, True, True): (12, 4),
    (False, 4, False, True): (4, 8), (False, 4, True, True): (16, 4),
    (True, None, False, False): (2, 6), (True, None, False, True): (10, 6),
    (True, None, True, False): (2, 6), (True, None, True, True): (10, 10),
    (True, 4, False, False): (2, 6), (True, 4, False, True): (6, 4),
    (True, 4, True, False): (2, 6), (True, 4, True, True): (12, 2),
    (True, 8, False, False): (0, 4), (True, 8, False, True): (0, 4),
    (True, 8, True, False): (-2, 4), (True, 8, True, True): (8, 0),
}  # fmt: skip
"""Bytes of a token that the backward pass of a layer's MLP takes for a while, for each unit of hidden size and of MLP
width, less what it has freed by then, as counted in traces: by bf16, bits, dropout, and whether a projection of the MLP
has an adapter."""
CAST_TRANSIENT = {(4, False): (12, 6), (4, True): (12, 10), (8, False): (8, 4), (8, True): (8, 8)}
"""The same by bits and dropout, with an adapter in the MLP, where PEFT casts its inputs to fp32: see casts_inputs."""


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


def casts_inputs(step: Step, adapter: Adapter) -> bool:
    """Whether an adapter's inputs are cast to fp32; for quantised weights PEFT knows CUDA's autocast alone.

    # ref: peft/tuners/lora/bnb.py, requires_conversion
    """
    return step.bf16 and (adapter.bits is None or step.device != "cuda")


def chunk_tokens(device: str, vocabulary: int) -> int:
    """Tokens whose logits exist at one time on a kind of device; train/loss.py goes by it."""
    return CPU_CHUNK_TOKENS if device == "cpu" else max(ACCELERATOR_CHUNK_ELEMENTS // vocabulary, CPU_CHUNK_TOKENS)


def chunk_of(step: Step, vocabulary: int) -> int:
    """Tokens whose logits exist at one time in a step."""
    return min(step.chunk or chunk_tokens(step.device, vocabulary), step.tokens)


def kept_of_layer(shape: ModelShape, step: Step) -> float:
    """Bytes that the backward pass of a layer needs, without its weights."""
    width, is_frozen = step.width, step.adapter is not None
    hidden, mlp = (8, 3 * width) if is_frozen else ({2: 26, 4: 24}[width], 4 * width)
    small, of_heads = 8.0, 0
    if shape.norms_heads:
        of_heads = 4 if is_frozen else 6 if step.bf16 and shape.family == "qwen3" else 8
        small += 4 * (shape.heads + shape.key_value_heads)
    if shape.norms_twice:
        hidden += 8 if is_frozen else 16
        small += 8
    repeated = _repeated(shape, step)
    kept = small + hidden * shape.hidden + (2 * width + of_heads + repeated * width) * shape.attention
    kept += ((2 - repeated) * width + of_heads) * shape.key_value
    kept += mlp * shape.mlp + _attention_kept(shape, step)
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
    casts = casts_inputs(step, adapter)
    inputs = {name: shape.widths[name][0] for name in adapter.targets}
    kept = float(width * adapter.rank * len(inputs))
    if adapter.dropout:
        noise = 1 if step.device == "cuda" else 4 if casts else width
        kept += (noise + width) * sum(inputs.values())
    elif casts:
        kept += width * sum(inputs.values())
    if adapter.bits == 8:
        kept += width * (2 * shape.hidden + shape.mlp)
    elif not adapter.dropout and not casts:
        groups = [group for group in SAME_INPUT if not set(group).isdisjoint(inputs)]
        is_eager = step.attention == "eager"
        kept += sum(width * shape.widths[group[0]][0] for group in groups if is_eager or group != ("o_proj",))
    return kept


def step_memory(shape: ModelShape, step: Step) -> dict[str, float]:
    """Bytes at the peak of an optimizer step in one process, by what takes them."""
    fixed = _fixed(shape, step)
    moments = [_at_loss(shape, step), _in_backward(shape, step)]
    if not step.accumulates:
        of_head = 0.0 if step.adapter else 4.0 * shape.embedding / step.processes
        moments[0]["gradients"], moments[1]["gradients"] = -fixed["gradients"], of_head - fixed["gradients"]
        moments.append(_at_first_layer(shape, step))
    if step.adapter is None:
        moments.append(_at_embedding(shape, step))
    peak = max(moments, key=lambda moment: sum(moment.values()))
    names = [*fixed, *(name for name in peak if name not in fixed)]
    return {name: fixed.get(name, 0.0) + peak.get(name, 0.0) for name in names}


def total(shape: ModelShape, step: Step) -> float:
    """Bytes at the peak of an optimizer step in one process."""
    return sum(step_memory(shape, step).values())


def trained_parameters(shape: ModelShape, adapter: Adapter | None) -> int:
    return shape.parameters if adapter is None else shape.adapter_parameters(adapter.rank, adapter.targets)


def _fixed(shape: ModelShape, step: Step) -> dict[str, float]:
    """What is there all the time."""
    trained = trained_parameters(shape, step.adapter) / (1 if step.adapter else step.processes)
    weights = 4.0 * trained
    if step.adapter:
        matrices = shape.layers * shape.block_matrices
        bits = step.adapter.bits
        each = QUANTISED_BYTES[bits, step.adapter.double] if bits else step.width
        weights += each * matrices + step.width * (shape.parameters - matrices)
    copies = 2 if step.adapter and step.processes > 1 else 1
    rotations = 2 if shape.family == "gemma3" else 1
    inputs = step.tokens * (32 + rotations * 2 * shape.head_dimension * step.stream_width)
    if step.attention != "flash_attention_2":
        masks = 2 if shape.norms_twice else 1
        inputs += step.tokens * step.length * masks * (step.stream_width if step.attention == "eager" else 1)
    return {
        "weights": weights + _gathered(shape, step),
        "gradients": 4.0 * trained * copies,
        "optimizer": 8.0 * trained,
        "inputs": float(inputs),
        "framework": float(CONTEXT[step.device]),
    }


def _gathered(shape: ModelShape, step: Step) -> float:
    """Of weights that are split among processes, those that are there whole for a while: embeddings and head, a layer
    and the next one, and a layer's gradients on their way."""
    if step.adapter or step.processes == 1:
        return 0.0
    root = (1 if shape.tied else 2) * shape.embedding
    layer = shape.block_matrices + shape.block_vectors
    return step.width * (root + 2.0 * layer) + (step.width + 4.0) * layer


def _stream(shape: ModelShape, step: Step) -> float:
    return float(step.tokens * shape.hidden * step.stream_width)


def _casts(shape: ModelShape, step: Step) -> float:
    """Bytes of a layer's trained weights in bf16, which autocast makes of them."""
    if not step.bf16 or (step.adapter is None and step.processes > 1):
        return 0.0
    if step.adapter is None:
        return 2.0 * shape.block_matrices
    return 2.0 * trained_parameters(shape, step.adapter) / shape.layers


def _layers(shape: ModelShape, step: Step, in_backward: bool) -> float:
    """Bytes that are kept of all layers; of one in its backward pass all, where the others keep their inputs only.

    bitsandbytes keeps the inputs of 8-bit products where checkpointing does not see them.
    # ref: bitsandbytes/autograd/_functions.py, ctx.tensors
    """
    layer = kept_of_layer(shape, step) + _casts(shape, step)
    if not step.checkpointing:
        return shape.layers * layer
    others = _stream(shape, step)
    if step.adapter and step.adapter.bits == 8:
        others += step.width * step.tokens * (2 * shape.hidden + shape.attention + shape.mlp)
    return shape.layers * others + (layer if in_backward else 0.0)


def _at_loss(shape: ModelShape, step: Step) -> dict[str, float]:
    """What a step has on top at the end of its forward pass."""
    stream = _stream(shape, step)
    chunk = chunk_of(step, shape.vocabulary) * shape.vocabulary
    head = 0.0 if step.adapter else shape.embedding * (8.0 if step.bf16 else 4.0)
    of_norm = 4.0 * step.tokens * shape.hidden if step.adapter else stream
    return {
        "activations": _layers(shape, step, in_backward=False) + stream + of_norm,
        "logits and loss": chunk * (4.0 + (2.0 if step.bf16 else 0.0)) + head + 3 * stream,
    }


def _in_backward(shape: ModelShape, step: Step) -> dict[str, float]:
    waiting = 4.0 * shape.embedding if shape.tied and step.adapter is None and step.accumulates else 0.0
    layers = _layers(shape, step, in_backward=True)
    return {"activations": layers + _transient(shape, step), "logits and loss": waiting}


def _at_embedding(shape: ModelShape, step: Step) -> dict[str, float]:
    """At the end of the backward pass, where the embedding's gradient is made beside that of earlier passes, and is
    added to that of a tied head, which has waited for it, as a third tensor."""
    waiting = 2 * shape.tied + step.accumulates
    return {"activations": 3 * _stream(shape, step), "logits and loss": 4.0 * shape.embedding * waiting}


def _at_first_layer(shape: ModelShape, step: Step) -> dict[str, float]:
    """In the backward pass of the first layer, where gradients were not there before."""
    alone = replace(step, checkpointing=False)
    layer = _layers(replace(shape, layers=1), alone, in_backward=True)
    return {"activations": layer + _transient(shape, step)}


def _transient(shape: ModelShape, step: Step) -> float:
    """Bytes that come and go in a layer's backward pass, at their most."""
    adapter, tokens = step.adapter, step.tokens
    if adapter is None:
        candidates: list[tuple[float, float]] = [FULL_TRANSIENT[step.bf16]]
        if step.bf16 and shape.norms_twice:
            candidates.append((21.0, 0.0))
        if step.bf16 and not step.checkpointing:
            candidates.append((26.0, 0.0))
    else:
        adapts_mlp = not set(PROJECTIONS[4:]).isdisjoint(adapter.targets)
        bits = adapter.bits if step.bf16 or (adapter.bits == 4 and adapts_mlp) else None
        candidates = [ADAPTER_TRANSIENT[step.bf16, bits, adapter.dropout, adapts_mlp]]
        if adapter.bits and adapts_mlp and casts_inputs(step, adapter):
            candidates = [CAST_TRANSIENT[adapter.bits, adapter.dropout]]
    most = max(hidden * shape.hidden + mlp * shape.mlp for hidden, mlp in candidates)
    if step.attention == "eager":
        scores = (6 if step.bf16 else 8) * shape.heads * step.length
        most = max(most, scores - 16 * shape.hidden - 4 * step.width * shape.mlp)
    return float(tokens * most)
