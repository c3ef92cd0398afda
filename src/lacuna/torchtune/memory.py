"""What a torchtune run takes: memory at the peak of a step, and the files of its checkpoints.

Every number is of one GPU. The sizes follow what autograd keeps in torchtune 0.6.1's own modules; a trace of the real
step under fake tensors proves them (benchmarks/torchtune_memory.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lacuna.config.trees import MISSING, get
from lacuna.torchtune.model import TorchtuneModel

CONTEXT = 0.75 * 2**30
"""CUDA's context, the allocator's rounding and cuBLAS' workspaces."""
NF4_BYTES = 0.5 + 1 / 64
"""Of a weight: four bits, and an 8-bit scale for 64 of them. # ref: arXiv 2305.14314, section 3"""
NF4_BUFFER = 14
"""Bytes for each weight of the matrix that is being turned back: two int64 indices of half of them, four halves in
16 bits, and the result, in torchao's NF4Tensor.get_original_weight."""
STASH = 5
"""Layers' inputs that offloading leaves on the GPU."""
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
Sizes = dict[str, float]
"""Bytes by what takes them."""


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


def torchtune_memory(
    model: TorchtuneModel, config: Mapping[str, Any], recipe: str, gpus: int, length: int
) -> Sizes | str:
    """Bytes on each GPU at the peak of a step by what takes them; or, as a sentence, why they are not known.

    length: tokens of the longest row of a batch.
    """
    step = _step(config, recipe, gpus, length)
    return step if isinstance(step, str) else max(_moments(model, step), key=lambda sizes: sum(sizes.values()))


def assumptions(config: Mapping[str, Any], gpus: int) -> list[str]:
    """Where the numbers of torchtune_memory are above the truth or are no tensors' sizes, as sentences."""
    optimizer = str(get(config, "optimizer._component_")).rpartition(".")[2]
    cases = {
        "compile: true is planned as false, which takes more": config.get("compile") is True,
        "ac_mode is planned as no checkpointing, which takes more": config.get("ac_mode") is not None,
        f"{optimizer}'s states are planned on the GPU; they move to the host where it is full": "Paged" in optimizer,
        "what FSDP gathers is arithmetic that no trace has proved": gpus > 1,
    }
    return [sentence for sentence, holds in cases.items() if holds]


def _step(config: Mapping[str, Any], recipe: str, gpus: int, length: int) -> Step | str:
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


def _moments(model: TorchtuneModel, step: Step) -> Iterator[Sizes]:
    """The sizes at each moment of a step that can be its peak, in the step's order.

    The end of the loss; the head's gradient, summed over the chunks; where there are DoRA's norms, their recomputation;
    the last layer's way back, in its MLP and while a weight is turned back from NF4; the first layer's; the embedding's
    gradient; the optimizer, where it is not fused.
    """
    shape, width = model.shape, step.width
    logits = shape.vocabulary * step.tokens
    head = width * shape.embedding if model.is_full else 0
    gradients = 0 if step.in_backward else width * model.trainable / step.gpus
    before = gradients if step.accumulates else 0
    layer = step.tokens * _kept_by_layer(model, step)
    inputs = step.tokens * width * shape.hidden
    left = min(shape.layers, STASH) if step.offloading else shape.layers
    kept = left * inputs if step.checkpointing else shape.layers * layer
    outside = step.tokens * _kept_outside(model, step)
    backward = step.tokens * width * (3 if model.dropout else 2) * shape.mlp
    unsharded = 2 * width * _trained_by_layer(model) if step.gpus > 1 else 0
    buffers = NF4_BUFFER * max((_matrix(model, name) for name in model.quantised), default=0)
    resident = _resident(model, step)

    def moment(gradients: float, activations: float, logits: float = 0, buffers: float = 0, states: float = 0) -> Sizes:
        return {
            **resident,
            "optimizer": resident["optimizer"] + states,
            "gradients": gradients,
            "activations": activations,
            "logits and loss": logits,
            "quantisation buffers": buffers,
        }

    upcast = 4 / step.chunks if width == 2 else 0
    yield moment(before, kept + outside, logits * max(width + 4 + upcast, 4 + 8 / step.chunks))
    if model.is_full:
        copies, unread = (3, 1 - 2 / step.chunks) if step.chunks > 1 else (1, 1)
        yield moment(before + copies * head, kept + outside, width * logits * unread)
    held = head if shape.tied or not step.in_backward else 0
    of_layer = layer if step.checkpointing else 0
    if model.dora:
        passing = step.tokens * width * (shape.mlp + 2 * shape.hidden)
        yield moment(before, kept + of_layer + passing + _norms_of_weights(model, step))
    whole = held if step.gpus > 1 else 0
    first = max(before, held - whole) + whole + unsharded
    yield moment(first, kept + of_layer + inputs + backward)
    yield moment(first, kept + of_layer + inputs, buffers=buffers)
    last = held if step.in_backward else gradients - (0 if before or not model.is_full else _ungrown(model, step))
    yield moment(last + whole + unsharded, inputs + layer + inputs + backward)
    summed = 3 if shape.tied else 1
    yield moment(gradients + head * (summed if before or step.in_backward else summed - 1), 0)
    if step.copies_gradients and not step.in_backward:
        yield moment(gradients, 0, states=gradients)


