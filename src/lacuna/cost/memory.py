"""How much memory a step takes, from the shape of the model: what is kept of each layer, and what comes on top.

Nothing here imports torch. The numbers of bytes are counts of the tensors that are alive in the real step; trace.py
counts them anew, and tests/cost/test_memory.py holds the two against each other.
"""

from dataclasses import replace

from lacuna.cost.layer import Sizes, kept_of_layer, transient
from lacuna.cost.shape import Adapter, ModelShape, Step
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


def chunk_tokens(device: str, vocabulary: int) -> int:
    """Tokens whose logits exist at one time on a kind of device; train/loss.py goes by it."""
    return CPU_CHUNK_TOKENS if device == "cpu" else max(ACCELERATOR_CHUNK_ELEMENTS // vocabulary, CPU_CHUNK_TOKENS)


def chunk_of(step: Step, vocabulary: int) -> int:
    """Tokens whose logits exist at one time in a step."""
    return min(step.chunk or chunk_tokens(step.device, vocabulary), step.tokens)


def step_memory(shape: ModelShape, step: Step) -> Sizes:
    """Bytes at the peak of an optimizer step in one process, by what takes them."""
    fixed = _fixed(shape, step)
    return max(({**fixed, **moment} for moment in _moments(shape, step)), key=lambda sizes: sum(sizes.values()))


def _moments(shape: ModelShape, step: Step) -> list[Sizes]:
    """What there is at each moment of a step that can be its peak, in the step's order, besides what is always there.

    Gradients that are named here are those so far, in place of all.
    """
    at_loss, in_backward = _at_loss(shape, step), _in_backward(shape, step)
    if not step.accumulates:
        of_head = 0.0 if step.adapter else 4.0 * shape.embedding / step.processes
        at_loss["gradients"], in_backward["gradients"] = 0.0, of_head
    moments = [at_loss, in_backward]
    if not step.accumulates:
        moments.append(_at_first_layer(shape, step))
    if step.adapter is None:
        moments.append(_at_embedding(shape, step))
    return moments


def total(shape: ModelShape, step: Step) -> float:
    """Bytes at the peak of an optimizer step in one process."""
    return sum(step_memory(shape, step).values())


def trained_parameters(shape: ModelShape, adapter: Adapter | None) -> int:
    return shape.parameters if adapter is None else shape.adapter_parameters(adapter.rank, adapter.targets)


def _fixed(shape: ModelShape, step: Step) -> Sizes:
    """What is there all the time."""
    adapter = step.adapter
    trained = trained_parameters(shape, adapter) / (1 if adapter else step.processes)
    buckets = 4.0 * trained if adapter and step.processes > 1 else 0.0
    return {
        "weights": 4.0 * trained + _frozen(shape, step) + _gathered(shape, step),
        "gradients": 4.0 * trained + buckets,
        "optimizer": 8.0 * trained,
        "inputs": float(step.tokens * sum(_inputs(shape, step).values())),
        "framework": float(CONTEXT[step.device]),
    }


def _frozen(shape: ModelShape, step: Step) -> float:
    """Bytes of an adapter's base."""
    if step.adapter is None:
        return 0.0
    bits, matrices = step.adapter.bits, shape.layers * shape.block_matrices
    each = QUANTISED_BYTES[bits, step.adapter.double] if bits else step.width
    return each * matrices + step.width * (shape.parameters - matrices)


def _inputs(shape: ModelShape, step: Step) -> Sizes:
    """Bytes of a token that all layers read besides its hidden state."""
    rotations = 2 if shape.family == "gemma3" else 1
    inputs = {
        "token, position, target and its place": 4.0 * 8,
        "cosines and sines": 2 * rotations * shape.head_dimension * step.stream_width,
    }
    if step.attention != "flash_attention_2":
        masks = 2 if shape.norms_twice else 1
        inputs["masks"] = masks * step.length * (step.stream_width if step.attention == "eager" else 1)
    return inputs


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


def _at_loss(shape: ModelShape, step: Step) -> Sizes:
    """What a step has on top at the end of its forward pass."""
    stream = _stream(shape, step)
    logits = chunk_of(step, shape.vocabulary) * shape.vocabulary
    of_norm = 4.0 * step.tokens * shape.hidden if step.adapter else stream
    loss = {"logits": 4.0 * logits, "hidden states and their gradients": 3 * stream}
    if step.bf16:
        loss["logits in bf16"] = 2.0 * logits
    if step.adapter is None:
        loss["gradient of the head"] = 4.0 * shape.embedding
    if step.adapter is None and step.bf16:
        loss["head and its gradient in bf16"] = 4.0 * shape.embedding
    return {
        "activations": _layers(shape, step, in_backward=False) + stream + of_norm,
        "logits and loss": sum(loss.values()),
    }


def _in_backward(shape: ModelShape, step: Step) -> Sizes:
    waiting = 4.0 * shape.embedding if shape.tied and step.adapter is None and step.accumulates else 0.0
    layers = _layers(shape, step, in_backward=True)
    return {"activations": layers + transient(shape, step), "logits and loss": waiting}


def _at_embedding(shape: ModelShape, step: Step) -> Sizes:
    """At the end of the backward pass, where the embedding's gradient is made beside that of earlier passes, and is
    added to that of a tied head, which has waited for it, as a third tensor."""
    waiting = 2 * shape.tied + step.accumulates
    return {"activations": 3 * _stream(shape, step), "logits and loss": 4.0 * shape.embedding * waiting}


def _at_first_layer(shape: ModelShape, step: Step) -> Sizes:
    """In the backward pass of the first layer, where gradients were not there before."""
    alone = replace(step, checkpointing=False)
    layer = _layers(replace(shape, layers=1), alone, in_backward=True)
    return {"activations": layer + transient(shape, step)}