def _resident(model: TorchtuneModel, step: Step) -> Sizes:
    """What stays from step to step, and what FSDP gathers of it."""
    shape, width = model.shape, step.width
    quantised = shape.layers * sum(_matrix(model, name) for name in model.quantised)
    plain = width * (shape.parameters + model.adapter_parameters - quantised)
    weights = plain + NF4_BYTES * quantised
    sharded = 0 if step.cpu_offload else 1 / step.gpus
    gathered = 0.0
    if step.gpus > 1:
        outer = width * shape.embedding * (1 if shape.tied or not step.gathers_embedding else 2)
        of_layer = (weights - width * (shape.parameters - shape.layers * _block(model))) / shape.layers
        gathered = outer + of_layer * (2 if step.reshards else shape.layers)
    return {
        "weights": weights * sharded + 4 * model.longest * model.rope * model.rope_tables,
        "gathered by FSDP": gathered,
        "optimizer": step.state_bytes * model.trainable * sharded,
        "framework": CONTEXT,
    }


def _ungrown(model: TorchtuneModel, step: Step) -> float:
    """Gradients that are still to come while the first layer's MLP is on the way back."""
    embedding = 0 if model.shape.tied else model.shape.embedding
    return step.width * (_block(model) - _matrix(model, "down_proj") + embedding) / step.gpus


def _norms_of_weights(model: TorchtuneModel, step: Step) -> float:
    """What DoRA takes for the norms of the largest adapted matrix: an identity, its product, and two sums."""
    taken = [0.0]
    for name in model.adapters if model.dora else ():
        inputs, outputs = model.shape.widths[name]
        sums = max(2 * step.width, NF4_BUFFER if name in model.quantised else 0)
        taken.append(inputs * (step.width * (inputs + outputs) + sums * outputs))
    return max(taken)


def _matrix(model: TorchtuneModel, name: str) -> int:
    inputs, outputs = model.shape.widths[name]
    return inputs * outputs


def _block(model: TorchtuneModel) -> int:
    return model.shape.block_matrices + model.shape.block_vectors


def _trained_by_layer(model: TorchtuneModel) -> float:
    """Parameters of a layer that have a gradient."""
    return _block(model) if model.is_full else model.adapter_parameters / model.shape.layers


def _kept_by_layer(model: TorchtuneModel, step: Step) -> float:
    """Bytes of a token that the backward pass of a layer reads."""
    shape, width, has = model.shape, step.width, model.adapters
    norms = 4 if shape.family == "gemma2" else 2
    kept = norms * 4 * (shape.hidden * (2 if model.is_full else 1) + 1)
    linear = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",)]
    kept += 4 * width * shape.attention
    if shape.family == "gemma2":
        kept += 8 * shape.heads * step.length
    else:
        kept += 4 * shape.heads
    kept += 3 * width * shape.mlp
    for group in linear:
        if model.is_full or (not model.dropout and set(group) & set(has)):
            kept += width * shape.widths[group[0]][0]
    for name in has:
        inputs, outputs = shape.widths[name]
        kept += width * model.rank
        kept += (width + 1) * inputs if model.dropout else 0
        kept += 2 * width * outputs if model.dora else 0
    return kept + (2 * 4 * model.rope if step.packed else 0)


def _kept_outside(model: TorchtuneModel, step: Step) -> float:
    """Bytes of a token that the last norm and the head keep."""
    shape = model.shape
    kept = 4 * (shape.hidden * (2 if model.is_full else 1) + 1)
    if model.is_full or model.head_adapter:
        kept += step.width * (shape.hidden + model.rank)
    return kept + (step.width * shape.hidden if shape.family == "gemma2" else 0)


@dataclass(frozen=True)
class CheckpointSizes:
    """Bytes that a run writes below its output_dir."""

    epoch: float
    """In each epoch's folder, all of which stay."""
    recipe_state: float
    """One file, overwritten by every epoch but the last, that resuming needs."""
    whole_run: float


def checkpoint_sizes(model: TorchtuneModel, config: Mapping[str, Any], recipe: str) -> CheckpointSizes | str:
    """Full weights in the config's dtype, adapters beside them, the optimizer's states between epochs.

    The small files that torchtune copies from checkpoint_dir into every epoch's folder are not among them.
    """
    step, epochs = _step(config, recipe, 1, 1), config.get("epochs")
    if isinstance(step, str):
        return step
    if type(epochs) is not int:
        return f"epochs is {epochs!r}, no whole number"
    if config.get("enable_async_checkpointing") is True:
        return "the size of asynchronous checkpoints is not planned"
    kind = str(get(config, "checkpointer._component_"))
    is_phi = str(get(config, "checkpointer.model_type")).startswith("PHI")
    copies = 2 if kind.endswith("HFCheckpointer") and not is_phi else 1
    weights = 0 if config.get("save_adapter_weights_only") is True else model.shape.parameters
    epoch = float(step.width * (weights + copies * model.adapter_parameters))
    state = step.state_bytes * model.trainable if epochs > 1 else 0.0
    return CheckpointSizes(epoch, state, epochs * epoch + state)
